"""Structured pruning for Hugging Face encoders: learn what can go, then slice it away."""

from cofiprune import checkpoint as _checkpoint  # noqa: F401 -- registers the loader of compacted models
from cofiprune.adapter import Adapter, adapter_for, register_adapter, structure
from cofiprune.compaction import compact
from cofiprune.errors import CofipruneError
from cofiprune.masking import attach
from cofiprune.masks import MaskRegistry
from cofiprune.plan import Plan

__version__ = "0.1.0"
__all__ = ["Adapter", "CofipruneError", "MaskRegistry", "Plan", "adapter_for", "attach", "compact", "register_adapter", "structure"]
