"""The gates' side of the pruning phase: what a step runs under, the pressure on it, and the final decision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cofiprune.accounting import layer_parameters
from cofiprune.constraint import Constraint, target_at
from cofiprune.gates import COFI_LIMIT, Gates, gate_cut
from cofiprune.masks import MaskRegistry
from cofiprune.plan import Plan
from cofiprune.selection.by_score import select
from cofiprune.selection.target import Target
from cofiprune.training.config import PruneConfig
from cofiprune.training.schedule import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TIE_BREAK = 1e-3


class Gating:
    """Binds samples of the gates to a model's masks and adds the constraint to its loss."""

    def __init__(
        self,
        masks: MaskRegistry,
        chosen: Sequence[str],
        target: Target,
        config: PruneConfig,
        schedule: Schedule,
        *,
        share: float = 1.0,
    ) -> None:
        """Set up gates for the chosen groups, on the device of the masks.

        :param target: of the dense model; shares of its cost are what the constraint compares.
        :param share: parameters in the layers of the masks' model by those of the dense model, in (1 - target, 1].
        """
        self.masks = masks
        structure = masks.structure
        self.share = share
        self.goal = target
        self.here = target.kept_share(structure)
        """What the masks' model cost when the phase began, by what the dense one does."""
        self.target = target.removed(structure)
        """What was left to remove then, relative to the masks' model."""
        self.config = config
        self.schedule = schedule
        device = next(iter(masks.values())).device
        groups = [structure[name] for name in chosen]
        self.gates = Gates(groups, temperature=config.gate_temperature, stretch=config.gate_stretch).to(device)
        self.constraint = Constraint().to(device)
        self.cost = target.cost(structure)
        self.dense = self.cost.exact(structure.sizes)
        """What the masks' model cost when the phase began."""
        order = {name: index for index, name in enumerate(structure)}
        self.positions = torch.tensor([order[group.name] for group in groups], device=device)
        self.sizes = torch.tensor(list(structure.sizes.values()), dtype=torch.float32, device=device)
        applied = [index for index, times in enumerate(structure.applications) for _ in range(times)]
        self.applied = torch.tensor(applied or range(len(structure.layers)), device=device)

    def on(self, masks: MaskRegistry, plan: Plan) -> Gating:
        """The same gates and multipliers on what a plan leaves of the model; costs count from where these do.

        :param masks: of that smaller model.
        """
        chosen = [group.name for group in self.gates.groups if plan.kept[group.name]]
        cost = layer_parameters(self.masks.structure)
        share = self.share * cost.exact(plan.kept) / cost.exact(self.masks.structure.sizes)
        smaller = Gating(masks, chosen, self.goal, self.config, self.schedule, share=share)
        smaller.constraint, smaller.dense = self.constraint, self.dense
        smaller.here, smaller.target = self.here, self.target
        with torch.no_grad():
            smaller.gates.log_alpha.copy_(gate_cut(self.gates, plan.keep)(self.gates.log_alpha))
        return smaller

    def is_active(self, step: int) -> bool:
        """Whether the gates learn at a step of the phase."""
        return self.schedule.before <= step < self.schedule.before + self.schedule.gated

    def bind(self, draw: int) -> None:
        """Run the model under a sample of the gates; the same on every rank for the same number."""
        self.masks.bind(self.gates.sample(self.config.seed, draw))

    def target_at(self, step: int) -> float:
        """The share asked for at a step to have gone of the dense model's cost."""
        return 1 - self.here * (1 - self._target_at(step))

    def _target_at(self, step: int) -> float:
        return target_at(step, target=self.target, warmup_steps=self.schedule.ramp, start_step=self.schedule.before)

    def sparsity(self) -> float:
        """The sparsity that the masks have as they are set, relative to the dense model."""
        return 1 - self.share * (1 - self.masks.sparsity())

    def _expected_sparsity(self) -> Tensor:
        """Expected removed share of the cost of the masks' model, a differentiable scalar."""
        sizes = self.sizes.index_copy(0, self.positions, self.gates.expected_sizes())
        return 1 - self.cost.expected(sizes) / self.dense

    def penalty(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the Lagrangian term of a step, and the share expected to have gone of the dense model's cost."""
        sparsity = self._expected_sparsity()
        return self.constraint(sparsity, self._target_at(step)), 1 - self.here * (1 - sparsity.detach())

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
        for group, part in zip(self.gates.groups, self._parts(), strict=True):
            limit = self.gates.limit_of(group)
            scores[group.name] = part.clamp(-COFI_LIMIT, COFI_LIMIT) + _TIE_BREAK * part / limit
            soft = torch.sigmoid(0.8 * part / self.config.gate_temperature)
            values[group.name] = soft
        structure, worth = self.masks.structure, self._worth()

        def plan_for(target: Target) -> Plan:
            return select(structure, scores, target, values=values, worth=worth)

        return self.goal.settle(plan_for, compacted)

    def _worth(self) -> dict[str, Tensor]:
        """What the gates expect to keep with each unit: the chance that it is there, times its share of the cost."""
        structure, found = self.masks.structure, {}
        chances = {
            group.name: chance.double().cpu()
            for group, chance in zip(
                self.gates.groups, torch.split(self.gates.open_probability().detach(), self._sizes()), strict=True
            )
        }
        sizes = structure.sizes
        whole = self.cost.exact(sizes)
        for block in structure.blocks:
            costs = (whole - self.cost.exact({**sizes, block.gate: 0})) / whole
            there = float(chances[block.gate]) if block.gate in chances else 1.0
            if block.gate in chances:
                found[block.gate] = chances[block.gate] * costs
            if block.inner in chances:
                assert block.inner is not None
                found[block.inner] = there * chances[block.inner] * costs / sizes[block.inner]
        if "hidden" in chances:
            costs = (whole - self.cost.exact({**sizes, "hidden": 1})) / whole
            found["hidden"] = chances["hidden"] * costs / sizes["hidden"]
        return found

    def _sizes(self) -> list[int]:
        return [group.size for group in self.gates.groups]

    def _parts(self) -> tuple[Tensor, ...]:
        return torch.split(self.gates.log_alpha.detach(), self._sizes())
