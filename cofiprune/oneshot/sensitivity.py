"""Gauss-Newton sensitivity of a model's outputs: to the output of each block, to what is read, and to each mask.

The outputs f of an example change by J d when something inside changes by d. For r of independent standard normals, the
gradient g of r . f has E[g g^T] = J^T J: one backward pass per batch estimates the Gauss-Newton matrix without bias and
without labels. For log-probabilities it is the Fisher information.

Shapes: B examples, T positions, N positions of a batch that are not padding, H hidden, n inputs of a linear layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cofiprune.data.batches import model_inputs, to_model
from cofiprune.data.tasks import supported_kwargs
from cofiprune.distillation import predictions
from cofiprune.hooks import After, Before, evaluating, frozen, watching
from cofiprune.masks import MaskRegistry
from cofiprune.oneshot.layerwise import Batch, projections, valid_rows
from cofiprune.structure import Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOOR = 0.02
"""Least weight of a position, relative to the mean: outputs that one position gives must not leave a fit of the others
without any rows."""
BATCHES = 32
Places = Mapping[str, Sequence[str]]
"""Paths of linear layers by the name of the place where they are; those of one place read the same. A place of which
none is called as a module is left out."""


@dataclass(frozen=True)
class Sensitivity:
    """The inputs at a place in a batch, with the derivative of the model's outputs."""

    inputs: Tensor
    """[N, n]: of the linear layer there."""
    gradients: Tensor
    """[N, H] with respect to its output, or [N, n] with respect to its input."""
    weights: Tensor
    """[N]: squared norms of the gradients, divided by their mean over the example, at least `FLOOR`."""


def sensitivity(
    model: PreTrainedModel, places: Places, batches: Sequence[Batch], *, seed: int, of_inputs: bool = False
) -> Iterator[dict[str, Sensitivity]]:
    """Run a model forward and backward and give the sensitivity at some places, by name, for every batch.

    :param batches: on any device; padding is left out of everything.
    :param of_inputs: to what the layers of a place read, summed over them; else to the output of the one layer there.
    """
    if not places:
        return
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for batch in batches:
        inputs, gradients = _probed(model, places, to_model(batch, model), generator, of_inputs=of_inputs)
        yield {place: _of(inputs[place], gradient, batch) for place, gradient in gradients.items()}


def position_weights(
    model: PreTrainedModel, structure: Structure, batches: Sequence[Batch], *, seed: int
) -> dict[str, list[Tensor]]:
    """Return how much the outputs depend on each position: [N] for every batch, by the path of a last projection."""
    last = {path: (path,) for paths in projections(model, structure).values() for path in paths}
    found: dict[str, list[Tensor]] = {path: [] for path in last}
    for seen in sensitivity(model, last, batches, seed=seed):
        for path, what in seen.items():
            found[path].append(what.weights)
    return found


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

    It is the mean squared derivative of the outputs with respect to the unit's mask at one, summed over outputs: the
    diagonal of the Gauss-Newton matrix, by which Kwon et al. (2022, arXiv:2204.09656) rank.

    :param masks: attached to the model, all ones.
    :param batches: `limit` of them are used; labels in them are not.
    """
    generator = torch.Generator(masks[names[0]].device).manual_seed(seed)
    values = {name: torch.ones_like(masks[name], requires_grad=True) for name in names}
    squares = {name: torch.zeros_like(masks[name]) for name in names}
    with evaluating(model):
        try:
            for batch in itertools.islice(batches, limit):
                masks.bind(values)
                projected = _projected(model, to_model(model_inputs(batch, model), model), generator)
                gradients = torch.autograd.grad(projected, list(values.values()))
                for name, gradient in zip(values, gradients, strict=True):
                    squares[name] += gradient.square()
        finally:
            masks.unbind()
    return squares


def _probed(
    model: PreTrainedModel, places: Places, batch: Batch, generator: torch.Generator, *, of_inputs: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the inputs at some places, and the gradients of a random projection of the outputs, by place.

    A gradient is that of zeros added there, the same for all layers of a place.
    """
    inputs: dict[str, Tensor] = {}
    zeros: dict[str, Tensor] = {}

    def added(place: str, states: Tensor) -> Tensor:
        if place not in zeros:
            zeros[place] = torch.zeros_like(states, requires_grad=True)
        return states + zeros[place]

    def before(place: str) -> Before:
        def note(module: nn.Module, args: Any, kwargs: Any) -> Any:
            inputs[place] = args[0].detach()
            return ((added(place, args[0]), *args[1:]), kwargs) if of_inputs else None

        return note

    def after(place: str) -> After:
        return lambda module, args, kwargs, output: None if of_inputs else added(place, output)

    by_path = {path: place for place, paths in places.items() for path in paths}
    entered = {path: before(place) for path, place in by_path.items()}
    left = {path: after(place) for path, place in by_path.items()}
    with frozen(model), torch.enable_grad(), watching(model, before=entered, after=left):
        projected = _projected(model, batch, generator)
        if not zeros:
            return inputs, {}
        found = torch.autograd.grad(projected, list(zeros.values()), allow_unused=True, materialize_grads=True)
    return inputs, dict(zip(zeros, found, strict=True))


def _projected(model: PreTrainedModel, inputs: Batch, generator: torch.Generator) -> Tensor:
    """Return a random projection of a model's outputs: a scalar."""
    found = predictions(model(**inputs, **supported_kwargs(model, return_dict=True)))
    outputs = [_without_padding(part, inputs) for part in found]
    noise = [torch.randn(part.shape, generator=generator, device=part.device, dtype=part.dtype) for part in outputs]
    return torch.stack([(part * r).sum() for part, r in zip(outputs, noise, strict=True)]).sum()


def _without_padding(predicted: Tensor, inputs: Batch) -> Tensor:
    """Return predictions [B, T, ...] with zeros at padding; others as they are."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or predicted.dim() < 2 or predicted.shape[:2] != mask.shape:
        return predicted
    return torch.where(mask.reshape(*mask.shape, *[1] * (predicted.dim() - 2)) != 0, predicted, 0.0)


def _of(states: Tensor, gradient: Tensor, batch: Batch) -> Sensitivity:
    squares = gradient.to(torch.promote_types(torch.float32, gradient.dtype)).square().sum(dim=-1, keepdim=True)
    return Sensitivity(valid_rows(states, batch), valid_rows(gradient, batch), _relative(squares, batch))


def _relative(squares: Tensor, batch: Batch) -> Tensor:
    """Divide squares [B, T, 1] by their mean over the valid positions of the example, with a floor: [N]."""
    mask = batch.get("attention_mask")
    lined_up = mask is not None and squares.shape[:-1] == mask.shape
    valid = (mask != 0).to(squares).unsqueeze(-1) if lined_up and mask is not None else torch.ones_like(squares)
    axes = tuple(range(1, squares.dim()))
    mean = (squares * valid).sum(axes, keepdim=True) / valid.sum(axes, keepdim=True).clamp(min=1)
    # Outputs that do not depend on the block at all weigh all positions alike.
    relative = torch.where(mean > 0, squares / mean.clamp(min=torch.finfo(squares.dtype).tiny), 1.0)
    return valid_rows((1 - FLOOR) * relative + FLOOR, batch)[:, 0]
