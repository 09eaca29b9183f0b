"""How much a model's predictions depend on each unit: what the gates are ordered by before they learn.

The importance of a unit is the mean squared derivative of the predictions with respect to its mask at
one, summed over outputs: the diagonal of the Gauss-Newton matrix, which for log-probabilities is the
Fisher information that Kwon et al. (2022, arXiv:2204.09656) rank by. It needs no labels. One random
projection per batch estimates it without bias: for r of independent standard normals,
E[(d(r . f)/dm)^2] is the sum over examples and outputs of (df/dm)^2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cofiprune.data.batches import ROWS
from cofiprune.data.tasks import label_names, supported_kwargs
from cofiprune.distillation import predictions
from cofiprune.masks import MaskRegistry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCHES = 32


def measured_importance(
    model: PreTrainedModel,
    masks: MaskRegistry,
    names: Sequence[str],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    seed: int,
    limit: int = BATCHES,
) -> dict[str, Tensor]:
    """Return the importance of every unit of some groups, [units] by group name.

    :param masks: attached to the model, all ones.
    :param batches: `limit` of them are used; labels in them are not.
    """
    training = model.training
    model.train(False)
    device = masks[names[0]].device
    generator = torch.Generator(device).manual_seed(seed)
    labels = {ROWS, *label_names(model)}
    values = {name: torch.ones_like(masks[name], requires_grad=True) for name in names}
    squares = {name: torch.zeros_like(masks[name]) for name in names}
    try:
        for batch in itertools.islice(batches, limit):
            inputs = {name: value.to(device) for name, value in batch.items() if name not in labels}
            masks.bind(values)
            outputs = [
                counted_outputs(part, inputs)
                for part in predictions(model(**inputs, **supported_kwargs(model, return_dict=True)))
            ]
            noise = [torch.randn(part.shape, generator=generator, device=device, dtype=part.dtype) for part in outputs]
            projected = torch.stack([(part * r).sum() for part, r in zip(outputs, noise, strict=True)]).sum()
            gradients = torch.autograd.grad(projected, list(values.values()))
            for name, gradient in zip(values, gradients, strict=True):
                squares[name] += gradient.square()
    finally:
        masks.unbind()
        model.train(training)
    return squares


def counted_outputs(predicted: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Predictions [B, T, ...] with zeros at padding; others as they are."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or predicted.dim() < 2 or predicted.shape[:2] != mask.shape:
        return predicted
    return torch.where(mask.reshape(*mask.shape, *[1] * (predicted.dim() - 2)) != 0, predicted, 0.0)
