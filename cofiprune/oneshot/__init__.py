"""One-shot pruning, with data and without: importance, what units cost, and least-squares reconstruction."""

from cofiprune.oneshot.data_free import OneShotReport, prune_data_free

__all__ = ["OneShotReport", "prune_data_free"]
