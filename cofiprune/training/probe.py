"""How fast this machine trains a model: a few steps that change nothing."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cofiprune.adapter import structure as structure_of
from cofiprune.data.batches import ROWS, Batch, Batches, to_model
from cofiprune.data.tasks import label_names, supported_kwargs
from cofiprune.distillation import predictions
from cofiprune.oneshot.layerwise import counted
from cofiprune.oneshot.with_data import FIT_POSITIONS, sweeps
from cofiprune.training.budget import Pace, median, one_shot_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS = 4
"""Of which the first is not timed."""


def measure_pace(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Batches,
    *,
    steps_per_epoch: int,
    target: float,
) -> Pace:
    """Time a few training steps of a model, and its teacher on the same rows; weights and random state stay.

    :param batches: of this process; those of the first epoch are used.
    :param target: the sparsity that one shot would go to.
    """
    batches.set_epoch(0)
    batches.skip(0)
    left_out = {ROWS, *label_names(model)}
    taken = [
        {name: value for name, value in to_model(batch, model).items() if name not in left_out}
        for batch in itertools.islice(batches, STEPS)
    ]
    structure = structure_of(model)
    positions = sum(counted(model, structure, batch) for batch in taken) / len(taken)
    training = model.training
    model.train()
    try:
        with torch.random.fork_rng():
            step = _timed(lambda batch: _step(model, batch), taken)
    finally:
        model.train(training)
    asked = 0.0 if teacher is None else _timed(lambda batch: _ask(teacher, batch), taken)
    rows = min(FIT_POSITIONS / max(positions, 1.0), float(len(batches)))
    return Pace(step, asked, steps_per_epoch, rows * one_shot_steps(sweeps(1 - target)) * step)


def _timed(run: Callable[[Batch], None], batches: list[Batch]) -> float:
    """Median seconds of all runs but the first, which pays for what is set up once."""
    found = []
    for batch in batches:
        started = time.perf_counter()
        run(batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return median(found[1:] or found)


def _step(model: PreTrainedModel, batch: Batch) -> None:
    """A forward and a backward pass, of which nothing is kept."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = torch.stack([part.float().square().mean() for part in _answers(model, batch)]).sum()
    if learning:
        torch.autograd.grad(loss, learning, allow_unused=True)


@torch.no_grad()
def _ask(teacher: PreTrainedModel, batch: Batch) -> None:
    _answers(teacher, batch)


def _answers(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, ...]:
    return predictions(model(**batch, **supported_kwargs(model, return_dict=True)))
