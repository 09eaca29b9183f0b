"""Structured pruning for Hugging Face encoders: learn what can go, then slice it away."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cofiprune import versions as versions  # refuses releases that are too old

# isort: split
from cofiprune.adapter import Adapter, adapter_for, register_adapter, structure
from cofiprune.compaction import compact
from cofiprune.compaction import portable as portable  # save_pretrained writes its file
from cofiprune.compaction.hub import record_parts  # this module also registers the loader of compacted models
from cofiprune.errors import CofipruneError
from cofiprune.export.write import export
from cofiprune.hooks import same_random_state
from cofiprune.masking import attach
from cofiprune.masks import MaskRegistry
from cofiprune.measure.benchmark import BenchmarkReport, benchmark
from cofiprune.measure.summary import Summary, summary
from cofiprune.plan import Plan

if TYPE_CHECKING:
    from cofiprune.cofi_checkpoint import load_cofi_checkpoint
    from cofiprune.conformance import check_adapter
    from cofiprune.constraint import Constraint
    from cofiprune.export.report import ExportReport
    from cofiprune.gates import Gates
    from cofiprune.measure.evaluation import evaluate
    from cofiprune.training.config import PruneConfig
    from cofiprune.training.prune import finetune, prune
    from cofiprune.training.result import PruneResult
    from cofiprune.training.sweep import SweepResult
    from cofiprune.training.trainer.callback import PruningCallback
    from cofiprune.vocabulary.prune import VocabularyResult, prune_vocabulary

__version__ = "0.1.0"

# Loaded when first used: training brings in Accelerate, pydantic and rich, which loading a pruned model does not need.
_LAZY = {
    "Constraint": "cofiprune.constraint",
    "ExportReport": "cofiprune.export.report",
    "Gates": "cofiprune.gates",
    "check_adapter": "cofiprune.conformance",
    "evaluate": "cofiprune.measure.evaluation",
    "load_cofi_checkpoint": "cofiprune.cofi_checkpoint",
    "PruneConfig": "cofiprune.training.config",
    "PruneResult": "cofiprune.training.result",
    "PruningCallback": "cofiprune.training.trainer.callback",
    "SweepResult": "cofiprune.training.sweep",
    "finetune": "cofiprune.training.prune",
    "prune": "cofiprune.training.prune",
    "prune_vocabulary": "cofiprune.vocabulary.prune",
    "VocabularyResult": "cofiprune.vocabulary.prune",
}

__all__ = [
    "Adapter",
    "BenchmarkReport",
    "CofipruneError",
    "Constraint",
    "ExportReport",
    "Gates",
    "MaskRegistry",
    "Plan",
    "PruneConfig",
    "PruneResult",
    "PruningCallback",
    "Summary",
    "SweepResult",
    "VocabularyResult",
    "adapter_for",
    "attach",
    "benchmark",
    "check_adapter",
    "compact",
    "evaluate",
    "export",
    "finetune",
    "load_cofi_checkpoint",
    "prune",
    "prune_vocabulary",
    "record_parts",
    "register_adapter",
    "structure",
    "summary",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        with same_random_state():  # rich draws a number when it is imported
            return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
