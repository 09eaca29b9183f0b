"""Settings as a run uses them: values of those left open (None), and the steps and learning rates that follow.

`resolve` is the one place where defaults that depend on something are decided; the run uses, logs and saves what it
returns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from cofiprune.errors import SettingsError
from cofiprune.latency.target import cache_folder
from cofiprune.structure import UNIT_KINDS, Structure, UnitKind
from cofiprune.training.config import PruneConfig
from cofiprune.training.settings import Scheduler

FROM_ONE_SHOT = (0.125, 0.875)
FROM_DENSE = (0.4, 0.25)
"""Shares of the pruning epochs, or of a Trainer's steps, in which the target rises, and in which the structure is
decided. Gates that start after one shot have little to find out, and what they lose must be learned again."""

Rates = Callable[[int], list[float]]
"""Learning rates of an optimiser's parameter groups at a step."""

_LOWER_IS_BETTER = {"loss", "error", "perplexity", "mse", "rmse", "mae", "wer", "cer"}


@dataclass(frozen=True)
class Facts:
    """What settings depend on; facts that come later in a run have a value for the time before."""

    steps_per_epoch: int
    """Optimiser steps of an epoch."""
    target: float | None = None
    """Share of the cost to remove, in (0, 1); None in `finetune`."""
    kept_share: float | None = None
    """Parameters of the layers in the recovery, by those of the dense model; None until that is known."""
    units: tuple[UnitKind, ...] = UNIT_KINDS
    """Kinds of units that the model has."""
    taught: bool = False
    """Whether there is a teacher."""
    labelled: bool = True
    from_one_shot: bool | None = None
    """Whether the gates start after one shot; None until that is known."""
    trainer_steps: int | None = None
    """Optimiser steps of a Trainer, inside which gates learn; None for a run that lays out its own."""
    round_to: int = 1
    """Multiple that suits the target and the device."""
    needs_train_mode: bool = False
    """Whether gradient checkpointing, which works in train mode alone, is on."""
    in_16_bit_on_gpu: bool = False
    dense: bool = False
    """Whether nothing was removed from the model yet."""


class ResolvedSettings(PruneConfig):
    """Settings as a run uses them. None are only `time_budget`, `max_steps` and `metric_for_best_model`."""

    method: Literal["cofi", "one-shot", "gates"]
    epochs: float
    finetune_epochs: float
    finetune_batch_size: int
    learning_rate: float
    finetune_learning_rate: float
    gate_learning_rate: float
    dropout: bool
    train_embeddings: bool
    pad_to_multiple_of: int
    greater_is_better: bool
    label_weight: float
    units: tuple[UnitKind, ...]
    one_shot_units: tuple[UnitKind, ...]
    round_to: int
    sparsity_warmup_epochs: float
    freeze_epochs: float
    repair: bool | Literal["one-shot"]
    latency_cache: str


def resolve(config: PruneConfig, facts: Facts) -> ResolvedSettings:
    """Give every setting that is left open its value.

    :param facts: as far as they are known; when more is, settings are resolved again.
    """
    durations = _durations(config, facts)
    gated = round((durations["epochs"] - durations["freeze_epochs"]) * facts.steps_per_epoch)
    distils = config.distill_logits_weight or config.distill_layers_weight
    left = 1.0 if facts.target is None else 1 - facts.target
    recovery_rate = weight_learning_rate(left if facts.kept_share is None else facts.kept_share)
    units = config.units or facts.units
    narrow = tuple(unit for unit in units if unit != "hidden") or units
    values: dict[str, Any] = {
        "finetune_batch_size": config.batch_size,
        "finetune_learning_rate": recovery_rate,
        "learning_rate": recovery_rate if facts.target is None else weight_learning_rate(left) / 2,
        "gate_learning_rate": gate_learning_rate(gated),
        "dropout": not (facts.taught and distils) or facts.needs_train_mode,
        "train_embeddings": facts.target is None and facts.dense,
        "pad_to_multiple_of": 8 if facts.in_16_bit_on_gpu else 1,
        "greater_is_better": not _LOWER_IS_BETTER & set(re.split("[-_]", (config.metric_for_best_model or "").lower())),
        "label_weight": 0.0 if not facts.labelled else 0.5 if facts.taught else 1.0,
        "units": units,
        # A Trainer keeps the width of its model.
        "one_shot_units": narrow if config.units is None or facts.trainer_steps is not None else units,
        "repair": config.repairs or "one-shot",
        "latency_cache": str(cache_folder()),
    }
    values.update({name: value for name, value in config.model_dump().items() if value is not None}, **durations)
    if config.round_to in (None, "auto"):
        values["round_to"] = facts.round_to
    if config.method == "auto":  # which always comes down to it
        values["method"] = "one-shot"
    return ResolvedSettings(**values)


def unit_kinds(structure: Structure) -> tuple[UnitKind, ...]:
    """Return the kinds of units that a model has."""
    return tuple(kind for kind in UNIT_KINDS if structure.present(kind))


def _durations(config: PruneConfig, facts: Facts) -> dict[str, float]:
    """Return the epochs of the parts of a run."""
    if facts.target is None:  # one training, without gates
        epochs = 2.0 if config.finetune_epochs is None else config.finetune_epochs
        return {"epochs": epochs, "finetune_epochs": epochs, "sparsity_warmup_epochs": 0.0, "freeze_epochs": 0.0}
    started = config.starts_from_one_shot if facts.from_one_shot is None else facts.from_one_shot
    rising, frozen = FROM_ONE_SHOT if started else FROM_DENSE
    # Inside a Trainer all is counted in its steps, which are shared out whole.
    unit = 1 if facts.trainer_steps is None else facts.steps_per_epoch
    length = 0.0 if config.decides_in_one_shot else config.pruning_epochs
    if facts.trainer_steps is not None:
        length = facts.trainer_steps - round(config.pre_finetune_epochs * unit)
    warmup = rising * length if config.sparsity_warmup_epochs is None else config.sparsity_warmup_epochs * unit
    freeze = frozen * length if config.freeze_epochs is None else config.freeze_epochs * unit
    if facts.trainer_steps is not None:
        warmup, freeze = round(warmup), round(freeze)
    else:
        freeze = 0.0 if config.method == "gates" else min(freeze, length)  # with gates alone, nothing would learn
    return {
        "epochs": length / unit,
        "finetune_epochs": config.recovery_epochs,
        "sparsity_warmup_epochs": warmup / unit,
        "freeze_epochs": freeze / unit,
    }


def gate_learning_rate(steps: int) -> float:
    """The learning rate of gates and multipliers for a number of steps in which gates learn.

    Adam moves a gate by about its rate each step. Closing one takes a way of about 10 in log_alpha, and the multipliers
    have to grow first, so that the rate is inversely proportional to the steps, between the original's 0.01 (for 4,000
    steps and more) and 0.2. Higher rates were measured to choose worse structures: the gates then oscillate around the
    target instead of settling.
    """
    return min(0.2, max(0.01, 40 / max(steps, 1)))


def weight_learning_rate(kept_share: float) -> float:
    """The learning rate of weights by the kept share of the layers: 4e-5, a common rate, for the dense model, and up to
    ten times as much for small ones, which need it."""
    return min(4e-4, 4e-5 / max(kept_share, 1e-9))


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
