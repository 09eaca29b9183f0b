"""Training on Accelerate: the pruning run, recovery, and everything that has to survive a kill."""
