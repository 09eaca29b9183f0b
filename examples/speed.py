"""Seconds per example of several models on the rows of a task, measured in turn."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from cofiprune.data.batches import to_model
from cofiprune.data.prepare import prepare
from cofiprune.data.tasks import label_names
from cofiprune.hooks import evaluating
from cofiprune.timing import cpu_threads, in_turn


@dataclass(frozen=True)
class Speed:
    """What a model takes for a batch of the task's rows, padded to the longest row of the batch."""

    seconds_per_example: float
    batch_size: int
    batches: int
    """How many different batches were timed."""
    runs: int
    """Timed passes over each; the median of a batch counts."""
    tokens: float
    """Mean length of the batches, padding included."""

    @property
    def examples_per_second(self) -> float:
        return 1 / self.seconds_per_example


def speeds(
    models: Sequence[PreTrainedModel],
    rows: Sequence[Sequence[dict[str, Any]]],
    *,
    batch_size: int = 128,
    batches: int = 4,
    runs: int = 5,
    warmup: int = 1,
    threads: int | None = None,
) -> list[Speed]:
    """Time the forward pass of models on rows that are tokenised already, each model on the device that it is on.

    The batches are rows in their own order, spread evenly over all of them. They are on the device before the clock
    starts, and the device has finished before it stops. The models take turns, so that a change in the machine's
    clock or load meets all of them.

    :param rows: for each model, in the tokens of its own tokenizer.
    :param batches: how many to time at most; a last one that is not full is left out, unless it is the only one.
    :param runs: timed passes over each batch.
    :param warmup: passes over each batch before the timed ones.
    :param threads: of the CPU; torch's present number by default.
    """
    inputs = [_batches(model, own, batch_size, batches) for model, own in zip(models, rows, strict=True)]
    passes = [partial(model, **batch) for model, own in zip(models, inputs, strict=True) for batch in own]
    with ExitStack() as stack:
        stack.enter_context(cpu_threads(threads))
        for model in models:
            stack.enter_context(evaluating(model))
        stack.enter_context(torch.inference_mode())
        times = in_turn(passes, models[0].device, runs=runs, warmup=warmup)
    found = []
    for own in inputs:
        medians, times = [float(np.median(one)) for one in times[: len(own)]], times[len(own) :]
        shapes = [batch["input_ids"].shape for batch in own]
        found.append(
            Speed(
                seconds_per_example=sum(medians) / sum(shape[0] for shape in shapes),
                batch_size=shapes[0][0],
                batches=len(own),
                runs=runs,
                tokens=sum(shape[0] * shape[1] for shape in shapes) / sum(shape[0] for shape in shapes),
            )
        )
    return found


def _batches(
    model: PreTrainedModel, rows: Sequence[dict[str, Any]], batch_size: int, most: int
) -> list[dict[str, torch.Tensor]]:
    """Batches without labels, spread evenly over the rows, on the model's device."""
    whole = max(1, len(rows) // batch_size)
    chosen = sorted({round(place) for place in np.linspace(0, whole - 1, min(most, whole))})
    unlabelled = [{name: value for name, value in row.items() if name not in label_names(model)} for row in rows]
    picked = [row for place in chosen for row in unlabelled[place * batch_size : (place + 1) * batch_size]]
    cut = prepare(picked, model, batch_size=batch_size, need_labels=False, name="the validation rows")
    return [to_model(batch, model) for batch in cut]
