"""A latency table as a cost: nanoseconds of a model of any shape, exact for a plan, differentiable for gates.

Shapes: G groups, b blocks that one surface stands for, w widths, u measured numbers of units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cofiprune.latency.table import LatencyTable, Surface
from cofiprune.structure import Block, Structure

Curve = NDArray[np.float64]


@dataclass(frozen=True)
class LatencyCost:
    """Nanoseconds of a forward pass as a function of the sizes of a model's groups."""

    table: LatencyTable
    structure: Structure
    """Of the dense model, or of a smaller one."""

    @property
    def linear(self) -> bool:
        """Whether each further unit costs the same: a block has a cost of its own, and steps differ."""
        return False

    @cached_property
    def _scale(self) -> float:
        """What the blocks' times add up to is not quite what a model takes; of the dense one both are known."""
        table = self.table
        whole = table.fixed[-1]
        for surface in table.stands_for.values():
            whole += table.surfaces[surface].times[-1][-1]
        return table.dense / whole

    def exact(self, kept: Mapping[str, int]) -> int:
        """Evaluate at whole numbers of kept units."""
        width = self._width(kept)
        total = self._fixed(width)
        for block in self.structure.blocks:
            if kept[block.gate]:
                total += float(self._curve(block, width)[self._units(block, kept)])
        return round(total)

    def along(self, kept: Mapping[str, int], name: str, counts: Sequence[int]) -> list[int]:
        """Evaluate with one group at each of several sizes, the others as in `kept`."""
        block = next((each for each in self.structure.blocks if each.inner == name), None)
        if block is None or not kept[block.gate]:
            return [self.exact({**kept, name: count}) for count in counts]
        rest = self.exact({**kept, block.gate: 0})
        curve = self._curve(block, self._width(kept))
        return [round(rest + float(curve[count])) for count in counts]

    def expected(self, sizes: Tensor) -> Tensor:
        """Evaluate at expected sizes, [G]: a block's time at its expected units, by the chance that it is there."""
        position = {name: index for index, name in enumerate(self.structure)}
        widths = sizes.new_tensor(self.table.conditions.widths)
        width = sizes[position["hidden"]] if "hidden" in position else widths[-1]
        row, weight = _between(widths, width.reshape(1))
        fixed = sizes.new_tensor(self.table.fixed)
        total = _mixed(fixed[row], fixed[(row + 1).clamp(max=len(fixed) - 1)], weight).sum()
        for blocks, surface in self._alike:
            gates = sizes[self._index(sizes, [position[block.gate] for block in blocks])]
            units = sizes.new_tensor([0, *surface.units])
            if blocks[0].inner in position:
                inner = sizes[self._index(sizes, [position[block.inner or ""] for block in blocks])]
            else:
                inner = units[-1].expand(len(blocks))
            times = sizes.new_tensor(surface.times)
            times = torch.cat([times.new_zeros(len(times), 1), times], dim=1)  # [w, 1 + u]
            curve = _mixed(times[row[0]], times[(row[0] + 1).clamp(max=len(times) - 1)], weight[0])
            column, part = _between(units, inner)
            total = total + (gates * _mixed(curve[column], curve[(column + 1).clamp(max=len(units) - 1)], part)).sum()
        return total * self._scale

    @cached_property
    def _alike(self) -> list[tuple[list[Block], Surface]]:
        """Blocks that have groups still, by the surface that stands for them."""
        found: dict[str, list[Block]] = {}
        for block in self.structure.blocks:
            if block.gate in self.structure:
                found.setdefault(self.table.stands_for[block.gate], []).append(block)
        return [(blocks, self.table.surfaces[name]) for name, blocks in found.items()]

    def _index(self, like: Tensor, positions: list[int]) -> Tensor:
        return torch.tensor(positions, device=like.device)

    def _width(self, kept: Mapping[str, int]) -> int:
        return kept["hidden"] if "hidden" in self.structure else self.table.conditions.widths[-1]

    def _fixed(self, width: int) -> float:
        return float(np.interp(width, self.table.conditions.widths, self.table.fixed)) * self._scale

    def _units(self, block: Block, kept: Mapping[str, int]) -> int:
        if block.inner is None or block.inner not in self.structure:
            return self.table.surfaces[self.table.stands_for[block.gate]].units[-1]
        return kept[block.inner]

    def _curve(self, block: Block, width: int) -> Curve:
        """Nanoseconds of a block by its number of units: [1 + units]; 0 for none."""
        name = self.table.stands_for[block.gate]
        cache: dict[tuple[str, int], Curve] = self.__dict__.setdefault("_curves", {})
        if (name, width) not in cache:
            surface = self.table.surfaces[name]
            rows = np.asarray(surface.times)
            at_width = [np.interp(width, self.table.conditions.widths, column) for column in rows.T]
            counts = np.arange(1, surface.units[-1] + 1)
            curve = np.interp(counts, surface.units, at_width)
            cache[name, width] = np.concatenate([[0.0], curve]) * self._scale
        return cache[name, width]


def _between(knots: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Where values lie among ascending knots: the knot below, and the share of the way to the next, in [0, 1]."""
    if len(knots) == 1:
        return torch.zeros_like(values, dtype=torch.long), torch.zeros_like(values)
    below = (torch.searchsorted(knots, values.detach().contiguous(), right=True) - 1).clamp(0, len(knots) - 2)
    share = (values - knots[below]) / (knots[below + 1] - knots[below])
    return below, share.clamp(0, 1)


def _mixed(low: Tensor, high: Tensor, share: Tensor) -> Tensor:
    return low + share * (high - low)
