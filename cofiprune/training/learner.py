"""The gates of a run: samples that a step runs under, the pressure on them, and the decision that they come to.

A loop, ours or a Trainer's, steps it: `bind` before a forward pass, `penalty` added to the loss, `groups` in the
optimiser, `gates.clamp_` after its step, `settle` for an evaluation, and `decide` at the end.

Units whose gates have long been closed may go before that (`long_closed`, `on`): a smaller model then learns on. What
it computes is what the larger one computes under the same sample of the gates that are left, with the others closed.
The multipliers and the schedule of the target stay as they were, because costs are counted from where the phase began.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn
from torch.optim import Optimizer

from cofiprune.compaction.slicing import sliced
from cofiprune.constraint import Constraint, target_at
from cofiprune.data.batches import Batches
from cofiprune.gates import COFI_LIMIT, Gates, gate_cut
from cofiprune.masks import MaskRegistry
from cofiprune.oneshot.sensitivity import measured_importance
from cofiprune.plan import Plan
from cofiprune.selection.by_score import select
from cofiprune.selection.target import Target
from cofiprune.structure import Structure
from cofiprune.training.resolved import ResolvedSettings, Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TIE_BREAK = 1e-3
_CHECKS = 20
"""Number of times that closed gates are checked while they learn."""
_PATIENCE = 3
"""Checks in a row at which a gate has to be closed before its unit goes."""
_LEAST = 0.05
"""Share of what the model costs that has to go at least: setting up a smaller one takes a moment."""

Cut = Callable[[Tensor], Tensor]
"""Cuts a tensor of a parameter's shape to that of what is left of it."""
Modules = Mapping[str, nn.Module]


class Origin(NamedTuple):
    """Where a phase began; the constraint counts from there, also on the smaller models that follow."""

    cost: float
    kept_share: float
    """Of the dense model's cost."""
    share_to_remove: float


class GateLearner(nn.Module):
    """Gates over the units of a model with the constraint on what they keep; its state dict is all that it learns."""

    closed: Tensor
    """[U] at how many checks in a row each gate has been closed."""

    def __init__(
        self,
        masks: MaskRegistry,
        target: Target,
        settings: ResolvedSettings,
        schedule: Schedule,
        *,
        layers_left: float = 1.0,
        origin: Sequence[float] | None = None,
    ) -> None:
        """Set up gates that are open, on the device of the masks.

        :param masks: attached to the model that learns.
        :param target: of the dense model; shares of its cost are what the constraint compares.
        :param layers_left: parameters in the layers of the masks' model by those of the dense model, in (0, 1].
        :param origin: where the phase began; None for here.
        """
        super().__init__()
        structure = masks.structure
        device = next(iter(masks.values())).device
        groups = structure.present(settings.units)
        self.masks = masks
        self.target = target
        self.settings = settings
        self.schedule = schedule
        self.layers_left = layers_left
        self.gates = Gates(groups, temperature=settings.gate_temperature, stretch=settings.gate_stretch).to(device)
        self.constraint = Constraint().to(device)
        self.register_buffer("closed", torch.zeros_like(self.gates.log_alpha, dtype=torch.long))
        self.cost = target.cost(structure)
        here = (self.cost.exact(structure.sizes), target.kept_share(structure), target.removed(structure))
        self.origin = Origin(*(here if origin is None else origin))
        self.expected: Tensor | None = None
        order = {name: index for index, name in enumerate(structure)}
        self.positions = torch.tensor([order[group.name] for group in groups], device=device)
        self.sizes = torch.tensor(list(structure.sizes.values()), dtype=torch.float32, device=device)
        applied = [index for index, times in enumerate(structure.applications) for _ in range(times)]
        self.applied = torch.tensor(applied or range(len(structure.layers)), device=device)

    def order(self, model: PreTrainedModel, batches: Batches) -> None:
        """Let the gates start in the order of their units' importance, measured on a few batches.

        :param model: that learns, under masks that are all ones.
        """
        names = [group.name for group in self.gates.groups]
        importance = measured_importance(model, self.masks, names, batches, seed=self.settings.seed)
        self.gates.initialise_from(importance, spread=self.settings.warm_start_spread)

    def groups(self) -> list[dict[str, Any]]:
        """Return the optimiser's groups of gates and multipliers."""
        rate = self.settings.gate_learning_rate
        gates = {"params": list(self.gates.parameters()), "lr": rate, "weight_decay": 0.0}
        return [gates, self.constraint.ascent_group(rate)]

    def is_active(self, step: int) -> bool:
        """Return whether the gates learn at a step of the phase."""
        return self.schedule.before <= step < self.schedule.before + self.schedule.gated

    def bind(self, draw: int) -> None:
        """Run the model under a sample of the gates; the same on every rank for the same number."""
        self.masks.bind(self.gates.sample(self.settings.seed, draw))

    def target_at(self, step: int) -> float:
        """The share of the dense model's cost that is to be gone at a step."""
        return 1 - self.origin.kept_share * (1 - self._target_at(step))

    def _target_at(self, step: int) -> float:
        schedule = self.schedule
        return target_at(
            step, target=self.origin.share_to_remove, warmup_steps=schedule.ramp, start_step=schedule.before
        )

    def sparsity(self) -> float:
        """The sparsity that the masks have as they are set, relative to the dense model."""
        return 1 - self.layers_left * (1 - self.masks.sparsity())

    def penalty(self, step: int) -> Tensor:
        """Return the Lagrangian term of a step, and note the share expected to have gone of the dense model's cost."""
        sizes = self.sizes.index_copy(0, self.positions, self.gates.expected_sizes())
        sparsity = 1 - self.cost.expected(sizes) / self.origin.cost
        self.expected = 1 - self.origin.kept_share * (1 - sparsity.detach())
        penalty: Tensor = self.constraint(sparsity, self._target_at(step))
        return penalty

    def progress(self, step: int) -> dict[str, float]:
        """Return what a log says of the gates after a step: the share expected to have gone, and that is asked for."""
        if self.expected is None:
            return {}
        return {"expected_sparsity": float(self.expected), "target_sparsity": self.target_at(step)}

    def alive_layers(self) -> Tensor:
        """[layers] bool: whether the attention or the feed-forward block of a layer is there.

        A layer that is applied several times counts as often, as its outputs do.
        """
        structure, device = self.masks.structure, self.gates.log_alpha.device
        found = [torch.zeros((), dtype=torch.bool, device=device) for _ in structure.layers]
        for block in structure.blocks:
            index = structure[block.gate].layer
            assert index is not None
            found[index] = found[index] | torch.as_tensor(self.masks.alive(block.gate), device=device)
        return torch.stack(found).index_select(0, self.applied)

    def settle(self) -> None:
        """Leave random samples behind: run under the gates' deterministic values."""
        self.masks.unbind()
        for name, value in self.gates.deterministic().items():
            if name == "hidden" and not bool((value > 0).any()):
                value = value.new_zeros(len(value)).index_fill(0, value.argmax(), 1.0)
            self.masks[name] = value

    def decide(self, compacted: Callable[[Plan], PreTrainedModel]) -> Plan:
        """Choose the plan of exactly the target that the gates' locations speak for.

        Units whose gates are undecided come first. Those that sit at their limits, which differ with the size of
        the group, count alike within the range that all kinds share, and by their share of the limit beyond it.

        :param compacted: returns the model that a plan leaves, which is measured where the cost is an estimate.
        """
        self.masks.unbind()
        scores, values = {}, {}
        parts = self.gates.by_group(self.gates.log_alpha.detach())
        for group, (name, part) in zip(self.gates.groups, parts.items(), strict=True):
            scores[name] = part.clamp(-COFI_LIMIT, COFI_LIMIT) + _TIE_BREAK * part / self.gates.limit_of(group)
            values[name] = torch.sigmoid(0.8 * part / self.settings.gate_temperature)
        structure, worth = self.masks.structure, self._worth()

        def plan_for(target: Target) -> Plan:
            return select(structure, scores, target, values=values, worth=worth)

        return self.target.settle(plan_for, compacted)

    def _worth(self) -> dict[str, Tensor]:
        """Return what gates expect to keep with each unit: the chance that it is there, times its share of the cost."""
        structure, found = self.masks.structure, {}
        parts = self.gates.by_group(self.gates.open_probability().detach())
        chances = {name: chance.double().cpu() for name, chance in parts.items()}
        sizes = structure.sizes
        dense = self.cost.exact(sizes)
        for block in structure.blocks:
            costs = (dense - self.cost.exact({**sizes, block.gate: 0})) / dense
            there = float(chances[block.gate]) if block.gate in chances else 1.0
            if block.gate in chances:
                found[block.gate] = chances[block.gate] * costs
            if block.inner in chances:
                assert block.inner is not None
                found[block.inner] = there * chances[block.inner] * costs / sizes[block.inner]
        if "hidden" in chances:
            costs = (dense - self.cost.exact({**sizes, "hidden": 1})) / dense
            found["hidden"] = chances["hidden"] * costs / sizes["hidden"]
        return found

    # Closed gates.

    def shrinks(self) -> bool:
        """Return whether units may go while the gates learn. Targets with levels are decided on at the end."""
        config = self.settings
        return (
            config.compact_in_training and config.trains_weights and not self.target.needs_levels(self.masks.structure)
        )

    def long_closed(self) -> Plan | None:
        """Check the gates once more; return what is kept when the units go that have been closed for long enough.

        :return: None where that is too little, or more than the target asks for: gates may open again until they
            are decided on.
        """
        self.masks.unbind()
        values = torch.cat(list(self.gates.deterministic().values()))
        self.closed.copy_(torch.where(values == 0, self.closed + 1, 0))
        kept = self.gates.by_group((self.closed < _PATIENCE).float().cpu())
        if "hidden" in kept and not bool(kept["hidden"].any()):
            return None
        plan = Plan.from_values(self.masks.structure, kept)
        before, after = self.cost.exact(self.masks.structure.sizes), self.cost.exact(plan.kept)
        return plan if self.target.budget <= after <= (1 - _LEAST) * before else None

    def on(self, masks: MaskRegistry, plan: Plan, *, layers_left: float) -> GateLearner:
        """Return the same gates and multipliers on what a plan leaves of the model.

        :param masks: of that smaller model.
        :param layers_left: of the dense model, in it.
        """
        smaller = GateLearner(
            masks, self.target, self.settings, self.schedule, layers_left=layers_left, origin=self.origin
        )
        smaller.constraint = self.constraint
        cut = gate_cut(self.gates, plan.keep)
        with torch.no_grad():
            smaller.gates.log_alpha.copy_(cut(self.gates.log_alpha))
            smaller.closed.copy_(cut(self.closed))
        return smaller

    def cuts(self, structure: Structure, plan: Plan) -> dict[str, Cut]:
        """Return what cuts tensors of gates, model and projection to what a plan leaves, by "module.name".

        :param structure: of the model that the plan is for.
        """
        cuts: dict[str, Cut] = {
            f"model.{spec.name}": partial(sliced, spec=spec, plan=plan) for spec in structure.parameters
        }
        cuts["gates.gates.log_alpha"] = gate_cut(self.gates, plan.keep)
        if "hidden" in plan.keep:
            cuts["projection.weight"] = lambda value: value[:, list(plan.keep["hidden"])]
        return cuts


def start_alike(parameters: Iterable[nn.Parameter]) -> None:
    """Give what was fitted or measured on a process's own rows the same values on all processes."""
    broadcast([parameter.data for parameter in parameters])


def average_gradients(parameters: Iterable[nn.Parameter], *, scale: float = 1.0) -> None:
    """Average gradients over the processes, for parameters that no wrapper of the model does this for.

    :param scale: of the loss in float16, which is taken out.
    """
    if PartialState().num_processes * scale != 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = reduce(parameter.grad, "mean") / scale


def check_steps(schedule: Schedule) -> list[int]:
    """Steps of a phase after which closed gates are counted; none in phases too short for it."""
    if schedule.gated < _CHECKS:
        return []
    return [schedule.before + round(index * schedule.gated / _CHECKS) for index in range(1, _CHECKS)]


def transplant(old: Modules, optimizer: Optimizer, new: Modules, onto: Optimizer, cuts: Mapping[str, Cut]) -> None:
    """Give parameters in an optimiser the moments that those of the same names had in an old one, cut to size."""
    for key, module in new.items():
        was = dict(old[key].named_parameters())
        for name, parameter in module.named_parameters():
            cut = cuts.get(f"{key}.{name}", Tensor.clone)
            for moment, value in optimizer.state.get(was[name], {}).items():
                per_unit = isinstance(value, Tensor) and value.shape == was[name].shape
                onto.state[parameter][moment] = cut(value) if per_unit else value
