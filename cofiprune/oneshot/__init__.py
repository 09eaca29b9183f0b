"""Pruning without data: importance from weights and synthetic inputs, and a least-squares repair."""

from cofiprune.oneshot.data_free import OneShotReport, prune_without_data

__all__ = ["OneShotReport", "prune_without_data"]
