"""What goes in a sweep, when it is known what removing units of each block loses.

Where each further unit of a group costs the same, single units are given up (`budgeting`). Where it does not, as with
measured time, or sizes are round or the same in every layer, the sizes of all groups are chosen together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cofiprune.losses import Losses
from cofiprune.oneshot.budgeting import Option, give_up, savings
from cofiprune.oneshot.surgeon import Curve
from cofiprune.plan import Plan
from cofiprune.selection import sizes_for
from cofiprune.structure import Block, Structure
from cofiprune.target import Target


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


def decide(structure: Structure, candidates: Sequence[Candidate], target: Target) -> Plan:
    """Choose what stays so that as much of the cost is left as the target says, as nearly as units allow.

    :param structure: of the dense model, or of what earlier sweeps have left of it.
    :raises TargetError: when sizes are chosen for whole groups and none come near the target.
    """
    by = _by_levels if target.by_levels(structure) else _by_units
    gone = by(structure, candidates, target)
    masks = {}
    for candidate in candidates:
        inner = candidate.inner
        masks[inner] = torch.ones(structure[inner].size, dtype=torch.float64)
        masks[inner][list(candidate.curve.order[: gone[inner]])] = 0.0
    return Plan.from_values(structure, masks)


def _by_units(structure: Structure, candidates: Sequence[Candidate], target: Target) -> dict[str, int]:
    """Units that go, by inner group."""
    cost, sizes = target.cost(structure), structure.sizes
    steps: dict[str, list[int]] = {}
    options = {}
    for each in candidates:
        inner, gate, losses = each.inner, each.block.gate, each.curve.losses

        def left(units: int, inner: str = inner, gate: str = gate) -> float:
            return cost.exact({**sizes, inner: units, **({} if units else {gate: 0})})

        saved = savings(left, sizes[inner])
        partly = range(1, sizes[inner]) if each.in_part else range(0)
        steps[inner] = [0, *partly, *([sizes[inner]] if each.as_a_whole else [])]
        taken = steps[inner][1:]
        options[inner] = Option(
            Curve(tuple(each.curve.order[count - 1] for count in taken), tuple(losses[count - 1] for count in taken)),
            [saved[count] for count in steps[inner]],
        )
    gone = give_up(options, cost.exact(sizes) - target.left)
    return {inner: steps[inner][count] for inner, count in gone.items()}


def _by_levels(structure: Structure, candidates: Sequence[Candidate], target: Target) -> dict[str, int]:
    """Units that go, by inner group."""
    by_count = {each.inner: np.array([0.0, *each.curve.losses])[::-1] for each in candidates if each.in_part}
    gates = {each.block.gate: each.curve.losses[-1] for each in candidates if each.as_a_whole}
    sizes = sizes_for(structure, Losses(by_count, gates), target, may_empty=False)
    left = {each.inner: sizes[each.inner] if sizes[each.block.gate] else 0 for each in candidates}
    return {inner: structure[inner].size - count for inner, count in left.items()}
