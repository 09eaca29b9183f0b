"""Least-squares repair of what learned gates have left, so that weights and biases take over what is gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cofiprune.adapter import structure as structure_of
from cofiprune.compaction import compact, restore
from cofiprune.data.batches import Batches
from cofiprune.hooks import evaluating
from cofiprune.masks import MaskRegistry
from cofiprune.oneshot.reconstruction import Repair
from cofiprune.oneshot.with_data import calibration, position_weights
from cofiprune.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_rows(model: PreTrainedModel, batches: Batches) -> None:
    """Make sure that there are enough rows to fit what is left of a model.

    :raises DataError: saying how many are needed.
    """
    batches.set_epoch(0)
    batches.skip(0)
    calibration(model, batches)


def refit(
    model: PreTrainedModel,
    masks: MaskRegistry,
    decided: Plan,
    batches: Batches,
    *,
    whole: PreTrainedModel | None = None,
    above: Plan | None = None,
    seed: int = 0,
) -> Plan:
    """Refit what a plan leaves of a model, in the model's own weights, and return the plan without its scales.

    :param model: what the plan is for.
    :param masks: attached to it, and set to what it is to be reproduced under when `whole` is None.
    :param batches: what the maps are fitted on.
    :param whole: what is to be reproduced instead: the model from which `model` was cut, with its own weights.
    :param above: what was cut from it.
    """
    batches.set_epoch(0)
    batches.skip(0)
    taken = calibration(model, batches)
    small = compact(model, decided)
    reference, plan = (model, decided) if whole is None or above is None else (whole, above.then(decided))
    with evaluating(reference), evaluating(small):
        weights = position_weights(reference, taken, seed=seed)
        repair = Repair(
            reference, structure_of(reference), small, structure_of(small), plan, taken,
            ridge=None, weights=weights, everything=True,
        )  # fmt: skip
        repair.run()
    restore(model, small, decided)
    masks.set_plan(decided.hard)
    return decided.hard
