"""What is lost by keeping only so many units of each group: what sizes of whole groups are chosen by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cofiprune.structure import Block, Structure

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Losses:
    """Losses by the number of units that stay; groups that are not named stay whole."""

    by_count: Mapping[str, Array]
    """By group name, [1 + units]: what is lost with 0, 1, ... units left; 0 with all of them, infinite where so few may
    not be left."""
    gates: Mapping[str, float] = field(default_factory=dict)
    """What is lost at least with the whole of a block, by its gate; blocks that are not named go only where all of
    their units may."""

    @classmethod
    def of(cls, structure: Structure, worth: Mapping[str, Tensor]) -> Losses:
        """Losses where each unit has a worth of its own, and the least go first.

        :param worth: by group name, [units], at least 0.
        """
        curves: dict[str, Array] = {}
        for name, values in worth.items():
            ascending = np.sort(values.detach().double().cpu().numpy())
            curves[name] = np.concatenate([[0.0], ascending.cumsum()])[::-1]
        return cls(
            curves, {block.gate: float(worth[block.gate][0]) for block in structure.blocks if block.gate in worth}
        )

    def block(self, block: Block) -> float:
        """What is lost with a whole block."""
        inner = float(self.by_count[block.inner][0]) if block.inner in self.by_count else 0.0  # type: ignore[index]
        return max(inner, self.gates.get(block.gate, 0.0))
