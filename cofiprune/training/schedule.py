"""How long a run is, and how its rates change: pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cofiprune.errors import SettingsError
from cofiprune.training.config import PruneConfig
from cofiprune.training.resolved import FROM_DENSE, FROM_ONE_SHOT, gate_learning_rate, weight_learning_rate
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
    def for_pruning(cls, config: PruneConfig, batches: int, *, from_one_shot: bool | None = None) -> Schedule:
        """Lay out the pruning phase over an epoch of `batches` batches per process; one shot has no steps in it.

        :param from_one_shot: whether the gates start on what one shot leaves; None for whether they are meant to.
        """
        per_epoch = math.ceil(batches / config.gradient_accumulation_steps)
        if config.method == "one-shot":
            return cls(per_epoch, 0, 0, 0, 0)
        epochs = config.pruning_epochs
        rising, frozen = _shares(config, from_one_shot)
        frozen = frozen * epochs if config.freeze_epochs is None else min(config.freeze_epochs, epochs)
        if not config.trains_weights:
            frozen = 0.0  # nothing would learn
        warmup = rising * epochs if config.sparsity_warmup_epochs is None else config.sparsity_warmup_epochs
        total = max(round(epochs * per_epoch), 1)
        gated = max(round((epochs - frozen) * per_epoch), 1)
        ramp = min(round(warmup * per_epoch), gated)
        return cls(per_epoch, round(config.pre_finetune_epochs * per_epoch), ramp, gated, total - gated)

    @classmethod
    def for_steps(
        cls, config: PruneConfig, total: int, per_epoch: int | None, *, from_one_shot: bool | None = None
    ) -> Schedule:
        """Lay out pruning inside a run of `total` optimiser steps that somebody else has laid out.

        :param per_epoch: optimiser steps of an epoch; None where the data have no length.
        :raises SettingsError: when no step is left for the gates, or epochs are meant where there are none.
        """

        def steps(name: str, share: float) -> int:
            epochs: float | None = getattr(config, name)
            if not epochs:
                return round(share) if epochs is None else 0
            if per_epoch is None:
                raise SettingsError(f"{name}={epochs:g} needs a data set with a length: this one has no epochs")
            return round(epochs * per_epoch)

        rising, frozen = _shares(config, from_one_shot)
        before = steps("pre_finetune_epochs", 0)
        after = steps("freeze_epochs", frozen * (total - before))
        gated = total - before - after
        if gated < 1:
            raise SettingsError(
                f"of {total} training steps, pre_finetune_epochs takes {before}, freeze_epochs {after}: none is left "
                "in which gates could learn"
            )
        ramp = min(steps("sparsity_warmup_epochs", rising * (total - before)), gated)
        return cls(per_epoch or total, before, ramp, gated, after)

    @staticmethod
    def for_recovery(config: PruneConfig, pruning: Schedule, batches: int) -> int:
        """The steps after the structure is decided: the rest of the pruning phase, and the recovery.

        :param batches: of an epoch per process, in the recovery.
        """
        per_epoch = math.ceil(batches / config.gradient_accumulation_steps)
        rest = math.ceil(pruning.after * per_epoch / pruning.steps_per_epoch)
        return rest + round(config.recovery_epochs * per_epoch)

    @classmethod
    def for_training(cls, epochs: float, config: PruneConfig, batches: int) -> Schedule:
        """Lay out plain training."""
        per_epoch = math.ceil(batches / config.gradient_accumulation_steps)
        return cls(per_epoch, round(epochs * per_epoch), 0, 0, 0)


def _shares(config: PruneConfig, from_one_shot: bool | None) -> tuple[float, float]:
    started = config.starts_from_one_shot if from_one_shot is None else from_one_shot
    return FROM_ONE_SHOT if started else FROM_DENSE


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


def gate_rate(config: PruneConfig, gated_steps: int) -> float:
    """Return the learning rate of gates and multipliers for a run of some length."""
    if config.gate_learning_rate is not None:
        return config.gate_learning_rate
    return gate_learning_rate(gated_steps)


def pruning_rate(config: PruneConfig, target: float) -> float:
    """Return the learning rate of the weights while gates learn towards a target sparsity in (0, 1)."""
    return 0.5 * weight_learning_rate(1 - target) if config.learning_rate is None else config.learning_rate


def gated_rates(config: PruneConfig, schedule: Schedule, target: float, trained: int) -> Callable[[int], list[float]]:
    """Return the rates of a pruning phase by step: of the groups of weights, of the gates and of the multipliers.

    :param target: sparsity, in (0, 1).
    :param trained: number of groups of weights.
    """
    gates, weights = gate_rate(config, schedule.gated), pruning_rate(config, target)

    def rates(step: int) -> list[float]:
        # The decay is restarted when the gates start, as in the original.
        begin, end = (0, schedule.before) if step < schedule.before else (schedule.before, schedule.total)
        warmup = round(config.warmup_ratio * (end - begin))
        factor = rate(config.lr_scheduler_type, step - begin, end - begin, warmup)
        return [weights * factor] * trained + [gates] * 2

    return rates


def recovery_rate(config: PruneConfig, share: float) -> float:
    """Return the learning rate for training what is left of a model.

    :param share: kept parameters of the layers by those of the dense model, in (0, 1].
    """
    return weight_learning_rate(share) if config.finetune_learning_rate is None else config.finetune_learning_rate
