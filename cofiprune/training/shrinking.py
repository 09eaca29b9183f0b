"""Compaction while gates learn: units whose gates have long been shut are taken out, and a smaller model learns on.

What the smaller model computes is what the larger one computes under the same values of the gates that are left, with
the others shut. Weights, their optimiser's moments and the gates are cut to what is left; the multipliers, the target
and its course stay as they were, because costs are counted from where the phase began.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cofiprune.adapter import structure as structure_of
from cofiprune.compaction import restore
from cofiprune.compaction.slicing import sliced
from cofiprune.gates import Gates, gate_cut
from cofiprune.masking import attach
from cofiprune.masks import MaskRegistry
from cofiprune.plan import Plan
from cofiprune.selection.target import Target
from cofiprune.training.gating import Gating
from cofiprune.training.projection import cut_projection
from cofiprune.training.schedule import Schedule
from cofiprune.training.state import RunState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOOKS = 20
"""So often are the gates looked at while they learn."""
_PATIENCE = 3
"""Looks in a row at which a gate has to be shut."""
_LEAST = 0.05
"""Share of what the model costs that has to go at least: setting up a smaller one takes a moment."""

Cut = Callable[[Tensor], Tensor]
Pair = tuple[Tensor, Tensor, Cut]
"""A parameter, the one that takes its place, and what cuts a tensor of the first one's shape to the second's."""


class Shut(nn.Module):
    """For how many looks in a row each gate has been shut; a module, so that checkpoints hold it."""

    looks: Tensor

    def __init__(self, gates: Gates) -> None:
        super().__init__()
        self.register_buffer("looks", torch.zeros_like(gates.log_alpha, dtype=torch.long))

    def look(self, gates: Gates) -> None:
        """Count one more look."""
        values = torch.cat(list(gates.deterministic().values()))
        self.looks.copy_(torch.where(values == 0, self.looks + 1, 0))

    def plan(self, gates: Gates, masks: MaskRegistry, target: Target) -> Plan | None:
        """What is kept when the units that have been shut for long enough go.

        :param masks: of the model that learns.
        :return: None where that is too little, or more than the target asks for: gates may open again until they
            are decided on.
        """
        open_ = (self.looks < _PATIENCE).float().cpu()
        sizes = [group.size for group in gates.groups]
        names = [group.name for group in gates.groups]
        values = dict(zip(names, torch.split(open_, sizes), strict=True))
        if "hidden" in values and not bool(values["hidden"].any()):
            return None
        plan = Plan.from_values(masks.structure, values)
        cost = target.cost(masks.structure)
        before, after = cost.exact(masks.structure.sizes), cost.exact(plan.kept)
        return plan if target.budget <= after <= (1 - _LEAST) * before else None

    def cut(self, gates: Gates, plan: Plan, smaller: Gates) -> Shut:
        """The same for the gates of what a plan leaves."""
        found = Shut(smaller)
        found.looks.copy_(gate_cut(gates, plan.keep)(self.looks))
        return found


@dataclass
class Learner:
    """What learns in the pruning phase, and what has become of the model that it began with."""

    model: PreTrainedModel
    """The model itself, or what is left of it; it runs under `gating.masks`."""
    gating: Gating
    shut: Shut
    projection: nn.Linear | None
    state: RunState
    plan: Plan | None = None
    """What is left of the model of the beginning; None for all."""

    def shrink(self, plan: Plan, small: PreTrainedModel, with_optimizer: Callable[[Learner], RunState]) -> None:
        """Go on with what a plan leaves of the model; nothing of the model itself is changed.

        :param plan: hard, for the model that learns now.
        :param small: what it leaves.
        :param with_optimizer: returns a new state for a learner, whose optimiser has its parameters.
        """
        model, gating, projection, state = self.model, self.gating, self.projection, self.state
        self.model, self.gating = small, gating.on(attach(small), plan)
        self.shut = self.shut.cut(gating.gates, plan, self.gating.gates)
        if projection is not None and "hidden" in plan.keep:
            self.projection = cut_projection(projection, plan.keep["hidden"])
        self.plan = plan if self.plan is None else self.plan.then(plan)
        self.state = with_optimizer(self)
        transplant(
            state.optimizer,
            self.state.optimizer,
            [
                *weight_pairs(model, small, plan),
                *projection_pairs(projection, self.projection, plan),
                (gating.gates.log_alpha, self.gating.gates.log_alpha, gate_cut(gating.gates, plan.keep)),
                *((each, each, _copied) for each in gating.constraint.parameters()),
            ],
        )
        self.state.take_over(state)
        self.state.extra = {**state.extra, "shrunk": self.plan.to_dict()}

    def write_back(self, model: PreTrainedModel, masks: MaskRegistry) -> None:
        """Bring what was learned into the model of the beginning, and the present masks onto it.

        :param masks: of that model.
        """
        if self.plan is not None:
            restore(model, self.model, self.plan)
            masks.set_plan(self.plan.then(Plan.from_masks(self.gating.masks)))


def looks(schedule: Schedule) -> list[int]:
    """Steps of a phase after which the gates are looked at; none in runs too short for it."""
    if schedule.gated < _LOOKS:
        return []
    return [schedule.before + round(index * schedule.gated / _LOOKS) for index in range(1, _LOOKS)]


def weight_pairs(model: PreTrainedModel, small: PreTrainedModel, plan: Plan) -> Iterable[Pair]:
    """The parameters of a model and those of what a plan leaves of it; none of what is gone."""
    specs = {spec.name: spec for spec in structure_of(model).parameters}
    left = dict(small.named_parameters())
    for name, parameter in model.named_parameters():
        if name in left:
            spec = specs.get(name)
            cut = _copied if spec is None else partial(sliced, spec=spec, plan=plan)
            yield parameter, left[name], cut


def projection_pairs(projection: nn.Linear | None, small: nn.Linear | None, plan: Plan) -> Iterable[Pair]:
    """The same for the linear map of the layers' distillation."""
    if projection is None or small is None:
        return
    kept = list(plan.keep["hidden"]) if "hidden" in plan.keep else slice(None)
    yield projection.weight, small.weight, lambda value: value[:, kept].clone()
    yield projection.bias, small.bias, _copied


def transplant(old: Optimizer, new: Optimizer, pairs: Iterable[Pair]) -> None:
    """Give the parameters of a new optimiser the moments that those in their places had, cut to size."""
    for before, after, cut in pairs:
        if before in old.state:
            new.state[after] = {
                name: cut(value) if isinstance(value, Tensor) and value.shape == before.shape and value.dim() else value
                for name, value in old.state[before].items()
            }


def _copied(value: Tensor) -> Tensor:
    return value.clone()
