"""A latency table as a cost: nanoseconds of a model of any shape, exact for a plan, differentiable for gates.

Shapes: G groups, b blocks that share a surface, w widths, u measured numbers of units.
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
        """False: a block has a cost of its own, and times rise in steps."""
        return False

    @cached_property
    def _scale(self) -> float:
        """Measured time of the dense model over the sum of the times of its parts, which is not quite the same."""
        table = self.table
        return table.dense / (
            table.fixed[-1] + sum(table.surfaces[surface].times[-1][-1] for surface in table.stands_for.values())
        )

    def exact(self, kept: Mapping[str, int]) -> int:
        """Evaluate at whole numbers of kept units."""
        width = self._width(kept)
        total = float(np.interp(width, self.table.conditions.widths, self.table.fixed)) * self._scale
        for block in self.structure.blocks:
            if kept[block.gate]:
                total += float(self._curve(block, width)[self._units(block, kept)])
        return round(total)

    def along(self, kept: Mapping[str, int], name: str, counts: Sequence[int]) -> list[int]:
        """Evaluate with one group at each of several sizes, the others as in `kept`."""
        block = next((each for each in self.structure.blocks if each.inner == name), None)
        if block is None or not kept[block.gate]:
            return [self.exact({**kept, name: count}) for count in counts]
        others = self.exact({**kept, block.gate: 0})
        curve = self._curve(block, self._width(kept))
        return [round(others + float(curve[count])) for count in counts]

    def expected(self, sizes: Tensor) -> Tensor:
        """Evaluate at expected sizes, [G]: a block's time at its expected units, times the probability of its gate."""
        position = {name: index for index, name in enumerate(self.structure)}
        widths = sizes.new_tensor(self.table.conditions.widths)
        width = sizes[position["hidden"]] if "hidden" in position else widths[-1]
        row, weight = _between(widths, width.reshape(1))
        total = _interpolated(sizes.new_tensor(self.table.fixed), row, weight).sum()
        for blocks, surface in self._by_surface:
            gates = sizes[torch.tensor([position[block.gate] for block in blocks], device=sizes.device)]
            units = sizes.new_tensor([0, *surface.units])
            if blocks[0].inner in position:
                inner = sizes[torch.tensor([position[block.inner or ""] for block in blocks], device=sizes.device)]
            else:
                inner = units[-1].expand(len(blocks))
            times = sizes.new_tensor(surface.times)
            times = torch.cat([times.new_zeros(len(times), 1), times], dim=1)  # [w, 1 + u]
            curve = _interpolated(times, row[0], weight[0])
            total = total + (gates * _interpolated(curve, *_between(units, inner))).sum()
        return total * self._scale

    @cached_property
    def _by_surface(self) -> list[tuple[list[Block], Surface]]:
        """The blocks that the model still has, by the surface of their times."""
        found: dict[str, list[Block]] = {}
        for block in self.structure.blocks:
            if block.gate in self.structure:
                found.setdefault(self.table.stands_for[block.gate], []).append(block)
        return [(blocks, self.table.surfaces[name]) for name, blocks in found.items()]

    def _width(self, kept: Mapping[str, int]) -> int:
        return kept["hidden"] if "hidden" in self.structure else self.table.conditions.widths[-1]

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
            at_width = [
                np.interp(width, self.table.conditions.widths, column) for column in zip(*surface.times, strict=True)
            ]
            curve = np.interp(np.arange(1, surface.units[-1] + 1), surface.units, at_width)
            cache[name, width] = np.concatenate([[0.0], curve]) * self._scale
        return cache[name, width]


def _between(knots: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ascending knot below each value, and the share of the way to the next one, in [0, 1]."""
    if len(knots) == 1:
        return torch.zeros_like(values, dtype=torch.long), torch.zeros_like(values)
    below = (torch.searchsorted(knots, values.detach().contiguous(), right=True) - 1).clamp(0, len(knots) - 2)
    share = (values - knots[below]) / (knots[below + 1] - knots[below])
    return below, share.clamp(0, 1)


def _interpolated(table: Tensor, below: Tensor, share: Tensor) -> Tensor:
    """Values of a table [knots, ...] between its knots, see `_between`."""
    low = table[below]
    return low + share * (table[(below + 1).clamp(max=len(table) - 1)] - low)
