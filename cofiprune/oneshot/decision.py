"""What goes in a sweep, when it is known what removing units of each block loses.

Where each further unit of a group costs the same, single units are given up (`budgeting`). Where it does not, as with
measured time, or sizes are round or the same in every layer, the sizes of all groups are chosen together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cofiprune.accounting import Cost
from cofiprune.oneshot.budgeting import Option, give_up, savings
from cofiprune.oneshot.loss_curves import Curve
from cofiprune.plan import Plan
from cofiprune.selection.by_score import sizes_for
from cofiprune.selection.curves import Losses
from cofiprune.selection.target import Target
from cofiprune.structure import Block, Structure


@dataclass(frozen=True)
class Candidate:
    """A block of which units may go, or which may go as a whole."""

    block: Block
    curve: Curve
    """What it loses with its inner units, one after the other."""
    in_part: bool
    """Some of its units may go."""
    as_a_whole: bool
    """All of them may, and the block with them."""

    @property
    def inner(self) -> str:
        """The group of its inner units."""
        assert self.block.inner is not None
        return self.block.inner


def decide(structure: Structure, candidates: Sequence[Candidate], target: Target, stream: Curve | None = None) -> Plan:
    """Choose what stays so that as much of the cost is left as the target says, as nearly as units allow.

    :param structure: of the dense model, or of what earlier sweeps have left of it.
    :param stream: what it loses to take out hidden dimensions, where they may go; those of infinite loss stay.
    :raises TargetError: when sizes are chosen for whole groups and none come near the target.
    """
    by = _by_levels if target.needs_levels(structure) else _by_units
    gone = by(structure, candidates, target, stream)
    curves = {each.inner: each.curve for each in candidates} | ({} if stream is None else {"hidden": stream})
    masks = {}
    for name, curve in curves.items():
        masks[name] = torch.ones(structure[name].size, dtype=torch.float64)
        masks[name][list(curve.order[: gone[name]])] = 0.0
    return Plan.from_values(structure, masks)


def _by_units(
    structure: Structure, candidates: Sequence[Candidate], target: Target, stream: Curve | None
) -> dict[str, int]:
    """Units that go, by group."""
    cost, sizes = target.cost(structure), dict(structure.sizes)
    options = {each.inner: _option(each, cost, sizes) for each in candidates}
    hidden = 0
    if stream is not None:
        saved = savings(lambda units: cost.exact({**sizes, "hidden": units}), sizes["hidden"])
        most = sum(map(math.isfinite, stream.losses[:-1]))
        narrower = Option(Curve(stream.order[:most], stream.losses[:most]), saved[: most + 1])
        hidden = give_up({**options, "hidden": narrower}, cost.exact(sizes) - target.budget)["hidden"]
        # With fewer hidden dimensions a unit of a block costs less: what the blocks give up is counted again.
        sizes["hidden"] -= hidden
        options = {each.inner: _option(each, cost, sizes) for each in candidates}
    gone = give_up(options, cost.exact(sizes) - target.budget)
    return {"hidden": hidden} | {each.inner: _steps(each)[gone[each.inner]] for each in candidates}


def _steps(candidate: Candidate) -> list[int]:
    """Numbers of units that may go."""
    size = len(candidate.curve.order)
    return [0, *(range(1, size) if candidate.in_part else ()), *([size] if candidate.as_a_whole else ())]


def _option(candidate: Candidate, cost: Cost, sizes: Mapping[str, int]) -> Option:
    inner, gate, curve = candidate.inner, candidate.block.gate, candidate.curve
    saved = savings(lambda units: cost.exact({**sizes, inner: units, **({} if units else {gate: 0})}), sizes[inner])
    steps = _steps(candidate)
    order = tuple(curve.order[count - 1] for count in steps[1:])
    losses = tuple(curve.losses[count - 1] for count in steps[1:])
    return Option(Curve(order, losses), [saved[count] for count in steps])


def _by_levels(
    structure: Structure, candidates: Sequence[Candidate], target: Target, stream: Curve | None
) -> dict[str, int]:
    """Units that go, by group."""
    curves = {each.inner: each.curve for each in candidates if each.in_part}
    curves |= {} if stream is None else {"hidden": stream}
    by_count = {name: np.array([0.0, *curve.losses])[::-1] for name, curve in curves.items()}
    gates = {each.block.gate: each.curve.losses[-1] for each in candidates if each.as_a_whole}
    sizes = sizes_for(structure, Losses(by_count, gates), target, may_empty=False)
    left = {each.inner: sizes[each.inner] if sizes[each.block.gate] else 0 for each in candidates}
    left |= {"hidden": sizes["hidden"]} if "hidden" in structure else {}
    return {name: structure[name].size - count for name, count in left.items()}
