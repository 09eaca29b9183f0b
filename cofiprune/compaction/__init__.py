"""Physical slicing: smaller weights, placeholders for removed blocks, and how the result is saved and loaded."""

from cofiprune.compaction.slicing import compact, restore

__all__ = ["compact", "restore"]
