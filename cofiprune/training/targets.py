"""From the arguments of `prune` to the one target that they ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from cofiprune import accounting
from cofiprune.compaction.uniform_config import config_names
from cofiprune.data.checks import longest_sequence
from cofiprune.data.synthetic import synthetic_inputs
from cofiprune.errors import TargetError
from cofiprune.hooks import evaluating
from cofiprune.latency.goal import latency_target
from cofiprune.latency.rounding import best_multiple
from cofiprune.measure.benchmark import seen_length
from cofiprune.measure.report import amount
from cofiprune.selection.target import MODEL_SPARSITY, SPARSITY, Scale, Target, check_fraction, check_positive
from cofiprune.structure import Structure
from cofiprune.training.config import PruneConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_SPARSITY = 0.9
"""What is pruned to when no target is given."""
IN_TIME = ("target_speedup", "target_latency_ms")
ROUND = 8
"""Sizes that matrix kernels like, where the target is a time: others take longer than the next one. Tensor cores of
NVIDIA's GPUs take 16-bit matrices in pieces of 8. On an AMD EPYC in float32, a feed-forward block of 135 dimensions
takes 1.06 times (128 positions) to 1.26 times (4096) as long as one of 136."""


def the_one(asked: Mapping[str, Any]) -> tuple[str, float]:
    """Return the target that was given, checked as far as that goes without a model.

    :param asked: by the name of the argument; None for those not given.
    :raises TargetError: for more than one, or a value out of range.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) > 1:
        listed = " and ".join(f"{name}={value!r}" for name, value in given.items())
        raise TargetError(f"{listed} are given; a run has one target, so leave all but one out")
    name, value = next(iter(given.items()), ("target_sparsity", DEFAULT_SPARSITY))
    if name in ("target_sparsity", "target_model_sparsity"):
        return name, check_fraction(value, name)
    found = check_positive(value, name)
    if name == "target_macs" and found < 1:
        raise TargetError(
            f"target_macs is the number of multiply-accumulates that may be left, not a share of them: got {found:g}. "
            f"For that share of a model pass {found:g} * cofiprune.summary(model).macs"
        )
    return name, found


def several(target_sparsity: Any) -> list[float] | None:
    """Return a list of sparsities in ascending order; None where there is no list.

    :raises TargetError: for an empty list, one with a sparsity twice, or a value out of range.
    """
    if not isinstance(target_sparsity, list | tuple):
        return None
    found = sorted(check_fraction(value) for value in target_sparsity)
    if not found or len(set(found)) < len(found):
        raise TargetError(f"target_sparsity={list(target_sparsity)}: a list takes different sparsities, at least one")
    return found


def target_for(
    model: PreTrainedModel,
    structure: Structure,
    config: PruneConfig,
    asked: Mapping[str, Any],
    on_progress: Callable[[float], None] | None = None,
) -> Target:
    """Make the target that a run was asked for; a target in time is measured, which can take minutes.

    :param asked: see `the_one`.
    :raises TargetError: for more than one, or one that means nothing to remove.
    :raises PlanError: for `uniform` where the model's configuration cannot say such a shape.
    """
    name, value = the_one(asked)
    target = _counted(model, structure, config, name, value, on_progress)
    multiple = config.round_to
    if multiple == "auto":
        rows = config.target_batch_size * counted_length(model, config)
        multiple = best_multiple(model, structure, rows=rows)
    elif multiple is None:
        multiple = ROUND if name in IN_TIME else 1
    target = replace(target, round_to=multiple)
    if not config.uniform:
        return target
    return replace(target, uniform=True, tied_heads=config_names(model).head_dim is None)


def counted_length(model: PreTrainedModel, config: PruneConfig) -> int:
    """The length at which operations are counted and time is measured: as long as the model reads, at most."""
    longest = longest_sequence(model)
    return config.target_seq_len if longest is None else min(config.target_seq_len, longest)


def _counted(
    model: PreTrainedModel,
    structure: Structure,
    config: PruneConfig,
    name: str,
    value: float,
    on_progress: Callable[[float], None] | None,
) -> Target:
    if name in IN_TIME:
        return latency_target(
            model,
            structure,
            name,
            value,
            batch_size=config.target_batch_size,
            seq_len=counted_length(model, config),
            cut_hidden=any(group.kind == "hidden" for group in structure.select(config.units)),
            cache=config.latency_cache,
            on_progress=on_progress,
        )
    if name == "target_macs":
        return _macs(model, structure, config, value)
    scale = SPARSITY if name == "target_sparsity" else MODEL_SPARSITY
    cost = accounting.layer_parameters if scale is SPARSITY else accounting.model_parameters
    total = cost(structure).exact(structure.sizes)
    return Target(scale, value, cost, total, scale.left(value, total))


def _macs(model: PreTrainedModel, structure: Structure, config: PruneConfig, value: float) -> Target:
    with evaluating(model):
        asked = counted_length(model, config)
        seq_len = seen_length(model, synthetic_inputs(model, batch_size=1, seq_len=asked), asked)
    setting = f"at {seq_len} tokens"
    scale = Scale(
        "target_macs",
        left=lambda asked, total: asked,
        asked=lambda left, total: left,
        text=lambda asked: f"{amount(round(asked))} MACs {setting}",
    )
    cost = partial(accounting.model_macs, seq_len=seq_len)
    total = cost(structure).exact(structure.sizes)
    if value >= total:
        raise TargetError(
            f"target_macs={value:g}: the model has {amount(total)} MACs {setting}; a target lies below that"
        )
    return Target(scale, value, cost, total, value, setting)
