"""How many units each block keeps: a level per block, chosen by dynamic programming over the discretised cost.

Where a block has a cost of its own, units do not cost the same, or sizes have to be round, no threshold on single units
gives the best plan. Here a block may take any of several sizes, or go; the combination that fits the target and loses
the least is found exactly, up to the discretisation (Frantar and Alistarh, 2023, arXiv:2302.04089, choose this way for
measured time). Hidden dimensions are one choice for all blocks, tried one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cofiprune.accounting import Cost
from cofiprune.errors import TargetError
from cofiprune.selection.curves import Array, Losses
from cofiprune.selection.target import Target
from cofiprune.structure import Block, Structure

_RESOLUTION = 10_000
"""Steps that the cost of the whole is cut into."""
_LEVELS = 48
_HIDDEN_LEVELS = 24


def allocate(structure: Structure, lost: Losses, target: Target, *, may_empty: bool = True) -> dict[str, int]:
    """Return how many units of each group stay.

    :param may_empty: whether blocks may go whose gates have no loss of their own, by losing all of their units.
    :raises TargetError: when no combination comes near the target.
    """
    cost = target.cost(structure)
    step = cost.exact(structure.sizes) / _RESOLUTION
    slack = target.tie_width * target.total
    candidates: list[tuple[float, float, dict[str, int]]] = []
    for hidden in _hidden_levels(structure, lost, target.round_to):
        full = {**structure.sizes, **({"hidden": hidden} if "hidden" in structure else {})}
        tables = [_options(block, lost, cost, full, target.round_to, may_empty) for block in structure.blocks]
        wanted = cost.exact(full) - target.budget
        off, loss, chosen = combination([(table.saved, table.loss) for table in tables], wanted, step, slack)
        loss += float(lost.by_count["hidden"][hidden]) if "hidden" in lost.by_count else 0.0
        candidates.append((off, loss, {**full, **_sizes(tables, chosen)}))
    sizes = _fitted(structure, lost, target, min(candidates, key=lambda each: each[:2])[2])
    if abs(cost.exact(sizes) - target.budget) > target.tolerance * target.total:
        raise TargetError(f"{target} cannot be met by any sizes of the blocks; the nearest: "
                          f"{target.text(cost.exact(sizes))}")  # fmt: skip
    return sizes


@dataclass(frozen=True)
class _Options:
    """The levels of one block: what each saves and loses, the first being the block as it is."""

    block: Block
    saved: Array
    loss: Array
    units: tuple[int, ...]
    """Inner units kept; 0 for the block gone."""


def _options(block: Block, lost: Losses, cost: Cost, full: Mapping[str, int], step: int, may_empty: bool) -> _Options:
    whole = cost.exact(full)
    size = full[block.inner] if block.inner is not None else 1
    units, saved, loss = [size], [0.0], [0.0]
    if block.inner in lost.by_count and full[block.gate]:
        assert block.inner is not None
        counts = _levels(size, step if block.inner.endswith(".intermediate") else 1)
        for count, left in zip(counts, cost.along(full, block.inner, counts), strict=True):
            units.append(count)
            saved.append(whole - left)
            loss.append(float(lost.by_count[block.inner][count]))
    if block.gate in lost.gates or (may_empty and block.inner in lost.by_count):
        units.append(0)
        saved.append(whole - cost.exact({**full, block.gate: 0}))
        loss.append(lost.block(block))
    return _Options(block, np.asarray(saved), np.asarray(loss), tuple(units))


def combination(
    tables: Sequence[tuple[Array, Array]], wanted: float, step: float, slack: float
) -> tuple[float, float, list[int]]:
    """The levels of the blocks that save what is wanted, within a slack, and lose the least.

    :param tables: of each block, what its levels save and lose: [levels] each.
    :param wanted: cost to save.
    :param step: what the cost is cut into.
    :return: how far it is from the slack (0 inside; otherwise the nearest is returned), the loss, and the levels.
    """
    length = 1 + sum(round(float(saved.max()) / step) for saved, _ in tables)
    best = np.full(length, np.inf)  # loss by what has been saved
    best[0] = 0.0
    choices: list[NDArray[np.int64]] = []
    for saved, losses in tables:
        rows = np.full((len(saved), length), np.inf)
        for row, moved, loss in zip(rows, np.rint(saved / step).astype(int), losses, strict=True):
            row[moved:] = best[: length - moved] + loss
        choices.append(rows.argmin(axis=0))
        best = rows.min(axis=0)
    off = np.maximum(np.abs(np.arange(length) * step - wanted) - slack, 0.0)
    off[~np.isfinite(best)] = np.inf
    position = int(np.where(off == off.min(), best, np.inf).argmin())
    distance, loss = float(off[position]), float(best[position])
    chosen: list[int] = []
    for (saved, _), choice in zip(reversed(tables), reversed(choices), strict=True):
        chosen.append(int(choice[position]))
        position -= round(float(saved[chosen[-1]]) / step)
    return distance, loss, chosen[::-1]


def _sizes(tables: list[_Options], chosen: list[int]) -> dict[str, int]:
    """Sizes of the groups of the blocks at the levels chosen."""
    sizes: dict[str, int] = {}
    for table, level in zip(tables, chosen, strict=True):
        block, units = table.block, table.units[level]
        if not units:
            sizes[block.gate] = 0
        if block.inner is not None:
            sizes[block.inner] = units
    return sizes


def _fitted(structure: Structure, lost: Losses, target: Target, sizes: dict[str, int]) -> dict[str, int]:
    """Take or give units of single groups, the least or most worth for what they cost, while that comes nearer."""
    cost, step = target.cost(structure), target.round_to
    inner = [
        (block.inner, step if block.inner.endswith(".intermediate") else 1)
        for block in structure.blocks
        if block.inner in lost.by_count and block.inner is not None and sizes[block.gate]
    ]
    if "hidden" in lost.by_count:
        inner.append(("hidden", step))
    here = cost.exact(sizes)
    for direction in (-1, 1, -1):
        while (here - target.budget) * direction < 0:
            moves = []
            for name, units in inner:
                count = sizes[name] + direction * units
                if units <= count <= structure[name].size and np.isfinite(lost.by_count[name][count]):
                    change = abs(cost.exact({**sizes, name: count}) - here)
                    worth = abs(lost.by_count[name][count] - lost.by_count[name][sizes[name]])
                    if 0 < change <= 2 * abs(here - target.budget):
                        moves.append((-direction * worth / change, name, count))
            if not moves:
                break
            _, name, count = min(moves)
            sizes[name] = count
            here = cost.exact(sizes)
    return sizes


def _levels(size: int, step: int) -> list[int]:
    """About so many sizes below the whole one, multiples of a step."""
    spread = {max(step, step * round(level * size / _LEVELS / step)) for level in range(1, _LEVELS)}
    return sorted({step, *spread} - {size} if size > step else set())


def _hidden_levels(structure: Structure, lost: Losses, step: int) -> list[int]:
    if "hidden" not in structure:
        return [0]
    size = structure["hidden"].size
    if "hidden" not in lost.by_count:
        return [size]
    spread = {max(step, step * round(level * size / _HIDDEN_LEVELS / step)) for level in range(1, _HIDDEN_LEVELS)}
    allowed = {count for count in spread if count <= size and np.isfinite(lost.by_count["hidden"][count])}
    return sorted({size, *allowed}, reverse=True)
