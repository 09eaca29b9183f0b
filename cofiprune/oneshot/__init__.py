"""One-shot pruning, with data and without: importance, what units cost, and least-squares reconstruction."""
