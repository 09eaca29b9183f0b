"""From the arguments of `prune` to the one target that they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from cofiprune import accounting
from cofiprune.benchmark import seen_length
from cofiprune.errors import TargetError
from cofiprune.evaluation import evaluating
from cofiprune.rendering import amount
from cofiprune.structure import Structure
from cofiprune.synthetic import synthetic_inputs
from cofiprune.target import MODEL_SPARSITY, SPARSITY, Scale, Target, check_fraction, check_positive
from cofiprune.training.config import PruneConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_SPARSITY = 0.9
"""What is pruned to when no target is given."""


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


def target_for(model: PreTrainedModel, structure: Structure, config: PruneConfig, asked: Mapping[str, Any]) -> Target:
    """Make the target that a run was asked for.

    :param asked: see `the_one`.
    :raises TargetError: for more than one, or one that means nothing to remove.
    """
    name, value = the_one(asked)
    if name == "target_macs":
        return _macs(model, structure, config, value)
    scale = SPARSITY if name == "target_sparsity" else MODEL_SPARSITY
    cost = accounting.layer_parameters if scale is SPARSITY else accounting.model_parameters
    total = cost(structure).exact(structure.sizes)
    return Target(scale, value, cost, total, scale.left(value, total))


def _macs(model: PreTrainedModel, structure: Structure, config: PruneConfig, value: float) -> Target:
    with evaluating(model):
        inputs = synthetic_inputs(model, batch_size=1, seq_len=config.target_seq_len)
        seq_len = seen_length(model, inputs, config.target_seq_len)
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
