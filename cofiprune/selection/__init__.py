"""Which units go for a budget."""
