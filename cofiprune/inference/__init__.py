"""Faster products in a model that only answers."""
