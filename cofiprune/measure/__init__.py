"""Measurements of a model: metrics, size and latency."""
