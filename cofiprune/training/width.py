"""Vectors of the width that they had: a linear layer behind a narrower encoder, fitted to the teacher's vectors.

An index that was filled with a dense model's vectors can be searched with those of a pruned one only if both lie in one
space. Where hidden dimensions have gone, a `Dense` module maps what is left back to all of them, by least squares on
texts; what stays of the vectors is where it starts from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cofiprune.data.batches import Batches, model_inputs, to_model
from cofiprune.errors import SettingsError
from cofiprune.hooks import evaluating
from cofiprune.masking import masks_of
from cofiprune.oneshot.regression import LeastSquares
from cofiprune.whole import SENTENCES, Whole

ROWS = 20_000
"""Texts that the layer is fitted on, at most: fifty for each dimension of a small model."""


def check_keep_width(whole: Whole, asked: Any, *, has_data: bool) -> None:
    """Make sure that `keep_width` means something.

    :param asked: the value, or the values, of the target.
    :raises SettingsError: saying what it needs.
    """
    if whole.kind != SENTENCES:
        raise SettingsError(
            f"keep_width=True is for the vectors of a SentenceTransformer; a {type(whole.owner).__name__} was passed"
        )
    if not has_data:
        raise SettingsError("keep_width=True fits a layer on texts: it needs a train_dataset")
    if isinstance(asked, list):
        raise SettingsError("keep_width=True takes one target")


@torch.no_grad()
def widen(whole: Whole, teacher: Whole, batches: Batches) -> None:
    """Append the layer to a pruned object, in place; nothing where its vectors are as wide as the teacher's anyway.

    :param whole: with the masks of its plan attached.
    :param teacher: whose vectors are fitted.
    """
    masks = masks_of(whole.model)
    narrower = masks is not None and "hidden" in masks and bool((masks["hidden"] == 0).any()) and not whole.keeps_width
    for each in (whole, teacher):
        each.owner.to(whole.model.device)
    linear: nn.Linear | None = None
    rows = 0
    with evaluating(whole.owner, teacher.owner):
        for batch in batches:
            inputs = to_model(model_inputs(batch, whole.model), whole.model)
            ours, theirs = whole.vectors(inputs), teacher.vectors(inputs).float()
            if linear is None:
                if ours.shape == theirs.shape and not narrower:
                    return
                linear = _identity(ours.shape[1], theirs.shape[1]).to(ours.device)
                fit = LeastSquares.of(linear)
            fit.add(ours.float(), theirs - linear(ours.float()))
            rows += len(ours)
            if rows >= ROWS:
                break
    assert linear is not None
    fit.correct(linear)
    whole.append(linear.to(ours.dtype))


def _identity(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that hands on what it can, where both are of one space, and else puts out zeros."""
    linear = nn.Linear(inputs, outputs)
    nn.init.zeros_(linear.bias)
    (nn.init.eye_ if inputs == outputs else nn.init.zeros_)(linear.weight)
    return linear
