"""Loss curves of groups, and what every size of a block saves and loses.

A curve says what is lost by removing ever more units of one group. A cost is a sum over the blocks, each of which
depends on its own inner units and on the number of hidden dimensions. So with a number of hidden dimensions given, a
table for each block holds all that a choice of sizes has to know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cofiprune.accounting import Cost
from cofiprune.structure import Block, Structure, UnitKind

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LossCurve:
    """Loss of a model as the units of a group are removed one after the other."""

    order: tuple[int, ...]
    """The units, the first to go first."""
    loss: tuple[float, ...]
    """By how much the loss has risen when each has gone; never falls, infinite where so many may not go."""

    @classmethod
    def of(cls, importance: Tensor, ranks: Tensor | None = None) -> LossCurve:
        """Make the curve of units that are lost independently.

        :param importance: [units], at least 0: what is lost with each.
        :param ranks: [units]: the lowest goes first; by default the least important.
        """
        ranks = importance if ranks is None else ranks
        order = ranks.argsort(descending=True, stable=True).flip(0).cpu()
        return cls(tuple(order.tolist()), tuple(importance.detach().double().cpu()[order].cumsum(0).tolist()))

    @property
    def by_size(self) -> Array:
        """[1 + units]: what is lost with 0, 1, ... units left."""
        return np.array([0.0, *self.loss])[::-1]

    def keeping(self, units: int) -> LossCurve:
        """Return the curve of a group of which so many units must stay."""
        free = max(len(self.order) - units, 0)
        return replace(self, loss=(*self.loss[:free], *[np.inf] * (len(self.order) - free)))


Curves = Mapping[str, LossCurve]
"""By group name. Groups without a curve stay whole; a block goes where its gate or its inner units have one."""


def units_kept(structure: Structure, curves: Curves, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Return which units stay when groups are cut to some sizes: 1.0 or 0.0 for each, [units] by group name."""
    kept = {}
    for name, curve in curves.items():
        kept[name] = torch.ones(structure[name].size, dtype=torch.float64)
        kept[name][list(curve.order[: structure[name].size - sizes[name]])] = 0.0
    return kept


@dataclass(frozen=True)
class BlockTable:
    """Cost saved and loss of a block by its number of inner units, at some number of hidden dimensions."""

    block: Block
    saved: Array
    """[1 + units] of the cost; with no units the block is gone."""
    loss: Array
    """[1 + units]; infinite for sizes that are not allowed."""

    @cached_property
    def allowed(self) -> NDArray[np.int64]:
        """The sizes that are allowed, ascending."""
        return np.flatnonzero(np.isfinite(self.loss))


def spread(values: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Choose about so many of some values, evenly spaced, the first two and the last among them."""
    if len(values) <= most:
        return values
    places = np.rint(np.linspace(0, len(values) - 1, most)).astype(int)
    chosen: NDArray[np.int64] = values[np.union1d([0, 1], places)]
    return chosen


def block_tables(structure: Structure, curves: Curves, cost: Cost, hidden: int, step: int = 1) -> list[BlockTable]:
    """Return the tables of all blocks.

    :param hidden: hidden dimensions that are left.
    :param step: feed-forward dimensions are kept in multiples of it, or all of them.
    """
    sizes = sizes_of(structure, hidden)
    whole = cost.exact(sizes)
    tables = []
    for block in structure.blocks:
        inner = block.inner  # None where the units of a block are refused
        units = 1 if inner is None else sizes[inner]
        left = [whole] if inner is None else cost.along(sizes, inner, range(1, units + 1))
        saved = whole - np.array([cost.exact({**sizes, block.gate: 0}), *left], dtype=np.float64)
        loss = np.full(units + 1, np.inf)
        if inner is not None and inner in curves:
            loss = curves[inner].by_size
            if structure[inner].kind == "intermediate":
                loss = np.where(np.arange(units + 1) % step == 0, loss, np.inf)
        loss[0] = _lost_with(block, curves)
        loss[saved < 0] = np.inf  # measured times may rise a little where units go
        saved[units], loss[units] = 0.0, 0.0
        tables.append(BlockTable(block, saved, loss))
    return tables


def _lost_with(block: Block, curves: Curves) -> float:
    """Return the loss of removing a whole block; infinite where it may not go."""
    losses = [curves[name].loss[-1] for name in (block.gate, block.inner) if name is not None and name in curves]
    return max(losses, default=np.inf)


def hidden_sizes(structure: Structure, curves: Curves, step: int = 1) -> NDArray[np.int64]:
    """Return the numbers of hidden dimensions that are allowed, ascending: multiples of a step, or all of them."""
    size = structure["hidden"].size if "hidden" in structure else 0
    if "hidden" not in curves:
        return np.array([size])
    allowed = np.isfinite(curves["hidden"].by_size) & (np.arange(size + 1) % step == 0)
    allowed[0], allowed[size] = False, True
    return np.flatnonzero(allowed)


def uncritical(structure: Structure, units: str | Sequence[UnitKind] | None) -> dict[str, LossCurve]:
    """Return curves of the groups of some unit kinds: every unit may go and counts the same."""
    return {group.name: LossCurve.of(torch.ones(group.size)) for group in structure.select(units)}


def sizes_of(structure: Structure, hidden: int, units: Sequence[int] | None = None) -> dict[str, int]:
    """Return the sizes of all groups with so many hidden dimensions.

    :param units: inner units of every block, 0 for one that goes; None for blocks as they are.
    """
    sizes = {**structure.sizes, **({"hidden": hidden} if "hidden" in structure else {})}
    for block, count in zip(structure.blocks, units or (), strict=units is not None):
        sizes[block.gate] = min(count, 1)
        if block.inner is not None:
            sizes[block.inner] = count
    return sizes
