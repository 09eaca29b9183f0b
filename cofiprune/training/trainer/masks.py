"""Masks of what a first plan has left, on the model that is still whole.

`prune` learns on the smaller model that one shot leaves. Whoever trains the whole one, as a Trainer does, learns the
same gates through these: they have the smaller model's groups and units, and set the whole model's masks, in which
everything else stays at zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cofiprune.masks import MaskRegistry
from cofiprune.plan import Plan
from cofiprune.structure import Structure


class RemainingMasks(MaskRegistry):
    """The masks of a smaller model, [kept units] by group name, that act on the whole one."""

    def __init__(self, whole: MaskRegistry, plan: Plan, left: Structure) -> None:
        """Take out of the whole model what a plan removes; the rest is all ones.

        :param whole: attached to the model, all groups.
        :param plan: what is kept of it.
        :param left: the structure of the model that the plan leaves.
        """
        values = next(iter(whole.values()))
        super().__init__(left, list(left), device=values.device, dtype=values.dtype)
        self.whole = whole
        self.kept = {name: torch.tensor(plan.keep[name], device=values.device) for name in left}
        self.on_detach = whole.on_detach
        whole.set_plan(plan.hard)

    def __setitem__(self, name: str, value: Tensor | Sequence[float]) -> None:
        super().__setitem__(name, value)
        self.whole[name] = self._placed(name, self[name])

    def bind(self, values: Mapping[str, Tensor]) -> None:
        self.whole.bind({name: self._placed(name, value) for name, value in values.items()})

    def unbind(self) -> None:
        self.whole.unbind()

    def alive(self, gate: str) -> bool | Tensor:
        return self.whole.alive(gate)

    def _placed(self, name: str, value: Tensor) -> Tensor:
        """[units] of the whole model, from [kept units]; differentiable."""
        return value.new_zeros(self.whole.structure[name].size).index_copy(0, self.kept[name], value)
