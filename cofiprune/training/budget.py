"""What method="auto" makes of a budget: one shot, then all epochs for recovery; gates where one shot cannot do it.

At equal optimiser steps one shot with recovery ended at least as high as gates did, for every target that was compared,
and takes less time (docs/benchmarks.md). One shot takes a time that is known up to a factor from one training step, so
that a budget may be a time too: what it leaves goes into epochs of recovery.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from cofiprune.data.batches import Batch, Batches, model_inputs, to_model
from cofiprune.data.tasks import supported_kwargs
from cofiprune.distillation import predictions
from cofiprune.errors import SettingsError
from cofiprune.hooks import evaluating
from cofiprune.oneshot.layerwise import counted
from cofiprune.oneshot.with_data import FIT_POSITIONS, rounds
from cofiprune.structure import Structure
from cofiprune.timing import in_turn
from cofiprune.training.config import RECOVERY, PruneConfig
from cofiprune.training.processes import by_first

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COST = (2.0, 4.0)
"""Cost of a round of one shot, in training steps of the dense model over the same number of rows: a + b s where a
share s of the layers was left before. Measured on MiniLM-L6 (docs/decisions/0008-one-shot-in-rounds.md)."""
_MARGIN = 1.2
"""On what one shot is expected to take."""
_FLOOR = 0.1
"""Part of a step's time that does not shrink with the model: embeddings, the head, the optimiser."""
WORTHWHILE_EPOCHS = 1.0
"""Fewer epochs than this are not tried: training begins with a loss, and a run that is cut short ends below what one
shot leaves. A choice on the safe side, not a measured bound."""
_STEPS = 3
"""Steps that are timed, after one that pays for what is set up once."""
MOST_EPOCHS = 30.0
"""Most epochs that a time budget is spent on: more epochs are worth asking for by name."""


def readable(seconds: float) -> str:
    """Write a time for people.

    >>> readable(48.3), readable(600), readable(7200)
    ('48 s', '10 min', '2 h')
    """
    for size, name in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.0f} s"


@dataclass(frozen=True)
class Pace:
    """Measured speed of this machine with this model and these rows."""

    step: float
    """Seconds of a training step of the dense model."""
    teacher: float
    """Seconds that the teacher needs for the rows of a step; 0 without one."""
    steps_per_epoch: int
    one_shot: float
    """Seconds of one shot, on the safe side."""

    def epoch(self, share: float) -> float:
        """Seconds of an epoch on a model of which a share of the layers is left."""
        return self.steps_per_epoch * self.step * (_FLOOR + (1 - _FLOOR) * share)

    def taught(self, epochs: float) -> float:
        """Seconds of the teacher, which runs on each row once."""
        return self.steps_per_epoch * self.teacher * min(epochs, 1.0)

    def epochs_in(self, seconds: float, share: float) -> float:
        """Epochs that fit into a time, the teacher's passes included."""
        epoch = self.epoch(share)
        more = (seconds - self.taught(1.0)) / epoch
        return more if more >= 1 else max(seconds / (epoch + self.taught(1.0)), 0.0)


@dataclass(frozen=True)
class Choice:
    """What was picked."""

    finetune_epochs: float
    """Of recovery, after one shot; 0 for none."""
    reason: str
    """One sentence, for the user."""
    method: Literal["one-shot", "cofi"] = "one-shot"

    def settings(self, config: PruneConfig) -> dict[str, Any]:
        """Return the settings that it comes down to; what a configuration says of the training is for the recovery."""
        if self.method == "cofi":
            return {"method": "cofi"}
        given = config.given
        moved = [(later, name) for later, name in RECOVERY.items() if name in given and later not in given]
        training = {later: given[name] for later, name in moved}
        return {**training, "method": "one-shot", "finetune_epochs": self.finetune_epochs, "time_budget": None}


def one_shot_steps(shares: Sequence[float]) -> float:
    """Estimate the cost of one shot, in training steps of the dense model over the rows that it uses, on the safe side.

    :param shares: of the layers left after each of its rounds.
    """
    before = (1.0, *shares[:-1])
    return _MARGIN * (1 + sum(_COST[0] + _COST[1] * share for share in before))


def choose(pace: Pace, budget: float, *, share: float) -> Choice:
    """Pick what to do with a time budget.

    :param budget: seconds.
    :param share: share of the layers that one shot leaves, in (0, 1].
    :raises SettingsError: when not even one shot fits in.
    """
    if budget < pace.one_shot:
        raise SettingsError(
            f"time_budget is {readable(budget)}, too short for anything: one shot, the quickest method on data, takes "
            f"about {readable(pace.one_shot)} with this model on this machine. Without data prune(model) takes seconds"
        )
    left = budget - pace.one_shot
    epochs = pace.epochs_in(left, share)
    measured = f"a step takes {pace.step:.2g} s here, one shot about {readable(pace.one_shot)}"
    if epochs < WORTHWHILE_EPOCHS:
        return Choice(
            0.0,
            f"one-shot: {measured}, and the {readable(left)} that are left of {readable(budget)} pay for "
            f"{epochs:.2g} epochs, where fewer than {WORTHWHILE_EPOCHS:g} may end below one shot",
        )  # fmt: skip
    epochs = round(min(epochs, MOST_EPOCHS), 2)
    return Choice(
        epochs,
        f"one-shot: {measured}, and the rest of {readable(budget)} pays for {epochs:g} epochs of recovery",
    )


def chosen_for_epochs(config: PruneConfig) -> Choice:
    """Pick what to do with a number of epochs: those of pruning and of recovery are all for recovery."""
    if config.pruning_epochs == 0 and not config.finetune_epochs:
        return Choice(0.0, "one-shot: epochs is 0, so that what it leaves is not trained")
    total = config.pruning_epochs + config.recovery_epochs
    return Choice(
        total,
        f"one-shot: all {total:g} epochs are for recovery of what it leaves, where they were measured to bring most",
    )


def check_method(config: PruneConfig, *, has_data: bool) -> None:
    """Make sure that a method has what it picks by and works on.

    :raises SettingsError: for a budget where nothing is picked, none where it is, and for training without data.
    """
    if config.time_budget is not None:
        if config.method != "auto":
            raise SettingsError(f"time_budget is what method='auto' picks by; the method is {config.method!r}")
        if config.epochs is not None:
            raise SettingsError(
                f"time_budget={config.time_budget:g} and epochs={config.epochs:g} are two budgets; give one of them"
            )
        if config.gate_settings:
            raise SettingsError(
                f"time_budget pays for one shot and recovery, without gates; {config.gate_settings[0]} is of gates"
            )
    asked = config.method if config.method == "gates" else "time_budget" if config.time_budget is not None else None
    if asked is not None and not has_data:
        raise SettingsError(f"{asked} needs a train_dataset; without data prune knows one method")


def measure_pace(
    model: PreTrainedModel,
    structure: Structure,
    teacher: PreTrainedModel | None,
    batches: Batches,
    *,
    steps_per_epoch: int,
    target: float,
) -> Pace:
    """Time a few training steps of a model, and its teacher on the same rows; weights and random state stay.

    All processes go by what the first one measures.

    :param batches: of this process, from the first one on.
    :param target: the sparsity that one shot would go to.
    """
    inputs = [model_inputs(to_model(batch, model), model) for batch in itertools.islice(batches, 1 + _STEPS)]
    positions = sum(counted(model, structure, batch) for batch in inputs) / len(inputs)

    def seconds(compute: Callable[[Batch], None]) -> float:
        rows = itertools.cycle(inputs)
        (times,) = in_turn([lambda: compute(next(rows))], model.device, runs=_STEPS, warmup=1)
        return statistics.median_low(times)

    with evaluating(model), torch.random.fork_rng():  # which puts the modes back
        model.train()
        step = seconds(partial(_step, model))
    asked = 0.0 if teacher is None else seconds(partial(_teach, teacher))
    rows = min(FIT_POSITIONS / max(positions, 1.0), float(len(batches)))
    return by_first(lambda: Pace(step, asked, steps_per_epoch, rows * one_shot_steps(rounds(1 - target)) * step))


def _step(model: PreTrainedModel, batch: Batch) -> None:
    """A forward and a backward pass, of which nothing is kept."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = torch.stack([part.float().square().mean() for part in _outputs(model, batch)]).sum()
    if learning:
        torch.autograd.grad(loss, learning, allow_unused=True)


@torch.no_grad()
def _teach(teacher: PreTrainedModel, batch: Batch) -> None:
    _outputs(teacher, batch)


def _outputs(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, ...]:
    return predictions(model(**batch, **supported_kwargs(model, return_dict=True)))
