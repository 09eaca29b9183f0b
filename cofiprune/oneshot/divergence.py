"""How far a model's answers are from another's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from cofiprune.data.tasks import supported_kwargs, task_of
from cofiprune.distillation import PredictionKind, logit_loss, predictions
from cofiprune.oneshot.layerwise import Batch, placed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Answers = tuple[Tensor, ...]


def kind_of(model: PreTrainedModel) -> PredictionKind:
    """Return how a model's predictions are compared: by the head's task, by squares where that says nothing."""
    task = task_of(model)
    if task == "multiple-choice":
        return "classification"
    if task in get_args(PredictionKind):
        return task  # type: ignore[return-value]
    return "regression"


@torch.no_grad()
def answers(model: PreTrainedModel, batches: Sequence[Batch]) -> list[Answers]:
    """Return the predictions of a model to each batch.

    :raises TeacherError: when its output holds none that are known.
    """
    return [
        predictions(model(**placed(batch, model), **supported_kwargs(model, return_dict=True))) for batch in batches
    ]


@torch.no_grad()
def divergence(
    model: PreTrainedModel,
    reference: Sequence[Answers],
    batches: Sequence[Batch],
    *,
    hidden: Sequence[int] | None = None,
) -> float:
    """Return how far the predictions of a model are from others: 0 where they are equal, infinite for no number.

    The measure is `logit_loss` at temperature 1: a KL in nats for classes and spans, a mean squared error for scores
    and states.

    :param reference: predictions to the same batches.
    :param hidden: the reference's dimension of each of the model's, for an encoder without a head that has fewer.
    """
    kind = kind_of(model)
    total = 0.0
    for batch, theirs in zip(batches, reference, strict=True):
        ours = predictions(model(**placed(batch, model), **supported_kwargs(model, return_dict=True)))
        theirs = tuple(part.to(mine) for part, mine in zip(theirs, ours, strict=True))
        if kind == "embedding" and hidden is not None:
            theirs = tuple(part[..., list(hidden)] for part in theirs)
        mask = batch.get("attention_mask")
        mask = mask if mask is not None and mask.dim() == 2 else None
        total += float(logit_loss(ours, theirs, temperature=1.0, kind=kind, mask=mask))
    mean = total / max(len(batches), 1)
    return max(mean, 0.0) if math.isfinite(mean) else math.inf  # a KL of next to nothing can round to less
