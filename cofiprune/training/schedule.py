"""How long a run is, and how its rates change: pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cofiprune.errors import SettingsError
from cofiprune.training.resolved import ResolvedSettings
from cofiprune.training.settings import Scheduler


@dataclass(frozen=True)
class Schedule:
    """The optimiser steps of one phase of a run."""

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
        """Steps of the whole phase."""
        return self.before + self.gated + self.after

    @classmethod
    def for_pruning(cls, settings: ResolvedSettings, batches: int) -> Schedule:
        """Lay out the pruning phase over an epoch of `batches` batches per process; one shot has no steps in it."""
        per_epoch = math.ceil(batches / settings.gradient_accumulation_steps)
        if settings.method == "one-shot":
            return cls(per_epoch, 0, 0, 0, 0)
        total = max(round(settings.epochs * per_epoch), 1)
        gated = max(round((settings.epochs - settings.freeze_epochs) * per_epoch), 1)
        ramp = min(round(settings.sparsity_warmup_epochs * per_epoch), gated)
        return cls(per_epoch, round(settings.pre_finetune_epochs * per_epoch), ramp, gated, total - gated)

    @classmethod
    def for_steps(cls, settings: ResolvedSettings, total: int, per_epoch: int) -> Schedule:
        """Lay out pruning inside a run of `total` optimiser steps that somebody else has laid out.

        :raises SettingsError: when no step is left for the gates.
        """
        before, after = (round(n * per_epoch) for n in (settings.pre_finetune_epochs, settings.freeze_epochs))
        gated = total - before - after
        if gated < 1:
            raise SettingsError(
                f"of {total} training steps, pre_finetune_epochs takes {before}, freeze_epochs {after}: none is left "
                "in which gates could learn"
            )
        return cls(per_epoch, before, min(round(settings.sparsity_warmup_epochs * per_epoch), gated), gated, after)

    @staticmethod
    def for_recovery(settings: ResolvedSettings, pruning: Schedule, batches: int) -> int:
        """The steps after the structure is decided: the rest of the pruning phase, and the recovery.

        :param batches: of an epoch per process, in the recovery.
        """
        per_epoch = math.ceil(batches / settings.gradient_accumulation_steps)
        rest = math.ceil(pruning.after * per_epoch / pruning.steps_per_epoch)
        return rest + round(settings.finetune_epochs * per_epoch)

    @classmethod
    def for_training(cls, epochs: float, settings: ResolvedSettings, batches: int) -> Schedule:
        """Lay out plain training."""
        per_epoch = math.ceil(batches / settings.gradient_accumulation_steps)
        return cls(per_epoch, round(epochs * per_epoch), 0, 0, 0)


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


def gated_rates(settings: ResolvedSettings, schedule: Schedule, trained: int) -> Callable[[int], list[float]]:
    """Return the rates of a pruning phase by step: of the groups of weights, of the gates and of the multipliers.

    :param trained: number of groups of weights.
    """

    def rates(step: int) -> list[float]:
        # The decay is restarted when the gates start, as in the original.
        begin, end = (0, schedule.before) if step < schedule.before else (schedule.before, schedule.total)
        warmup = round(settings.warmup_ratio * (end - begin))
        factor = rate(settings.lr_scheduler_type, step - begin, end - begin, warmup)
        return [settings.learning_rate * factor] * trained + [settings.gate_learning_rate] * 2

    return rates
