"""Structured pruning for Hugging Face encoders: learn what can go, then slice it away."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cofiprune import checkpoint as _checkpoint  # noqa: F401 -- registers the loader of compacted models
from cofiprune.adapter import Adapter, adapter_for, register_adapter, structure
from cofiprune.compaction import compact
from cofiprune.errors import CofipruneError
from cofiprune.masking import attach
from cofiprune.masks import MaskRegistry
from cofiprune.plan import Plan

if TYPE_CHECKING:
    from cofiprune.training.config import PruneConfig
    from cofiprune.training.result import PruneResult
    from cofiprune.training.run import finetune, prune

__version__ = "0.1.0"

# Loaded when first used: training brings in Accelerate, pydantic and rich, which loading a pruned model does not need.
_LAZY = {
    "PruneConfig": "cofiprune.training.config",
    "PruneResult": "cofiprune.training.result",
    "finetune": "cofiprune.training.run",
    "prune": "cofiprune.training.run",
}

__all__ = [
    "Adapter",
    "CofipruneError",
    "MaskRegistry",
    "Plan",
    "PruneConfig",
    "PruneResult",
    "adapter_for",
    "attach",
    "compact",
    "finetune",
    "prune",
    "register_adapter",
    "structure",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
