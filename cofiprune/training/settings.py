"""Settings as four frozen pydantic models: training, distillation, gates, and target with method."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from cofiprune.errors import SettingsError, arguments_of, suggest
from cofiprune.structure import UNIT_KINDS, UnitKind


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Weight = Annotated[float, Field(ge=0, le=1000)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Scheduler = Literal["linear", "cosine", "constant"]

TRAINER_NAMES = {
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "bf16": "mixed_precision",
    "fp16": "mixed_precision",
    "lr": "learning_rate",
    "warmup_steps": "warmup_ratio",
    "save_steps": "checkpoint_steps",
    "load_best_model_at_end": "metric_for_best_model",
    "disable_tqdm": "progress",
    "processing_class": "tokenizer",
    "model_max_length": "max_length",
    "max_seq_length": "max_length",
    "teacher_model": "teacher",
    "sparsity": "target_sparsity",
}
"""Settings and arguments by the names that the Trainer, or habit, gives them."""
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*([hms])\s*")


def seconds_of(value: object) -> float | None:
    """Read a time: a number of seconds, a text such as "90s", "10m" or "1h30m", or None.

    :raises ValueError: for anything else, or a time that is not above 0.

    >>> seconds_of("10m"), seconds_of("1h30m"), seconds_of(45)
    (600.0, 5400.0, 45.0)
    """
    if value is None:
        return None
    found: float | None = None
    if isinstance(value, str):
        text = value.strip().lower()
        parts = _TIME.findall(text)
        if parts and not _TIME.sub("", text):
            found = sum(float(number) * _SECONDS[unit] for number, unit in parts)
        elif re.fullmatch(r"\d+(\.\d+)?", text):
            found = float(text)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        found = float(value)
    if found is None or not 0 < found < float("inf"):
        raise ValueError('takes a time above 0: seconds, or a text such as "90s", "10m" or "1h30m"')
    return found


def _units(value: Any) -> tuple[str, ...] | None:
    """Read a choice of unit kinds: one by its name, or several.

    :raises ValueError: for anything else.
    """
    if value is None:
        return None
    if not isinstance(value, Iterable):
        raise ValueError(f"takes a choice among {', '.join(UNIT_KINDS)}, such as ('head', 'hidden')")
    chosen = (value,) if isinstance(value, str) else tuple(value)
    for unit in chosen:
        if unit not in UNIT_KINDS:
            near = suggest(str(unit), UNIT_KINDS)
            raise ValueError(f"unknown unit kind {unit!r}.{near} Choose among {', '.join(UNIT_KINDS)}")
    if not chosen:
        raise ValueError(f"units is empty; choose among {', '.join(UNIT_KINDS)}")
    return chosen


Steps = Annotated[Count | Literal["epoch"], BeforeValidator(lambda value: "epoch" if value is None else value)]
Time = Annotated[float | None, BeforeValidator(seconds_of)]
Units = Annotated[tuple[UnitKind, ...] | None, BeforeValidator(_units)]


class Settings(BaseModel):
    """The common part of all settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 57
    """Seed of the order of the examples, of the gates' noise and of dropout."""

    def __init__(self, **settings: Any) -> None:
        """Check settings.

        :raises SettingsError: for an unknown name (with the near misses) or a value out of range.
        """
        check_names(settings, type(self).model_fields)
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise SettingsError(_in_one_line(error)) from None


class TrainingSettings(Settings):
    """How a model is trained; rates are per optimiser step, epochs are passes over the training data."""

    epochs: NonNegative | None = None
    """Training epochs: of the pruning phase, in which gates and weights learn together, or of `finetune`; with
    method="auto" mostly of recovery. Fractions are allowed. None: 4 in `prune`, 2 in `finetune`."""
    finetune_epochs: NonNegative | None = None
    """Epochs of recovery, in which the pruned model trains on; 0 for none. They are cheap, because the model is
    small by then, and matter most at high sparsities. None: 2, and 0 with method="one-shot" or "gates"."""
    max_steps: Count | None = None
    """Optimiser steps of all training together; epochs, where they are given, then say how the phases share them. Rows
    without a length, of an IterableDataset, need it. None: as many as the epochs have."""
    batch_size: Count = 32
    """Examples per batch and process."""
    finetune_batch_size: Count | None = None
    """Examples per batch and process in the recovery. None: `batch_size`. A DataLoader keeps its own batches."""
    eval_batch_size: Count = 128
    """Examples per batch of an evaluation."""
    gradient_accumulation_steps: Count = 1
    """Batches per optimiser step. Higher values save memory, not time: use them with a smaller `batch_size`. Rows,
    losses and pairs of layers are those of one larger batch; the pairs of "nearest" and "ordered" cost a forward pass
    more of each batch, those of "same-index" none."""
    learning_rate: Positive | None = None
    """Peak learning rate of the weights in the pruning phase, or in `finetune`; with method="auto" also of the
    recovery. None: in `prune`, half of what `finetune_learning_rate` is for the target, because the model is still
    larger than that."""
    finetune_learning_rate: Positive | None = None
    """Peak learning rate of the recovery. None: 4e-5 divided by the kept share of the layers, at most 4e-4, because
    smaller models need, and tolerate, a higher learning rate."""
    weight_decay: NonNegative = 0.0
    """Weight decay of AdamW on weight matrices. Biases and norms do not decay."""
    max_grad_norm: NonNegative = 1.0
    """Gradients with a larger norm are scaled down to it, those of the weights and of the gates separately; 0 for
    no clipping."""
    lr_scheduler_type: Scheduler = "linear"
    """Schedule of `learning_rate`: "linear" or "cosine" decay to 0, or "constant"."""
    finetune_lr_scheduler_type: Scheduler = "linear"
    """Schedule of `finetune_learning_rate`."""
    warmup_ratio: Fraction = 0.0
    """Share of a phase's steps in which the learning rate rises to its peak."""
    dropout: bool | None = None
    """Whether dropout, and everything else that is random in train mode, is on. None: off with a teacher, whose
    outputs prevent overfitting; on without one, or with gradient checkpointing, which needs train mode. The
    original has it on."""
    train_embeddings: bool | None = None
    """Whether embedding tables are trained. None: only in `finetune`, and only if nothing was removed from the
    model."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the forward and backward pass: "no" for that of the weights, "bf16", or "fp16" on GPUs."""
    pad_to_multiple_of: Count | None = None
    """Pad batches of tokens to a multiple of this length, within what the model reads. None: 8 on a GPU in 16-bit
    precision, which is faster at such lengths, else 1. A DataLoader or a data collator pads its own batches."""
    torch_compile: bool = False
    """Compile the training steps with `torch.compile` when a phase begins. Compiling takes from seconds to minutes,
    so that only long runs gain by it."""
    torch_compile_backend: str = "inductor"
    """Backend of `torch_compile`, one of `torch.compiler.list_backends()`. "inductor" needs a C++ compiler on a CPU
    and Triton on a GPU."""
    teacher_memory_mb: Annotated[int, Field(ge=0)] = 1024
    """Memory, in MB on the training device, for keeping the teacher's outputs. Examples whose outputs are kept are
    shown to the teacher once instead of once per epoch; 0 to keep none."""
    logging_steps: Count = 50
    """Optimiser steps between entries of the history."""
    eval_steps: Steps = "epoch"
    """Optimiser steps between evaluations on `eval_dataset`; "epoch" for one per epoch."""
    checkpoint_steps: Steps = "epoch"
    """Optimiser steps between checkpoints in `output_dir`; "epoch" for one per epoch."""
    metric_for_best_model: str | None = None
    """Metric that chooses the final weights: those of the best evaluation, among the evaluations of the final
    structure. None: the last weights. The evaluation set that chose is no fair test: report the score on other
    data."""
    greater_is_better: bool | None = None
    """Whether a higher value of that metric is better. None: no for losses, errors (mse, mae, ...) and perplexity,
    else yes."""
    progress: bool = True
    """Show progress when the output is a terminal or a notebook."""


class DistillationSettings(Settings):
    """What is learned, from the teacher and from the labels."""

    distill_temperature: Positive = 2.0
    """Temperature that softens the predictions of teacher and student before they are compared. Higher values give
    more weight to the less likely classes."""
    distill_logits_weight: Weight = 1.0
    """Weight of the loss between the predictions of teacher and student."""
    distill_layers_weight: Weight = 2.0
    """Weight of the loss between the hidden states of matched layers, summed over the layers as in the original."""
    distill_layer_match: Literal["nearest", "ordered", "same-index"] = "ordered"
    """Rule that pairs a teacher layer with a student layer: "nearest" takes the one that differs least, "ordered"
    does too but never lets pairs cross, "same-index" takes the one at the same relative depth."""
    distill_layers: Count = 1
    """Number of teacher layers that are distilled, evenly spaced up to the last. The original has 4."""
    embedding_pooling: Literal["mean", "cls"] = "mean"
    """How token states make the vector of a text where an encoder without a head is distilled, whose vectors are then
    what is compared: their mean over the tokens that are no padding, or the first one."""
    label_weight: Weight | None = None
    """Weight of the loss on the labels. None: 0.5 with a teacher, 1 without one, 0 without labels. The original has
    0."""


class GateSettings(Settings):
    """What is removed, and how gates learn it."""

    units: Units = None
    """Kinds of units to prune: "layer" (whole blocks), "head", "intermediate", "hidden". None: all that the model
    has."""
    round_to: Count | Literal["auto"] | None = None
    """Keep feed-forward and hidden dimensions in multiples of this number, which some devices compute faster.
    "auto" measures on this device, at `target_batch_size` and `target_seq_len`, which of 1, 8, 16, 32 and 64 takes
    least time per dimension. None: 8 with a target in time, else 1."""
    pre_finetune_epochs: NonNegative = 0
    """Epochs of plain training before the gates start, on the dense model. Give some to a model that has not
    learned its task yet."""
    sparsity_warmup_epochs: NonNegative | None = None
    """Epochs in which the target sparsity rises to its final value. A slower rise disturbs the weights less. None:
    0.125 of `epochs`, or 0.4 if the gates start on the dense model."""
    freeze_epochs: NonNegative | None = None
    """Last part of `epochs`, in which the structure is decided and only the weights learn. More of it recovers more
    accuracy; less leaves the gates more steps. None: 0.875 of `epochs`, or 0.25 if the gates start on the dense
    model. The original has none: 0."""
    gate_learning_rate: Positive | None = None
    """Learning rate of the gates and of the constraint's multipliers. Higher rates decide faster, and worse. None:
    40 divided by the number of steps with gates, between 0.01 (the original's, for long runs) and 0.2."""
    gate_temperature: Positive = 2 / 3
    """Temperature of the hard-concrete gates. Lower values push samples of a gate towards 0 and 1."""
    gate_stretch: tuple[float, float] = (-0.1, 1.1)
    """Range of a gate before it is clamped to [0, 1]. A wider range gives more gates of exactly 0 or 1."""
    one_shot_share: Annotated[float, Field(ge=0, lt=1)] = 0.97
    """How far one-shot pruning goes before the gates start, in [0, 1): the share of the layers kept by it is the
    share to keep in the end to this power. Example: of a target sparsity of 0.95, the default 0.97 removes 0.945 in
    one shot, since 0.05 ** 0.97 is 0.055, and the gates choose the rest. Lower values leave the gates more to
    choose, and take longer. 0, or any `pre_finetune_epochs`, starts the gates on the dense model, as in the
    original."""
    warm_start: bool = True
    """Start the gates in the order of their units' importance, measured on a few batches, instead of all alike."""
    warm_start_spread: NonNegative = 3.0
    """Distance in log_alpha between the most and the least important unit of a group when gates start. If it is too
    small, no gate closes until the pressure is high, and then whole blocks close at once."""

    @field_validator("gate_stretch")
    @classmethod
    def _wide_stretch(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not (value[0] < 0 and value[1] > 1):
            raise ValueError("stretch limits must lie on either side of [0, 1], such as (-0.1, 1.1)")
        return value


class TargetSettings(Settings):
    """What `prune` aims at, and the method that gets there."""

    method: Literal["auto", "one-shot", "cofi", "gates"] = "auto"
    """Method of pruning with data. "auto" takes what was measured to end highest, and says what and why: one shot,
    then `epochs` and `finetune_epochs` together, or as many as fit into `time_budget`, of recovery; "cofi" where
    settings of gates are changed, and where one shot cannot reach the target or has too few rows. "one-shot" decides
    without training, and needs neither labels nor a teacher. "cofi" trains gates and weights, as the original does.
    "gates" trains the gates alone, against the teacher's outputs (those of the dense model by default), and
    reconstructs the pruned model. "one-shot" and "gates" are followed by recovery only if `finetune_epochs` is
    given."""
    time_budget: Time = None
    """Time that `prune` may take with method="auto", instead of `epochs`: seconds, or a text such as "90s", "10m" or
    "1h30m"."""
    repair: bool | Literal["one-shot"] | None = None
    """Reconstruct what the dense model computed, by least squares on training examples: the remaining weights and
    biases take over what the removed units contributed. True: after one shot and after the gates have decided;
    "one-shot": after one shot alone; False: never. None: True with method="one-shot" or "gates", else
    "one-shot"."""
    one_shot_units: Units = None
    """Kinds of units that one-shot pruning on data removes, alone or before the gates start. None: those of
    `units`, but "hidden" only if `units` names it."""
    compact_in_training: bool = True
    """Remove units whose gates have been closed for a while, as the others still learn, so that steps get cheaper.
    Removed units cannot come back. The original keeps them: False in the presets."""
    uniform: bool = False
    """Keep the same shape in every layer, so that the result is a plain model of its family, which loads without
    cofiprune. Layers are removed whole; heads, in most families, only together with hidden dimensions."""
    target_seq_len: Count = 128
    """Sequence length at which operations are counted and time is measured: tokens, or frames of audio. An image
    has the length that it has."""
    target_file_dtype: Literal["model", "float32", "float16", "bfloat16"] = "model"
    """Precision in which the file of `target_file_mb` will be saved; "model" for that of the model's weights, as
    `save_pretrained` writes them."""
    target_batch_size: Count = 1
    """Batch size at which time is measured, for `target_speedup` and `target_latency_ms`."""
    engine: Literal["torch", "onnx", "onnx-int8", "openvino"] = "torch"
    """What the pruned model will be served by, in which time is measured. Others than torch run on the CPU and are
    exported for each measurement; "onnx-int8" is ONNX Runtime with dynamic int8."""
    latency_cache: Annotated[str, BeforeValidator(_as_text)] | None = None
    """Where measured times are kept: a folder, or one file that ends in `.json`. None: a folder in the user's
    cache."""


def check_names(names: Iterable[str], known: Iterable[str], function: Callable[..., Any] | None = None) -> None:
    """Make sure that settings of these names exist.

    :param function: that takes them beside its own arguments, which may be meant too.
    :raises SettingsError: for an unknown name, with the near misses.
    """
    known = {*known, *(arguments_of(function) if function is not None else ())}
    for name in names:
        if name not in known:
            meant = TRAINER_NAMES.get(name)
            near = f" Did you mean {meant!r}?" if meant in known else suggest(name, sorted(known))
            listed = "" if near else f" Settings: {', '.join(sorted(known))}"
            raise SettingsError(f"unknown setting {name!r}.{near}{listed}")


def _in_one_line(error: ValidationError) -> str:
    found: dict[str, list[str]] = {}
    for entry in error.errors():
        given = f"{entry['loc'][0]}={entry['input']!r}"
        message = entry["msg"].removeprefix("Value error, ")
        found.setdefault(given, []).append(message.removeprefix("Input should be ") if given in found else message)
    return "; ".join(f"{given}: {' or '.join(messages)}" for given, messages in found.items())
