"""Where the gates start: on what one shot leaves of the model, so that they decide only what is hard to decide.

Up to some sparsity, pruning block by block with repair costs next to nothing; that part is done in one shot.
The gates then learn on the smaller model, whose steps are cheaper, and take it the rest of the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list

from cofiprune import accounting
from cofiprune.adapter import structure as structure_of
from cofiprune.compaction import compact, restore
from cofiprune.data.batches import Batches
from cofiprune.errors import DataError, TargetError
from cofiprune.hooks import evaluating
from cofiprune.masks import MaskRegistry
from cofiprune.oneshot.with_data import SequentialPruning, calibration, can_start
from cofiprune.plan import Plan
from cofiprune.selection.reachable import check_target
from cofiprune.selection.target import Target
from cofiprune.structure import Structure
from cofiprune.training.config import PruneConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_ESTIMATE = 0.15
"""How much more than what is asked for one shot leaves where that is measured in the end, as a share of it: estimates
may be off by as much, and gates cannot give back what is gone."""


@dataclass(frozen=True)
class Start:
    """What one shot has left of a model."""

    whole: PreTrainedModel
    """The model itself, with its own weights until `write_back`."""
    small: PreTrainedModel
    """What is left, repaired; this is what learns."""
    plan: Plan
    """What is kept, in terms of the whole model."""

    @property
    def share(self) -> float:
        """Parameters left in the layers, by those of the whole model's."""
        structure = structure_of(self.whole)
        cost = accounting.layer_parameters(structure)
        return cost.exact(self.plan.kept) / cost.exact(structure.sizes)

    def write_back(self, masks: MaskRegistry, decided: Plan) -> Plan:
        """Bring the small model's weights into the whole one, and return a plan for the small one in its terms.

        :param masks: of the whole model; set to that plan.
        """
        restore(self.whole, self.small, self.plan)
        plan = self.plan.then(decided)
        masks.set_plan(plan)
        return plan


def start_for(
    model: PreTrainedModel,
    batches: Batches,
    config: PruneConfig,
    target: Target,
    on_progress: Callable[[float], None] | None = None,
    *,
    cuts_hidden: bool = True,
) -> Start | None:
    """Prune part of the way to a target in one shot: `one_shot_share` of it, on a logarithmic scale.

    :param target: what the gates are to reach in the end; one shot stops a unit short of it at least.
    :param cuts_hidden: whether hidden dimensions may go, where the configuration's units name them.
    :return: None where there is nothing to do: no unit kind that this works on, no way to the target from there, or
        a configuration that leaves it out.
    """
    if not config.starts_from_one_shot or not can_start(structure_of(model), config.units) or target.uniform:
        return None
    whole = structure_of(model)
    here = target.kept_share(whole)  # less than 1 where the model is what an earlier run has left
    left = max(
        here * ((1 - target.share) / here) ** config.one_shot_share, 1 - target.share + _short_of(whole, target, config)
    )
    if left >= here:
        return None
    try:
        start = one_shot(model, batches, config, target.at(1 - left), on_progress, cuts_hidden=cuts_hidden)
    except (DataError, TargetError):
        return None  # too few rows for statistics, or no sizes on the way that do without cutting hidden dimensions
    return start if can_go_on(start.small, target, config) else None


def one_shot(
    model: PreTrainedModel,
    batches: Batches,
    config: PruneConfig,
    target: Target,
    on_progress: Callable[[float], None] | None = None,
    *,
    cuts_hidden: bool = True,
) -> Start:
    """Prune in one shot, labels unseen; the first process does, the others get the outcome.

    :param batches: of the whole data set, the same for every process.
    :raises DataError: when there are too few rows for the statistics.
    :raises TargetError: when no sizes meet the target without cutting hidden dimensions.
    """
    processes = PartialState()
    batches.set_epoch(0)
    batches.skip(0)
    taken = calibration(model, batches)
    outcome: list[Any] = [None]
    small: PreTrainedModel | None = None
    if processes.is_main_process:
        units = config.units if cuts_hidden else tuple(unit for unit in config.units or () if unit != "hidden") or None
        try:
            with evaluating(model):
                run = SequentialPruning(
                    model, taken, target, units=units, seed=config.seed, repair=config.repair is not False
                )
                plan, small = run.run(on_progress)
            outcome = [plan.to_dict()]
        except (DataError, TargetError) as error:
            outcome = [error]  # the others wait for what comes of it
    if processes.num_processes > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    plan = Plan.from_dict(outcome[0])
    if small is None:
        small = compact(model, plan)
    if processes.num_processes > 1:
        for parameter in small.parameters():
            broadcast(parameter.data)
    return Start(model, small, plan)


def _short_of(structure: Structure, target: Target, config: PruneConfig) -> float:
    """How far from a target one shot stops at least, as a share of the dense model's cost."""
    cost, sizes = target.cost(structure), structure.sizes
    whole = cost.exact(sizes)
    inner = [group for group in structure.present(config.units) if group.kind in ("heads", "intermediate")]
    unit = max(whole - cost.exact({**sizes, group.name: group.size - 1}) for group in inner) / target.total
    return max(
        unit,
        target.tolerance if target.needs_levels(structure) else 0.0,
        _ESTIMATE * (1 - target.share) if target.measure is not None else 0.0,
    )


def can_go_on(small: PreTrainedModel, target: Target, config: PruneConfig) -> bool:
    """Whether the target can be reached from what is left; where units go in large steps it need not be."""
    structure = structure_of(small)
    units = tuple({group.unit for group in structure.present(config.units)})
    if not units or target.removed(structure) <= 0:
        return False
    try:
        check_target(structure, target, units)
    except TargetError:
        return False
    return True
