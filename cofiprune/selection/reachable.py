"""Which amounts of a cost can be reached by removing units of some kinds, known before anything is trained.

Units of large groups go in small steps, and everything up to the most can be reached; blocks and heads of small models
do not, and then combinations are searched over the discretised cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cofiprune.accounting import Cost, layer_parameters
from cofiprune.errors import TargetError
from cofiprune.selection.curves import Losses
from cofiprune.selection.target import TOLERANCE, Target
from cofiprune.selection.uniform import uniform_sizes
from cofiprune.structure import UNIT_KINDS, Block, Group, Structure, UnitKind

RESOLUTION = 40_000
"""Steps that a cost is cut into where combinations of whole blocks are searched."""
_INNER_LEVELS = 128
_HIDDEN_LEVELS = 128
"""Sizes of a group that such a search tries: a linear cost then goes in steps of less than twice the tolerance."""


@dataclass(frozen=True)
class Reachable:
    """The sparsities that a choice of units can give."""

    highest: float
    fine: bool
    """Whether steps are small enough that everything between 0 and `highest` is within the tolerance."""
    levels: tuple[float, ...]
    """The sparsities that can be had, ascending, where steps are large; empty when `fine`."""

    def nearest(self, target: float) -> tuple[float, ...]:
        """The reachable sparsities around a target."""
        if self.fine:
            return (self.highest,)
        below = [level for level in self.levels if level <= target]
        above = [level for level in self.levels if level > target]
        return (*below[-1:], *above[:1])


def reachable(
    structure: Structure,
    cost: Cost,
    units: str | Sequence[UnitKind] | None = None,
    tolerance: float = TOLERANCE,
) -> Reachable:
    """Work out which sparsities can be reached by removing units of some kinds.

    :param units: unit kinds; None for all that the structure has.
    """
    groups = structure.select(units)
    chosen = {group.name for group in groups}
    highest = 1 - cost.exact(_least(structure, groups)) / cost.exact(structure.sizes)
    reached = torch.zeros(RESOLUTION + 1, dtype=torch.bool)
    levels = reached.nonzero().flatten()
    for hidden in hidden_sizes(structure, chosen):
        reached |= amounts(structure, chosen, cost, hidden)
        levels = reached.nonzero().flatten()
        ends = torch.tensor([0, round(highest * RESOLUTION)])
        if int(torch.cat([levels, ends]).sort().values.diff().max()) <= 2 * slack_of(structure, tolerance):
            return Reachable(highest, True, ())
    return Reachable(highest, False, tuple(level / RESOLUTION for level in levels.tolist()))


def check_target(structure: Structure, target: Target, units: str | Sequence[UnitKind] | None = None) -> None:
    """Make sure that a target can be met within the tolerance by removing units of some kinds.

    :param structure: of the dense model, or of a smaller one that is to go on from where it is.
    :raises TargetError: saying what is reachable.
    """
    cost = target.cost(structure)
    total = cost.exact(structure.sizes)
    groups = structure.select(units)
    if not layer_parameters(structure).exact(structure.sizes):
        raise TargetError(f"nothing is left in the layers of this {structure.family} model that could be removed")
    if target.budget >= total:
        raise TargetError(f"{target}: this {structure.family} model is there already, with {target.text(total)}")
    if target.uniform:
        alike = {group.name: torch.ones(group.size) for group in groups}
        uniform_sizes(structure, Losses.of(structure, alike), target)
    share = target.removed(structure)
    found = reachable(structure, cost, units, target.tolerance)
    kinds = [unit for unit in UNIT_KINDS if any(group.unit == unit for group in groups)]
    chosen = f"units {', '.join(kinds)}"
    if share > found.highest + target.tolerance:
        raise TargetError(
            f"{target} cannot be reached with {chosen} on this {structure.family} model: "
            f"removing all that can go gives {target.text((1 - found.highest) * total)}"
        )
    if not found.fine and min(abs(level - share) for level in found.levels) * RESOLUTION > slack_of(
        structure, target.tolerance
    ):
        near = " and ".join(target.text((1 - level) * total) for level in found.nearest(share))
        others = [unit for unit in UNIT_KINDS if unit not in kinds]
        more = f". More is reachable with other units too: {', '.join(others)}" if others else ""
        raise TargetError(
            f"{target} cannot be reached within {target.tolerance:.2g} with {chosen} on this {structure.family} model, "
            f"where they go in large steps; reachable next to it: {near}{more}"
        )


def amounts(structure: Structure, chosen: Iterable[str], cost: Cost, hidden: int) -> Tensor:
    """Whether each step of the cost can be removed with so many hidden dimensions: [RESOLUTION + 1] bool."""
    names = set(chosen)
    full = {**structure.sizes, "hidden": hidden}
    total = cost.exact(structure.sizes)
    reached = torch.zeros(RESOLUTION + 1, dtype=torch.bool)
    reached[steps(total - cost.exact(full), total)] = True
    for block in structure.blocks:
        shifted = reached.clone()
        for step in {steps(saved, total) for _, _, saved in cuts(block, names, cost, full)}:
            shifted[step:] |= reached[: len(reached) - step]
        reached = shifted
    return reached


def cuts(block: Block, chosen: set[str], cost: Cost, full: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """The cuts of a block that a search tries: the group, the size that it is cut to, and the cost saved."""
    found = []
    whole = cost.exact(full)
    if block.inner is not None and block.inner in chosen:
        counts = _spread(full[block.inner], _INNER_LEVELS)[:-1]
        left = cost.along(full, block.inner, counts)
        found += [(block.inner, count, whole - each) for count, each in zip(counts, left, strict=True)]
    if block.gate in chosen or block.inner in chosen:
        found.append((block.gate, 0, whole - cost.exact({**full, block.gate: 0})))
    return found


def hidden_sizes(structure: Structure, chosen: Iterable[str]) -> list[int]:
    """Numbers of hidden dimensions that a search tries: both ends, then the middle between any two, and so on."""
    if "hidden" not in structure:
        return [0]
    size = structure["hidden"].size
    if "hidden" not in chosen:
        return [size]
    sizes = _spread(size, _HIDDEN_LEVELS)
    order, stride = [len(sizes) - 1, 0], 2 ** len(sizes).bit_length()
    while stride > 1:
        order += range(stride // 2, len(sizes), stride)
        stride //= 2
    return [sizes[index] for index in dict.fromkeys(order)]


def slack_of(structure: Structure, tolerance: float = TOLERANCE) -> float:
    """A tolerance in steps of the search, less what rounding every block to whole steps can add up to."""
    return tolerance * RESOLUTION - len(structure.blocks) - 1


def steps(saved: int, total: int) -> int:
    return saved * RESOLUTION // total  # rounded down, so that all blocks together do not exceed the whole


def _spread(size: int, levels: int) -> list[int]:
    """About `levels` numbers from 1 to size, ascending, both ends among them."""
    return sorted({1, *(max(1, round(level * size / levels)) for level in range(1, levels + 1))})


def _least(structure: Structure, groups: Sequence[Group]) -> dict[str, int]:
    chosen = {group.name for group in groups}
    counts = dict(structure.sizes)
    counts.update({name: 1 if name == "hidden" else 0 for name in chosen})
    for block in structure.blocks:
        if not counts[block.gate] or (block.inner is not None and not counts[block.inner]):
            counts[block.gate] = 0
    return counts
