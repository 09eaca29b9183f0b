"""The beginning of a run: pruning in one shot, all of the way to a target, or as far as gates are to start from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from accelerate.utils import broadcast

from cofiprune.compaction.slicing import compacted
from cofiprune.data.batches import Batches
from cofiprune.errors import DataError, TargetError
from cofiprune.hooks import evaluating
from cofiprune.oneshot.with_data import RoundPruning, calibration, can_start
from cofiprune.plan import Plan
from cofiprune.selection.reachable import check_target
from cofiprune.selection.target import Target
from cofiprune.structure import Structure
from cofiprune.training.processes import by_first
from cofiprune.training.resolved import ResolvedSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[float], None]
Left = tuple["PreTrainedModel", Plan]
"""A smaller model, and what of the dense one it keeps."""
_ESTIMATE = 0.15
"""Margin, as a share of the budget, that one shot leaves where the result is measured in the end: estimates may be off
by as much, and gates cannot give back what is gone."""


def one_shot(
    model: PreTrainedModel,
    structure: Structure,
    batches: Batches,
    settings: ResolvedSettings,
    target: Target,
    on_progress: Progress | None = None,
) -> Left | None:
    """Prune in one shot: all of the way with method="one-shot", else as far as gates are to start from.

    Up to some sparsity, pruning block by block with reconstruction costs next to nothing. Gates then decide only what
    is hard to decide, on a smaller model, whose steps are cheaper.

    :param batches: of the full data set, the same for every process.
    :param target: of the run; gates start a unit short of it at least.
    :return: None where gates start on all of the model: by the settings, without a unit kind that this works on, with
        too few rows for the statistics, or where the target is out of reach from there.
    :raises DataError: with method="one-shot", when there are too few rows for the statistics.
    :raises TargetError: with it, when no sizes meet the target without cutting hidden dimensions.
    """
    if settings.method == "one-shot":
        small, plan = _prune(model, structure, batches, settings, target, on_progress)
        if target.measure is None:
            target.check(structure, plan.kept)
        return small, plan
    if not settings.starts_from_one_shot or not can_start(structure, settings.one_shot_units) or target.uniform:
        return None
    here = target.kept_share(structure)  # less than 1 where the model is what an earlier run has left
    aim = 1 - target.share
    left = max(here * (aim / here) ** settings.one_shot_share, aim + _short_of(structure, target, settings))
    if left >= here:
        return None
    try:
        small, plan = _prune(model, structure, batches, settings, target.at(1 - left), on_progress)
    except (DataError, TargetError):
        return None
    return (small, plan) if can_go_on(structure.cut(plan.kept), target, settings) else None


def _prune(
    model: PreTrainedModel,
    structure: Structure,
    batches: Batches,
    settings: ResolvedSettings,
    target: Target,
    on_progress: Progress | None,
) -> Left:
    """Prune in one shot, labels unseen; the first process does, the others get the outcome."""
    rows = calibration(model, structure, batches)
    made: list[PreTrainedModel] = []

    def prune() -> Plan:
        with evaluating(model):
            pruning = RoundPruning(
                model, structure, rows, target,
                units=settings.one_shot_units, seed=settings.seed, reconstruct=settings.repair is not False,
            )  # fmt: skip
            plan, small = pruning.run(on_progress)
        made.append(small)
        return plan

    plan = by_first(prune)
    small = made[0] if made else compacted(model, structure, plan)
    for parameter in small.parameters():
        broadcast(parameter.data)
    return small, plan


def _short_of(structure: Structure, target: Target, settings: ResolvedSettings) -> float:
    """Return the least distance from a target at which one shot stops, as a share of the dense model's cost."""
    cost, sizes = target.cost(structure), structure.sizes
    dense = cost.exact(sizes)
    cut = structure.present(settings.one_shot_units)
    inner = [group for group in cut if group.kind in ("heads", "intermediate")]
    unit = max(dense - cost.exact({**sizes, group.name: group.size - 1}) for group in inner) / target.total
    return max(
        unit,
        target.tolerance if target.needs_levels(structure) else 0.0,
        _ESTIMATE * (1 - target.share) if target.measure is not None else 0.0,
    )


def can_go_on(structure: Structure, target: Target, settings: ResolvedSettings) -> bool:
    """Return whether a target can be reached from a smaller model; where units go in large steps it need not be."""
    units = tuple({group.unit for group in structure.present(settings.units)})
    if not units or target.removed(structure) <= 0:
        return False
    try:
        check_target(structure, target, units)
    except TargetError:
        return False
    return True
