"""Faster matrix products for inference."""
