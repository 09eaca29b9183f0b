"""The settings of a run: `PruneConfig`, whose fields are the keyword arguments of `prune`, and the original's presets.

`prune` takes all of them, `finetune` those of `FINETUNE`, `PruningCallback` those of `CALLBACK`. A field that is None
is left open: `cofiprune.training.resolved` gives it a value once the facts of the run are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

from cofiprune.errors import SettingsError, suggest
from cofiprune.training.settings import (
    DistillationSettings,
    GateSettings,
    Settings,
    TargetSettings,
    TrainingSettings,
    check_names,
)

FINETUNE = (TrainingSettings, DistillationSettings)
"""What `finetune` takes."""
CALLBACK = (DistillationSettings, GateSettings)
"""What `PruningCallback` takes; the Trainer's arguments stand for the rest."""
RECOVERY = {f"finetune_{name}": name for name in ("epochs", "batch_size", "learning_rate", "lr_scheduler_type")}
"""Settings of the recovery, by the name of those of the pruning phase. In `finetune` both mean its one training."""


class PruneConfig(TargetSettings, GateSettings, DistillationSettings, TrainingSettings):
    """All settings of a pruning run; two that are equal make equal runs."""

    @property
    def starts_from_one_shot(self) -> bool:
        """Whether one-shot pruning comes before the gates; a model that has yet to learn its task cannot be judged."""
        return self.one_shot_share > 0 and self.pre_finetune_epochs == 0

    @property
    def decides_in_one_shot(self) -> bool:
        """Whether one shot prunes all of the way; what "auto" picks always does."""
        return self.method in ("one-shot", "auto")

    @property
    def given(self) -> dict[str, Any]:
        """The settings that have another value than the default."""
        return {name: value for name, value in self if value != PruneConfig.model_fields[name].default}

    @property
    def gate_settings(self) -> list[str]:
        """Settings of gates that have another value than the default: method="auto" takes them for asking for gates."""
        return [name for name in _OF_GATES if name in self.given]

    @property
    def trains_weights(self) -> bool:
        """Whether the weights learn along with the gates."""
        return self.method not in ("gates", "one-shot")

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return self.method != "one-shot" or self.recovery_epochs > 0

    @property
    def teaches_itself(self) -> bool:
        """Whether a run without a teacher learns from its model as it comes, labels or not."""
        return self.method == "gates" or (self.method == "one-shot" and self.trains)

    @property
    def pruning_epochs(self) -> float:
        """Epochs of the pruning phase."""
        return 4.0 if self.epochs is None else self.epochs

    @property
    def recovery_epochs(self) -> float:
        """Epochs of recovery: after one shot and after gates alone, only those that are asked for."""
        if self.finetune_epochs is None:
            return 2.0 if self.trains_weights else 0.0
        return self.finetune_epochs

    def for_steps(self, steps_per_epoch: int, *, gated: bool) -> PruneConfig:
        """Return the configuration with epochs that come to `max_steps`, in the proportions that they have.

        :param gated: for `prune`, not for the one training of `finetune`.
        :raises SettingsError: when nothing would be trained, or a time says how long.
        """
        assert self.max_steps is not None
        epochs = self._phases(gated=gated)
        factor = self.max_steps / (sum(epochs.values()) * steps_per_epoch)
        inside = ("sparsity_warmup_epochs", "freeze_epochs")
        epochs.update({name: value for name in inside if (value := getattr(self, name)) is not None})
        return self.model_copy(update={name: value * factor for name, value in epochs.items()})

    def steps_of_epoch(self, *, gated: bool) -> int:
        """Return the steps of an epoch of rows without a length: `max_steps`, divided by the number of epochs."""
        assert self.max_steps is not None
        return math.ceil(self.max_steps / sum(self._phases(gated=gated).values()))

    def _phases(self, *, gated: bool) -> dict[str, float]:
        """Return the epochs of the phases that train, by the names of their settings."""
        if self.time_budget is not None:
            raise SettingsError("max_steps and time_budget both say how long to train: pass one of them")
        epochs = {"finetune_epochs": self.recovery_epochs}
        if gated and self.method != "one-shot":
            epochs.update(epochs=self.pruning_epochs, pre_finetune_epochs=self.pre_finetune_epochs)
        if not sum(epochs.values()):
            raise SettingsError(f"max_steps={self.max_steps} trains nothing: {', '.join(epochs)} are 0; give some")
        return epochs

    @property
    def repairs(self) -> bool:
        """Whether what the gates, or one shot as the method, leave of the model is reconstructed."""
        return self.method in ("one-shot", "gates") if self.repair is None else self.repair is True

    @classmethod
    def create(cls, config: PruneConfig | None = None, /, **settings: Any) -> Self:
        """Make a configuration from keyword settings, on top of another one when it is given.

        :raises SettingsError: for an unknown name (with the near misses) or a value out of range.
        """
        if config is not None and not isinstance(config, PruneConfig):
            raise SettingsError(f"config takes a PruneConfig, not {type(config).__name__}")
        given = {} if config is None else config.model_dump(exclude_unset=True)
        return cls(**{**given, **settings})

    @classmethod
    def for_finetune(cls, config: PruneConfig | None = None, /, **settings: Any) -> Self:
        """Make the configuration of `finetune`, whose one training stands in the fields of the recovery.

        :param config: what it says of the recovery counts; where that is left at its default, what it says of pruning.
        :param settings: of `FINETUNE`; `epochs`, for example, is `finetune_epochs` in what is returned.
        :raises SettingsError: as `create`, and for a setting that `finetune` does not take.
        """
        check_taken("finetune", settings, FINETUNE)
        for recovery, name in RECOVERY.items():
            if name in settings:
                # Rows that a collator batches keep the size that they were batched with, hence both.
                settings[recovery] = settings[name] if name == "batch_size" else settings.pop(name)
            elif isinstance(config, cls) and getattr(config, recovery) == cls.model_fields[recovery].default:
                settings.setdefault(recovery, getattr(config, name))
        return cls.create(config, **settings)

    @classmethod
    def preset(cls, name: str, **settings: Any) -> Self:
        """Return the original's recipe: "glue-small" (CoLA, STS-B, MRPC, RTE), "glue-large" or "squad".

        Source: Appendix A and scripts of Xia et al. (2022), arXiv:2204.00408. Keyword settings go on top.
        """
        if name not in PRESETS:
            raise SettingsError(f"unknown preset {name!r}.{suggest(name, PRESETS)} Presets: {', '.join(PRESETS)}")
        return cls.create(**{**_ORIGINAL, **dict(zip(_PRESET, PRESETS[name], strict=True)), **settings})

    @classmethod
    def from_arguments(cls, words: Iterable[str], *, preset: str | None = None) -> Self:
        """Read settings as they are typed: `--epochs 4 --units head hidden --no-dropout --freeze-epochs none`.

        :param words: what an `argparse` parser of other options leaves over.
        :param preset: the recipe on top of which they go.
        :raises SettingsError: for an unknown name (with the near misses) or a value out of range.
        """
        typed: dict[str, list[str]] = {}
        name = ""
        for word in words:
            if word.startswith("--"):
                name, *values = word.removeprefix("--").split("=", 1)
                typed[name.replace("-", "_")] = values
            else:
                typed.setdefault(name.replace("-", "_"), []).append(word)
        settings: dict[str, Any] = {}
        for name, values in typed.items():
            parts = [part for value in values for part in value.split(",")]
            if not parts:
                settings[name.removeprefix("no_")] = not name.startswith("no_")
            else:
                settings[name] = None if parts == ["none"] else parts[0] if len(parts) == 1 else parts
        return cls.preset(preset, **settings) if preset else cls.create(**settings)


def names_of(*models: type[Settings]) -> list[str]:
    """Return the fields of some settings models, each once."""
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def check_taken(
    who: str,
    names: Iterable[str],
    models: tuple[type[Settings], ...],
    reasons: Mapping[str, str] | None = None,
    function: Callable[..., Any] | None = None,
) -> None:
    """Make sure that somebody takes settings of these names.

    :param who: the function, for messages.
    :param reasons: why it does not take some of the other settings, by name.
    :param function: as in `check_names`.
    :raises SettingsError: for a setting that only other functions take, and for an unknown one, with the near misses.
    """
    known = names_of(*models)
    for name in names:
        if name in PruneConfig.model_fields and name not in known:
            others = "prune and cofiprune.finetune" if name in names_of(*FINETUNE) else "prune"
            reason = (reasons or {}).get(name, f"it is a setting of cofiprune.{others}")
            raise SettingsError(f"{who} does not take {name!r}: {reason}")
    check_names(names, known, function)


_OF_GATES = [name for name in GateSettings.model_fields if name not in ("seed", "units", "round_to")]
_OF_GATES += ["compact_in_training"]
_ORIGINAL: dict[str, Any] = {
    "method": "cofi",
    "gate_learning_rate": 0.01,
    "finetune_learning_rate": 2e-5,
    "finetune_lr_scheduler_type": "constant",
    "finetune_epochs": 20,
    "finetune_batch_size": 64,
    "freeze_epochs": 0,
    "distill_layers": 4,
    "distill_layers_weight": 0.9,
    "distill_logits_weight": 0.1,
    "label_weight": 0.0,
    "train_embeddings": False,
    "warm_start": False,
    "one_shot_share": 0.0,
    "compact_in_training": False,
    "dropout": True,
}
_PRESET = ("batch_size", "learning_rate", "epochs", "pre_finetune_epochs", "sparsity_warmup_epochs", "eval_steps")
PRESETS = {
    "glue-small": (32, 2e-5, 100, 4, 20, 50),
    "glue-large": (32, 2e-5, 20, 1, 2, 500),
    "squad": (16, 3e-5, 20, 1, 2, 500),
}
