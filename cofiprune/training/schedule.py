"""Lengths of the parts of a run, in optimiser steps, and learning rates: pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cofiprune.errors import SettingsError
from cofiprune.training.resolved import ResolvedSettings
from cofiprune.training.settings import Scheduler

Rates = Callable[[int], list[float]]
"""Learning rates of an optimiser's parameter groups at a step."""


@dataclass(frozen=True)
class Schedule:
    """The optimiser steps of a pruning phase."""

    steps_per_epoch: int
    before: int
    """Steps of plain training before the gates start."""
    ramp: int
    """Steps over which the target rises."""
    gated: int
    """Steps in which the gates learn, the ramp included."""
    after: int
    """Steps after the structure is decided."""

    @property
    def total(self) -> int:
        """Steps of the phase."""
        return self.before + self.gated + self.after

    @classmethod
    def for_pruning(cls, settings: ResolvedSettings, steps_per_epoch: int, *, in_trainer: bool = False) -> Schedule:
        """Lay out the pruning phase; one shot has no steps in it.

        :param in_trainer: a Trainer decides on the number of steps, which may leave none for the gates.
        :raises SettingsError: when it does.
        """
        if settings.method == "one-shot":
            return cls(steps_per_epoch, 0, 0, 0, 0)
        before = round(settings.pre_finetune_epochs * steps_per_epoch)
        total = max(round(settings.epochs * steps_per_epoch), 1)
        gated = round((settings.epochs - settings.freeze_epochs) * steps_per_epoch)
        if gated < 1 and in_trainer:
            raise SettingsError(
                f"of {before + total} training steps, pre_finetune_epochs takes {before}, freeze_epochs "
                f"{total - gated}: none is left in which gates could learn"
            )
        gated = max(gated, 1)
        ramp = min(round(settings.sparsity_warmup_epochs * steps_per_epoch), gated)
        return cls(steps_per_epoch, before, ramp, gated, total - gated)

    def recovery(self, settings: ResolvedSettings, steps_per_epoch: int) -> int:
        """Steps after the structure is decided: the rest of the pruning phase, and the recovery.

        :param steps_per_epoch: in the recovery, whose batches may have another size.
        """
        rest = math.ceil(self.after * steps_per_epoch / self.steps_per_epoch)
        return rest + round(settings.finetune_epochs * steps_per_epoch)


def rate(kind: Scheduler, step: int, total: int, warmup: int = 0) -> float:
    """Return the factor of the learning rate at a step, in [0, 1].

    >>> [rate("linear", step, 4) for step in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    left = max(0.0, 1 - (step - warmup) / max(1, total - warmup))
    return left if kind == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def pruning_rates(settings: ResolvedSettings, schedule: Schedule, trained: int) -> Rates:
    """Return the rates of a pruning phase: of the groups of weights, then of the gates and of the multipliers.

    :param trained: number of groups of weights.
    """

    def rates(step: int) -> list[float]:
        # The decay is restarted when the gates start, as in the original.
        begin, end = (0, schedule.before) if step < schedule.before else (schedule.before, schedule.total)
        warmup = round(settings.warmup_ratio * (end - begin))
        factor = rate(settings.lr_scheduler_type, step - begin, end - begin, warmup)
        return [settings.learning_rate * factor] * trained + [settings.gate_learning_rate] * 2

    return rates


def recovery_rates(settings: ResolvedSettings, steps: int, trained: int) -> Rates:
    """Return the rates of a recovery of some steps, for a number of groups of weights."""
    warmup = round(settings.warmup_ratio * steps)

    def rates(step: int) -> list[float]:
        factor = rate(settings.finetune_lr_scheduler_type, step, steps, warmup)
        return [settings.finetune_learning_rate * factor] * trained

    return rates
