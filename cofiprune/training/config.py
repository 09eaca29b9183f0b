"""Settings of a run: one frozen pydantic model, whose fields are the keyword arguments of `prune` and `finetune`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cofiprune.errors import SettingsError, suggest
from cofiprune.structure import UNIT_KINDS, UnitKind

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Weight = Annotated[float, Field(ge=0, le=1000)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Scheduler = Literal["linear", "cosine", "constant"]

_UNITS = {"s": 1, "m": 60, "h": 3600}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*([hms])\s*")
_OTHER_NAMES = {
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "bf16": "mixed_precision",
    "fp16": "mixed_precision",
    "lr": "learning_rate",
    "save_steps": "checkpoint_steps",
    "load_best_model_at_end": "metric_for_best_model",
}
"""What the Trainer, or habit, calls a setting."""
_LESS_IS_BETTER = {"loss", "error", "perplexity", "mse", "rmse", "mae", "wer", "cer"}


class PruneConfig(BaseModel):
    """Settings of a pruning run; rates are per optimiser step, epochs are passes over the training data."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Literal["cofi", "one-shot", "gates", "auto"] = "cofi"
    """How `prune` goes about it with data. "one-shot" decides without training, and needs neither labels nor a
    teacher. "gates" trains the gates alone, for `epochs`, against the teacher's answers (the model's own by default),
    and refits what is left. After these two, recovery follows only where `finetune_epochs` is given. "cofi" trains
    gates and weights. "auto" picks by `time_budget` or `epochs`, and says what and why."""
    time_budget: float | None = None
    """With method="auto": how long `prune` may take, in seconds, or as a text such as "90s", "10m" or "1h30m"."""
    repair: bool | None = None
    """Refit, by least squares on the training rows, what a decision leaves, so that biases and weights take over what
    the removed units gave. None: wherever no weights are trained. With gates and weights, True refits to what the
    model gave under its gates, before the recovery."""
    epochs: NonNegative = 4
    """Epochs of the pruning phase, in which gates and weights learn together; fractions are allowed."""
    finetune_epochs: NonNegative = 2
    """Epochs of recovery afterwards, on what is left; 0 for none."""
    pre_finetune_epochs: NonNegative = 0
    """Epochs of plain training before the gates start."""
    sparsity_warmup_epochs: NonNegative | None = None
    """Epochs over which the target sparsity rises to what was asked for; None for 0.125 of the pruning epochs, 0.4
    with `one_shot_share=0`."""
    freeze_epochs: NonNegative | None = None
    """Last part of the pruning epochs, in which the structure is decided and the weights alone learn on;
    None for 0.875 of them, 0.25 with `one_shot_share=0`. The original has none of it: 0."""

    batch_size: Count = 32
    """Examples per step and process."""
    finetune_batch_size: Count | None = None
    """The same in recovery and in `finetune`; None for `batch_size`. A DataLoader keeps its own."""
    eval_batch_size: Count = 128
    gradient_accumulation_steps: Count = 1
    learning_rate: Positive | None = None
    """Of the weights in the pruning phase. None: half of what `finetune_learning_rate` is for the target, because
    most of the model is still there when it starts."""
    finetune_learning_rate: Positive | None = None
    """Of what is left, in the recovery and in `finetune`. None chooses it by the share of the layers that is left,
    because a small model bears, and needs, a larger one: 4e-5 divided by that share, at most 4e-4."""
    gate_learning_rate: Positive | None = None
    """Of the gates and of the multipliers. None chooses it by the number of steps: the original's 0.01 is
    made for 20,000 of them, a short run needs more for its gates to get anywhere."""
    weight_decay: NonNegative = 0.0
    max_grad_norm: NonNegative = 1.0
    """Gradients are clipped to it, those of the weights and of the gates each on their own; 0 for no clipping."""
    lr_scheduler_type: Scheduler = "linear"
    finetune_lr_scheduler_type: Scheduler = "linear"
    warmup_ratio: Fraction = 0.0
    """Share of a phase's steps over which the learning rate rises."""

    units: tuple[UnitKind, ...] | None = None
    """Kinds of units to prune; None for all that the model has."""
    target_seq_len: Count = 128
    """Length at which `target_macs` is counted and time is measured: tokens, or frames of audio. An image has the
    length that it has."""
    target_batch_size: Count = 1
    """Batch size at which time is measured, for `target_speedup` and `target_latency_ms`."""
    latency_cache: str | None = None
    """Where latency tables are kept: a folder, or one file that ends in `.json`. None for a folder in the user's
    cache."""
    round_to: Count | Literal["auto"] | None = None
    """Kept feed-forward and hidden dimensions are multiples of it. "auto" measures on this device, at
    `target_batch_size` and `target_seq_len`, with which multiple (1, 8, 16, 32, 64) a unit takes least time; None is 8
    with a target in time, otherwise 1."""
    uniform: bool = False
    """Keep the same shape in every layer, so that a plain configuration can state it and the result loads without
    cofiprune. Layers go as a whole; heads only together with hidden dimensions in most families."""
    gate_temperature: Positive = 2 / 3
    gate_stretch: tuple[float, float] = (-0.1, 1.1)
    compact_in_training: bool = True
    """While gates and weights learn, take the units whose gates have long been shut out of the model, so that steps
    get cheaper. They cannot come back then. The original keeps them: False in the presets."""
    one_shot_share: Annotated[float, Field(ge=0, lt=1)] = 0.97
    """How much of the way to the target is gone in one shot before the gates start, as a share of the logarithm of
    what is kept: with 0.97, sparsity 0.945 for a target of 0.95, 0.589 for 0.60. 0, or any
    `pre_finetune_epochs`, for none of it, as in the original."""
    warm_start: bool = True
    """Order the initial gates by the importance of their units, measured on a few batches."""
    warm_start_spread: NonNegative = 3.0
    """How much lower, in log_alpha, the least important unit of a group starts than the most important one. Without
    it all gates start saturated, nothing moves until the pressure is high, and then whole blocks go at once."""

    distill_temperature: Positive = 2.0
    distill_logits_weight: Weight = 1.0
    distill_layers_weight: Weight = 2.0
    """Weight of the error of each matched layer; their errors are added, as in the original."""
    distill_layer_match: Literal["nearest", "ordered", "same-index"] = "ordered"
    distill_layers: Count = 1
    """Number of teacher layers whose states are distilled, evenly spaced up to the last; the original has 4."""
    teacher_memory_mb: Annotated[int, Field(ge=0)] = 1024
    """Keep the teacher's answers to up to this many MB of rows, on the training device, instead of asking again
    every epoch; 0 for none."""
    label_weight: Weight | None = None
    """Weight of the loss on the labels; None for 0.5 with a teacher and 1 without. The original uses 0."""

    dropout: bool | None = None
    """Whether the model's dropout, and whatever else it leaves out at random in training, is on. None: off where it
    learns from a teacher, whose answers keep it from overfitting, and on without one or with gradient checkpointing,
    which needs train mode. The original has it on."""
    train_embeddings: bool | None = None
    """Whether the embedding tables learn. None: in `finetune` of a model from which nothing was removed, and not
    otherwise, as in the original."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    pad_to_multiple_of: Count | None = None
    """Pad batches of token rows to a multiple of so many tokens, up to what the model reads. None: 8 on a GPU in 16-bit
    precision, else 1. A DataLoader or a collator pads by itself."""
    torch_compile: bool = False
    """Compile the forward and backward pass of what is trained with `torch.compile`, when a phase begins. That takes
    from seconds to minutes, and pays only in runs that are long enough."""
    torch_compile_backend: str | None = None
    """None: "inductor". Others: `torch.compiler.list_backends()`."""
    seed: int = 57
    logging_steps: Count = 50
    eval_steps: Count | None = None
    """Optimiser steps between evaluations, when there is an evaluation set; None for once an epoch."""
    checkpoint_steps: Count | None = None
    """Optimiser steps between checkpoints, when there is an `output_dir`; None for once an epoch."""
    metric_for_best_model: str | None = None
    """Keep the weights of the evaluation with the best value of this metric, once the sparsity is reached;
    None keeps the last. What chose the weights is no measure of them: report a score on other data."""
    greater_is_better: bool | None = None
    """None: False for losses, errors (mse, mae, ...) and perplexity, else True."""
    progress: bool = True
    """Show progress when the output is a terminal or a notebook."""

    def __init__(self, **settings: Any) -> None:
        """Check settings.

        :raises SettingsError: for an unknown name (with the near misses) or a value out of range.
        """
        known = type(self).model_fields
        for name in settings:
            if name not in known:
                listed = ", ".join(sorted(known))
                near = f" Did you mean {_OTHER_NAMES[name]!r}?" if name in _OTHER_NAMES else suggest(name, known)
                raise SettingsError(f"unknown setting {name!r}.{near} Settings: {listed}")
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise SettingsError(_in_one_line(error)) from None

    @field_validator("time_budget", mode="before")
    @classmethod
    def _readable_time(cls, value: Any) -> Any:
        return None if value is None else seconds_of(value)

    @field_validator("units", mode="before")
    @classmethod
    def _known_units(cls, value: Any) -> Any:
        chosen = (value,) if isinstance(value, str) else value
        if chosen is None:
            return None
        if not isinstance(chosen, Iterable):
            raise ValueError(f"takes a choice among {', '.join(UNIT_KINDS)}, such as ('head', 'hidden')")
        chosen = tuple(chosen)
        for unit in chosen:
            if unit not in UNIT_KINDS:
                near = suggest(str(unit), UNIT_KINDS)
                raise ValueError(f"unknown unit kind {unit!r}.{near} Choose among {', '.join(UNIT_KINDS)}")
        if not chosen:
            raise ValueError(f"units is empty; choose among {', '.join(UNIT_KINDS)}")
        return chosen

    @field_validator("gate_stretch")
    @classmethod
    def _wide_stretch(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not (value[0] < 0 and value[1] > 1):
            raise ValueError("stretch limits must lie on either side of [0, 1], such as (-0.1, 1.1)")
        return value

    @property
    def starts_from_one_shot(self) -> bool:
        """Whether part of the model goes before the gates start. A model that is yet to learn its task has nothing
        by which that could be chosen."""
        return self.one_shot_share > 0 and self.pre_finetune_epochs == 0

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
        """Whether a run without a teacher learns from its model as it comes: methods that can do without labels do."""
        return self.method in ("gates", "auto") or (self.method == "one-shot" and self.trains)

    @property
    def recovery_epochs(self) -> float:
        """Epochs of recovery: after one shot and after gates alone, only those that were asked for."""
        if not self.trains_weights and "finetune_epochs" not in self.model_fields_set:
            return 0.0
        return self.finetune_epochs

    @property
    def repairs(self) -> bool:
        """Whether what a decision leaves is refitted."""
        return self.repair if self.repair is not None else self.method in ("one-shot", "gates")

    def prefers_greater(self) -> bool:
        """Whether a greater value of `metric_for_best_model` is a better one."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not _LESS_IS_BETTER & set((self.metric_for_best_model or "").lower().replace("-", "_").split("_"))

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
    def preset(cls, name: str, **settings: Any) -> Self:
        """Return the original's recipe: "glue-small" (CoLA, STS-B, MRPC, RTE), "glue-large" or "squad".

        Source: Appendix A and scripts of Xia et al. (2022), arXiv:2204.00408. Keyword settings go on top.
        """
        if name not in _PRESETS:
            raise SettingsError(f"unknown preset {name!r}.{suggest(name, _PRESETS)} Presets: {', '.join(_PRESETS)}")
        return cls.create(**{**_ORIGINAL, **_PRESETS[name], **settings})


_ORIGINAL: dict[str, Any] = {
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
_PRESETS: dict[str, dict[str, Any]] = {
    "glue-small": {
        "batch_size": 32,
        "learning_rate": 2e-5,
        "epochs": 100,
        "pre_finetune_epochs": 4,
        "sparsity_warmup_epochs": 20,
        "eval_steps": 50,
    },
    "glue-large": {
        "batch_size": 32,
        "learning_rate": 2e-5,
        "epochs": 20,
        "pre_finetune_epochs": 1,
        "sparsity_warmup_epochs": 2,
        "eval_steps": 500,
    },
    "squad": {
        "batch_size": 16,
        "learning_rate": 3e-5,
        "epochs": 20,
        "pre_finetune_epochs": 1,
        "sparsity_warmup_epochs": 2,
        "eval_steps": 500,
    },
}


def _in_one_line(error: ValidationError) -> str:
    parts = []
    for entry in error.errors():
        name = ".".join(str(part) for part in entry["loc"])
        message = entry["msg"].removeprefix("Value error, ")
        parts.append(f"{name}={entry['input']!r}: {message}")
    return "; ".join(parts)


def seconds_of(value: object) -> float:
    """Read a time: a number of seconds, or a text such as "90s", "10m" or "1h30m".

    :raises ValueError: for anything else, or a time that is not above 0.

    >>> seconds_of("10m"), seconds_of("1h30m"), seconds_of(45)
    (600.0, 5400.0, 45.0)
    """
    found: float | None = None
    if isinstance(value, str):
        text = value.strip().lower()
        parts = _TIME.findall(text)
        if parts and not _TIME.sub("", text):
            found = sum(float(number) * _UNITS[unit] for number, unit in parts)
        elif re.fullmatch(r"\d+(\.\d+)?", text):
            found = float(text)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        found = float(value)
    if found is None or not 0 < found < float("inf"):
        raise ValueError('takes a time above 0: seconds, or a text such as "90s", "10m" or "1h30m"')
    return found
