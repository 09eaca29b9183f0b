"""What a model scores, weighs and takes, in one row: for a run's result, its report and its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from cofiprune.accounting import amount
from cofiprune.data.checks import longest_sequence
from cofiprune.data.synthetic import synthetic_inputs
from cofiprune.hooks import reading, same_random_state
from cofiprune.measure.summary import Size
from cofiprune.structure import Structure
from cofiprune.timing import in_turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SECONDS = 0.5
"""For timing models, in addition to the warm-up and five passes."""
_SIZES = {
    "parameters": "parameters",
    "parameters_without_embeddings": "  without embeddings",
    "layer_parameters": "  in the layers",
    "macs": "MACs",
}


@dataclass(frozen=True)
class Figures:
    """What a model scores, weighs and takes."""

    parameters: int
    """Every parameter; tied ones count once."""
    parameters_without_embeddings: int
    layer_parameters: int
    """Of the encoder's layers, the denominator of `sparsity`."""
    macs: int
    """Multiply-accumulates for one example of `seq_len` tokens."""
    megabytes: float
    """Of the weights as they are saved, in MB (10**6 bytes)."""
    latency_ms: float | None
    """Median of a forward pass; None where no inputs can be made up for the model."""
    batch_size: int
    """At which the latency was measured."""
    seq_len: int
    device: str
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the evaluation set, by name with `eval_` in front; empty without one."""

    @property
    def setting(self) -> str:
        """The conditions of the figures, in words."""
        return f"MACs at {self.seq_len} tokens, latency in torch at batch {self.batch_size} on {self.device}"


@dataclass(frozen=True)
class Subject:
    """A model to measure."""

    model: PreTrainedModel
    structure: Structure
    """Of the model as it is."""
    scores: Mapping[str, float]


def figures_of(*subjects: Subject, batch_size: int = 1, seq_len: int = 128) -> list[Figures]:
    """Count models, and time them in turn, so that a busy machine is as slow for one as for the other.

    Nothing of them is changed. Models of the same sizes are timed once.
    """
    longest = longest_sequence(subjects[0].model)
    length = seq_len if longest is None else min(seq_len, longest)
    sizes = [each.structure.sizes for each in subjects]
    timed = [each for index, each in enumerate(subjects) if sizes[index] not in sizes[:index]]
    times = _latencies([each.model for each in timed], batch_size, length)
    by_size = [(each.structure.sizes, time) for each, time in zip(timed, times, strict=True)]
    return [
        _counted(each, next(time for size, time in by_size if size == each.structure.sizes), batch_size, length)
        for each in subjects
    ]


def _counted(subject: Subject, latency: float | None, batch_size: int, length: int) -> Figures:
    model, size = subject.model, Size.of(subject.structure, subject.structure.sizes, length)
    stored = {value.data_ptr(): value.numel() * value.element_size() for value in model.state_dict().values()}
    return Figures(
        parameters=size.parameters,
        parameters_without_embeddings=size.parameters_without_embeddings,
        layer_parameters=size.layer_parameters,
        macs=size.macs,
        megabytes=sum(stored.values()) / 1e6,
        latency_ms=latency,
        batch_size=batch_size,
        seq_len=length,
        device=torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        metrics=dict(subject.scores),
    )


def _latencies(models: Sequence[PreTrainedModel], batch_size: int, length: int) -> list[float | None]:
    """Return the median milliseconds of each model's forward pass; None for all where one cannot be timed."""
    with same_random_state(), reading(*models), torch.inference_mode():
        try:
            inputs = [synthetic_inputs(model, batch_size=batch_size, seq_len=length) for model in models]
            passes = [partial(model, **given) for model, given in zip(models, inputs, strict=True)]
            times = in_turn(passes, models[0].device, warmup=1, seconds=_SECONDS)
        except Exception:  # whatever a model says to inputs that are made up, its run goes on
            return [None] * len(models)
    return [1e3 * float(np.median(each)) for each in times]


def compared(before: Figures, after: Figures) -> list[tuple[str, ...]]:
    """Return the figures of two models side by side: the name of each, both values, and what became of it."""
    rows: list[tuple[str, ...]] = []
    for name in [*before.metrics, *(name for name in after.metrics if name not in before.metrics)]:
        values = [figures.metrics.get(name) for figures in (before, after)]
        shown = ["" if value is None else f"{value:.4f}" for value in values]
        change = "" if None in values else f"{values[1] - values[0]:+.4f}"  # type: ignore[operator]
        rows.append((name.removeprefix("eval_"), shown[0], shown[1], change))
    rows.append(
        ("weights", *(f"{each.megabytes:.1f} MB" for each in (before, after)), _share(before, after, "megabytes"))
    )
    for name, label in _SIZES.items():
        counts = [amount(getattr(figures, name)) for figures in (before, after)]
        rows.append((label, *counts, _share(before, after, name)))
    if before.latency_ms and after.latency_ms:
        times = [f"{each.latency_ms:.2f} ms" for each in (before, after)]
        ratio = before.latency_ms / after.latency_ms
        told = f"{ratio:.1f}x faster" if ratio > 1.05 else f"{1 / ratio:.1f}x slower" if ratio < 0.95 else ""
        rows.append(("latency", *times, told))
    return rows


def _share(before: Figures, after: Figures, name: str) -> str:
    whole, left = getattr(before, name), getattr(after, name)
    return f"{whole / left:.1f}x smaller" if left and whole != left else ""
