"""Reachable targets: the amounts of a cost that can be removed with some unit kinds, known before training.

Units of large groups go in small steps, and everything up to the most can be reached; blocks and heads of small models
do not, and then combinations are searched over the discretised cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cofiprune.accounting import Cost, embedding_parameters, layer_parameters, model_parameters
from cofiprune.errors import TargetError
from cofiprune.selection.curves import Curves, block_tables, hidden_sizes, sizes_of, spread, uncritical
from cofiprune.selection.knapsack import FINE_LEVELS, RESOLUTION, least_losses
from cofiprune.selection.target import TOLERANCE, Target
from cofiprune.selection.uniform import uniform_sizes
from cofiprune.structure import UNIT_KINDS, Structure, UnitKind

_MUCH = 0.3
"""Share of a model's parameters in embedding tables from which on they are what stands in the way."""


@dataclass(frozen=True)
class Reachable:
    """The sparsities that a choice of units can give."""

    highest: float
    levels: tuple[float, ...]
    """The sparsities that can be had, ascending; empty where everything up to `highest` is within the tolerance."""

    @property
    def fine(self) -> bool:
        """True if steps are so small that everything up to `highest` is within the tolerance."""
        return not self.levels

    def nearest(self, target: float) -> tuple[float, ...]:
        """Return the reachable sparsities around a target."""
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
    curves = uncritical(structure, units)
    widths = hidden_sizes(structure, curves)
    least = [int(table.allowed[0]) for table in block_tables(structure, curves, cost, int(widths[0]))]
    highest = 1 - cost.exact(sizes_of(structure, int(widths[0]), least)) / cost.exact(structure.sizes)
    reached = np.zeros(RESOLUTION + 1, dtype=bool)
    tried = spread(widths, FINE_LEVELS)
    for hidden in dict.fromkeys([*tried[[0, -1]], *tried[::16], *tried]):  # a few are enough where steps are small
        reached |= _saved(structure, curves, cost, int(hidden))
        steps = np.flatnonzero(reached)
        if np.diff(np.union1d(steps, [0, round(highest * RESOLUTION)])).max() <= 2 * _slack(structure, tolerance):
            return Reachable(highest, ())
    return Reachable(highest, tuple((steps / RESOLUTION).tolist()))


def check_target(structure: Structure, target: Target, units: str | Sequence[UnitKind] | None = None) -> None:
    """Make sure that a target can be met within the tolerance by removing units of some kinds.

    :param structure: of the dense model, or of a smaller one that is to go on from where it is.
    :raises TargetError: saying what is reachable.
    """
    cost, model = target.cost(structure), f"this {structure.family} model"
    total = cost.exact(structure.sizes)
    removable = {group.unit for group in structure.select(units)}
    if not layer_parameters(structure).exact(structure.sizes):
        raise TargetError(f"nothing is left in the layers of {model} that could be removed")
    if target.budget >= total:
        raise TargetError(f"{target}: {model} is there already, with {target.text(total)}")
    if target.uniform:
        uniform_sizes(structure, uncritical(structure, units), target)
        return
    share = target.removed(structure)
    found = reachable(structure, cost, units, target.tolerance)
    kinds, others = ([kind for kind in UNIT_KINDS if (kind in removable) is chosen] for chosen in (True, False))
    chosen = f"units {', '.join(kinds)} on {model}"
    if share > found.highest + target.tolerance:
        everything = target.text((1 - found.highest) * total)
        raise TargetError(
            f"{target} cannot be reached with {chosen}: removing all that can go gives {everything}"
            f"{_of_tables(structure)}"
        )
    off = 0.0 if found.fine else min(abs(level - share) for level in found.levels) * RESOLUTION
    if off > _slack(structure, target.tolerance):
        near = " and ".join(target.text((1 - level) * total) for level in found.nearest(share))
        more = f". More is reachable with other units too: {', '.join(others)}" if others else ""
        raise TargetError(
            f"{target} cannot be reached within {target.tolerance:.2g} with {chosen}, where they go in large steps; "
            f"reachable next to it: {near}{more}"
        )


def _saved(structure: Structure, curves: Curves, cost: Cost, hidden: int) -> NDArray[np.bool_]:
    """Return whether each step of the cost can be saved with so many hidden dimensions: [1 + RESOLUTION]."""
    step = cost.exact(structure.sizes) / RESOLUTION
    rows = [(table, spread(table.allowed, FINE_LEVELS)) for table in block_tables(structure, curves, cost, hidden)]
    best, _ = least_losses([(table.saved[row], table.loss[row]) for table, row in rows], step)
    found = np.zeros(RESOLUTION + 1, dtype=bool)
    first = RESOLUTION - round(cost.exact(sizes_of(structure, hidden)) / step)
    best = best[: RESOLUTION + 1 - first]  # roundings of all blocks together may exceed the whole
    found[first : first + len(best)] = np.isfinite(best)
    return found


def _slack(structure: Structure, tolerance: float) -> float:
    """A tolerance in steps of the search, less what rounding every block to whole steps can add up to."""
    return max(tolerance * RESOLUTION - len(structure.blocks) / 2 - 1, 1.0)


def _of_tables(structure: Structure) -> str:
    """What to do about tables of tokens, where they are a large part of the model."""
    share = embedding_parameters(structure).exact(structure.sizes) / model_parameters(structure).exact(structure.sizes)
    if share < _MUCH:
        return ""
    return (
        f". {share:.0%} of its parameters are in tables of tokens: cofiprune.prune_vocabulary makes them smaller, first"
    )
