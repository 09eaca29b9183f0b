"""Targets, and the choice of units for a budget."""
