"""What a run is given, set up: Accelerate, and the evaluation on held-out rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import nn

from cofiprune.data.prepare import prepare
from cofiprune.errors import SettingsError
from cofiprune.measure.evaluation import evaluate_batches
from cofiprune.training.checks import check_measurable
from cofiprune.training.config import PruneConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def held_out(
    eval_dataset: Any,
    model: PreTrainedModel,
    config: PruneConfig,
    collator: Callable[[list[Any]], Any] | None,
    compute_metrics: Callable[[Any], dict[str, float]] | None,
) -> Callable[[nn.Module], dict[str, float]] | None:
    """Return what evaluates a model on a checked evaluation set; None without one."""
    if eval_dataset is None:
        return None
    batches = prepare(
        eval_dataset,
        model,
        batch_size=config.eval_batch_size,
        collator=collator,
        need_labels=False,
        name="eval_dataset",
    )
    check_measurable(batches, model, computed=compute_metrics is not None)
    return lambda trained: _prefixed(
        evaluate_batches(trained, batches, compute_metrics=compute_metrics)  # type: ignore[arg-type]
    )


def accelerator_for(config: PruneConfig) -> Accelerator:
    """Set up Accelerate; a later run of the same process may ask for another precision than an earlier one."""
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != config.mixed_precision:
        AcceleratorState._reset_state()
    # Which parts of a model a batch uses depends on its head (an unused pooler, say).
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise SettingsError("mixed_precision='fp16' needs a GPU; use 'bf16' or 'no' here")
    return Accelerator(mixed_precision=config.mixed_precision, kwargs_handlers=[unused])


def padding_multiple(config: PruneConfig, model: PreTrainedModel, device: torch.device) -> int:
    """What batches of token rows are padded to a multiple of: tensor cores take 16-bit matrices in pieces of 8."""
    if config.pad_to_multiple_of is not None:
        return config.pad_to_multiple_of
    half = config.mixed_precision != "no" or model.dtype in (torch.float16, torch.bfloat16)
    return 8 if device.type == "cuda" and half else 1


def _prefixed(metrics: dict[str, float]) -> dict[str, float]:
    return {name if name.startswith("eval_") else f"eval_{name}": value for name, value in metrics.items()}
