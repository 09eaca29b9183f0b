"""From the arguments of `prune` to the target that they ask for."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from cofiprune import accounting
from cofiprune.compaction.uniform_config import config_names
from cofiprune.data.checks import longest_sequence
from cofiprune.data.synthetic import synthetic_inputs
from cofiprune.latency.measuring import conditions_of
from cofiprune.latency.target import best_multiple, latency_target
from cofiprune.measure.benchmark import seen_length
from cofiprune.selection.target import Target
from cofiprune.structure import Structure
from cofiprune.training.config import PruneConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_IN_TIME = ("target_speedup", "target_latency_ms")
_ROUND = 8
"""Sizes that matrix kernels like, where the target is a time: others take longer than the next one. Tensor cores of
NVIDIA's GPUs take 16-bit matrices in pieces of 8. On an AMD EPYC in float32, a feed-forward block of 135 dimensions
takes 1.06 times (128 positions) to 1.26 times (4096) as long as one of 136."""


def target_for(model: PreTrainedModel, structure: Structure, config: PruneConfig, name: str, value: float) -> Target:
    """Make the target that a run was asked for; a target in time is measured, which can take minutes.

    :param name: of the argument; see `parse_target`.
    :raises TargetError: for a value that means nothing to remove.
    :raises PlanError: for `uniform` where the model's configuration cannot say such a shape.
    """
    length = counted_length(model, config)
    if name in _IN_TIME:
        conditions = conditions_of(
            model,
            structure,
            batch_size=config.target_batch_size,
            seq_len=length,
            cut_hidden=any(group.kind == "hidden" for group in structure.select(config.units)),
        )
        target = latency_target(model, structure, name, value, conditions, cache=config.latency_cache)
    elif name == "target_macs":
        target = _macs(model, structure, length, value)
    else:
        cost = accounting.layer_parameters if name == "target_sparsity" else accounting.model_parameters
        target = Target.create(name, value, cost, cost(structure).exact(structure.sizes))
    multiple = config.round_to
    if multiple == "auto":
        multiple = best_multiple(model, structure, rows=config.target_batch_size * length)
    elif multiple is None:
        multiple = _ROUND if name in _IN_TIME else 1
    target = replace(target, round_to=multiple)
    if not config.uniform:
        return target
    return replace(target, uniform=True, tied_heads=config_names(model, structure).head_dim is None)


def counted_length(model: PreTrainedModel, config: PruneConfig) -> int:
    """Return the length at which operations are counted and time is measured: as long as the model reads, at most."""
    longest = longest_sequence(model)
    return config.target_seq_len if longest is None else min(config.target_seq_len, longest)


def _macs(model: PreTrainedModel, structure: Structure, length: int, value: float) -> Target:
    inputs = synthetic_inputs(model, batch_size=1, seq_len=length, generator=torch.Generator())
    seq_len = seen_length(model, structure, inputs, length)
    setting = f"at {seq_len} tokens"
    cost = partial(accounting.model_macs, seq_len=seq_len)
    return Target.create("target_macs", value, cost, cost(structure).exact(structure.sizes), setting=setting)
