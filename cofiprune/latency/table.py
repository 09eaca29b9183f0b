"""The latency table, measured times and the conditions that they hold for; and its reading as a cost.

A model's time is modelled as the sum of its blocks' times and a fixed part: embeddings, head, the loop over the layers.
A block's time is a surface over its inner units and the hidden width, measured on a grid and linear in between. So a
model of any shape has a time, exact for a plan, differentiable for gates.

Shapes: G groups, b blocks that share a surface, w widths, u measured numbers of units.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cofiprune.errors import TargetError
from cofiprune.files import check_format, read_sealed, validated, write_sealed
from cofiprune.structure import Block, Structure

FORMAT_VERSION = 2
"""1 had no checksum."""


@dataclass(frozen=True)
class Conditions:
    """The conditions of a measurement; under any others it has to be repeated."""

    device: str
    threads: int
    """CPU threads of torch; 0 on other devices."""
    torch: str
    dtype: str
    batch_size: int
    seq_len: int
    """As requested: tokens, or frames of audio; images have a fixed length."""
    model: str
    """The model's class."""
    sizes: Mapping[str, Any]
    """Sizes of its groups, one entry per kind, and the number of elements that depend on no group."""
    widths: tuple[int, ...]
    """Measured hidden sizes, ascending."""
    engine: str = "torch"
    """What the forward passes are run by."""
    engine_version: str = ""
    """Empty for torch, whose version stands above."""


@dataclass(frozen=True)
class Surface:
    """Nanoseconds of one kind of block by hidden width and inner units."""

    units: tuple[int, ...]
    """Measured numbers of inner units, ascending, from 1 to all."""
    times: tuple[tuple[float, ...], ...]
    """[widths, units]; does not decrease along either."""


@dataclass(frozen=True)
class LatencyTable:
    """Times of the blocks of one model on one device."""

    conditions: Conditions
    dense: float
    """Nanoseconds of the dense model."""
    fixed: tuple[float, ...]
    """Nanoseconds without any block, by hidden width."""
    surfaces: Mapping[str, Surface]
    """By the gate of the first block of each shape."""
    stands_for: Mapping[str, str]
    """For the gate of every block, the gate in `surfaces`."""

    def save(self, path: Path) -> None:
        """Write the table as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(path, {"format_version": FORMAT_VERSION, **asdict(self)}, indent=1)

    @classmethod
    def load(cls, path: Path, conditions: Conditions) -> Self:
        """Read a table.

        :raises TargetError: when the file is none that can be read, or was measured under other conditions.
        """
        problem = f"{path} is no latency table that can be read; delete it"
        entries = read_sealed(path, TargetError, problem)
        check_format(entries.pop("format_version", None), FORMAT_VERSION, TargetError, problem)
        table = validated(cls, entries, TargetError, problem)
        for field in fields(Conditions):
            ours, theirs = getattr(conditions, field.name), getattr(table.conditions, field.name)
            if json.dumps(ours, sort_keys=True) != json.dumps(theirs, sort_keys=True):
                raise TargetError(
                    f"the latency table in {path} was not measured for this: {field.name} is {theirs} there and {ours} "
                    "here. Delete it to measure anew, or name another file in latency_cache"
                )
        return table


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
    def _curves(self) -> dict[tuple[str, int], NDArray[np.float64]]:
        return {}

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
                total += float(self._curve(block, width)[kept.get(block.inner or "", -1)])  # without units, all
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
            found.setdefault(self.table.stands_for[block.gate], []).append(block)
        return [(blocks, self.table.surfaces[name]) for name, blocks in found.items()]

    def _width(self, kept: Mapping[str, int]) -> int:
        return kept["hidden"] if "hidden" in self.structure else self.table.conditions.widths[-1]

    def _curve(self, block: Block, width: int) -> NDArray[np.float64]:
        """Nanoseconds of a block by its number of units: [1 + units]; 0 for none."""
        name = self.table.stands_for[block.gate]
        if (name, width) not in self._curves:
            surface = self.table.surfaces[name]
            at_width = [np.interp(width, self.table.conditions.widths, times) for times in np.transpose(surface.times)]
            curve = np.interp(np.arange(surface.units[-1] + 1), (0, *surface.units), (0, *at_width))
            self._curves[name, width] = curve * self._scale
        return self._curves[name, width]


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
