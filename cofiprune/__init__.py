"""Structured pruning for Hugging Face encoders: learn what can go, then slice it away."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cofiprune import versions as versions  # refuses releases that are too old

# isort: split
if TYPE_CHECKING:
    from cofiprune.adapter import Adapter, adapter_for, register_adapter, structure
    from cofiprune.cofi_checkpoint import load_cofi_checkpoint
    from cofiprune.compaction import compact
    from cofiprune.compaction.hub import record_parts
    from cofiprune.conformance import check_adapter
    from cofiprune.constraint import Constraint
    from cofiprune.errors import CofipruneError
    from cofiprune.export.report import ExportReport
    from cofiprune.export.write import export
    from cofiprune.gates import Gates
    from cofiprune.masking import attach
    from cofiprune.masks import MaskRegistry
    from cofiprune.measure.benchmark import BenchmarkReport, benchmark
    from cofiprune.measure.evaluation import evaluate
    from cofiprune.measure.summary import Summary, summary
    from cofiprune.plan import Plan
    from cofiprune.training.config import PruneConfig
    from cofiprune.training.prune import finetune, prune
    from cofiprune.training.result import PruneResult
    from cofiprune.training.sweep import SweepResult
    from cofiprune.training.teach import teach
    from cofiprune.training.trainer.callback import PruningCallback
    from cofiprune.vocabulary.prune import VocabularyResult, prune_vocabulary

__version__ = "0.1.0"

# Loaded with the package; the module of record_parts also registers the loader of compacted models.
_AT_ONCE = {
    "Adapter": "cofiprune.adapter",
    "adapter_for": "cofiprune.adapter",
    "register_adapter": "cofiprune.adapter",
    "structure": "cofiprune.adapter",
    "compact": "cofiprune.compaction",
    "record_parts": "cofiprune.compaction.hub",
    "CofipruneError": "cofiprune.errors",
    "export": "cofiprune.export.write",
    "attach": "cofiprune.masking",
    "MaskRegistry": "cofiprune.masks",
    "BenchmarkReport": "cofiprune.measure.benchmark",
    "benchmark": "cofiprune.measure.benchmark",
    "Summary": "cofiprune.measure.summary",
    "summary": "cofiprune.measure.summary",
    "Plan": "cofiprune.plan",
}
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
    "teach": "cofiprune.training.teach",
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
    "teach",
]


def load() -> None:
    """Load what comes with the package; the command line does so once it has understood its arguments."""
    import_module("cofiprune.compaction.portable")  # save_pretrained writes its file
    for name, module in _AT_ONCE.items():
        globals()[name] = getattr(import_module(module), name)


def _is_command() -> bool:
    """Whether this process is the command line, whose help and complaints do not wait for torch."""
    program = Path(sys.argv[0] if sys.argv else "").name
    return program in ("cofiprune", "cofiprune.exe", "cofiprune-script.py") or (
        program == "-m" and "cofiprune" in sys.orig_argv[1:6]
    )


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from cofiprune.hooks import same_random_state

        with same_random_state():  # rich draws a number when it is imported
            return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


if not _is_command():
    load()
