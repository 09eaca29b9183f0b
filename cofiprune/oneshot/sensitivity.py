"""How much a model's answers depend on what its blocks put out, position by position and in which directions.

The answers f of an example change by J d when a block's output changes by d. For r of independent standard normals,
the gradient g of r . f with respect to the output has E[g g^T] = J^T J: one backward pass per batch estimates the
Gauss-Newton matrix of every block's output without bias and without labels (as in `fisher`).

Shapes: B examples, T positions, N positions of a batch that are not padding, H hidden, n inputs of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cofiprune.data.tasks import supported_kwargs
from cofiprune.distillation import predictions
from cofiprune.hooks import frozen
from cofiprune.oneshot.fisher import counted_outputs
from cofiprune.oneshot.layerwise import Batch, Projection, placed, valid_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOOR = 0.02
"""Least weight of a position, relative to the mean: answers that one position gives must not leave a fit of the others
without any rows."""


@dataclass(frozen=True)
class Passed:
    """What passed a place in a batch, with the derivative of the answers."""

    inputs: Tensor
    """[N, n]: of the map there."""
    gradients: Tensor
    """[N, H] with respect to its output, or [N, n] with respect to its input."""
    weights: Tensor
    """[N]: squared norms of the gradients, divided by their mean over the example, at least `FLOOR`."""


Places = Mapping[str, Sequence[str]]
"""Paths of linear maps by the name of the place where they are; those of one place read the same."""


def passed(
    model: PreTrainedModel, wanted: Mapping[str, Projection], batches: Sequence[Batch], *, seed: int
) -> Iterator[dict[str, Passed]]:
    """Run a model forward and backward and give what passed its blocks, by gate, for every batch.

    :param wanted: the blocks' last projections, by gate; gradients are those with respect to what they put out.
    :param batches: on any device; padding is left out of everything.
    """
    places = {gate: (projection.module,) for gate, projection in wanted.items()}
    return _passed(model, places, batches, _watched_outputs, seed=seed)


def entered(
    model: PreTrainedModel, places: Places, batches: Sequence[Batch], *, seed: int
) -> Iterator[dict[str, Passed]]:
    """The same for what maps read; gradients are those with respect to it, summed over the maps of a place."""
    return _passed(model, places, batches, _watched_inputs, seed=seed)


class _Seen:
    """What the hooks of a forward pass have noted."""

    def __init__(self) -> None:
        self.states: dict[str, Tensor] = {}
        self.probes: dict[str, Tensor] = {}
        """Zeros that are added to what is looked at."""

    def probe(self, place: str, like: Tensor) -> Tensor:
        """The zeros of a place: the same for all maps there."""
        if place not in self.probes:
            self.probes[place] = torch.zeros_like(like, requires_grad=True)
        return self.probes[place]


Watch = Callable[[nn.Module, str, _Seen], RemovableHandle]


def _watched_outputs(module: nn.Module, place: str, seen: _Seen) -> RemovableHandle:
    def note(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.states[place] = args[0].detach()
        return output + seen.probe(place, output)

    return module.register_forward_hook(note)


def _watched_inputs(module: nn.Module, place: str, seen: _Seen) -> RemovableHandle:
    def note(module: nn.Module, args: Any) -> tuple[Any, ...]:
        seen.states[place] = args[0].detach()
        return (args[0] + seen.probe(place, args[0]), *args[1:])

    return module.register_forward_pre_hook(note)


def _passed(
    model: PreTrainedModel, places: Places, batches: Sequence[Batch], watch: Watch, *, seed: int
) -> Iterator[dict[str, Passed]]:
    if not places:
        return
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for batch in batches:
        with frozen(model), torch.enable_grad():
            states, gradients = _run(model, places, placed(batch, model), watch, generator)
        yield {place: _of(states[place], gradients[place], batch) for place in states}


def _run(
    model: PreTrainedModel, places: Places, inputs: Batch, watch: Watch, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inputs of the maps, and the gradients of a random projection of the answers."""
    seen = _Seen()
    with ExitStack() as hooks:
        for place, paths in places.items():
            for path in paths:
                hooks.callback(watch(model.get_submodule(path), place, seen).remove)
        answered = predictions(model(**inputs, **supported_kwargs(model, return_dict=True)))
    probes = seen.probes
    if not probes:
        return {}, {}  # none of the maps is called as a module
    outputs = [counted_outputs(part, inputs) for part in answered]
    noise = [torch.randn(part.shape, generator=generator, device=part.device, dtype=part.dtype) for part in outputs]
    projected = torch.stack([(part * r).sum() for part, r in zip(outputs, noise, strict=True)]).sum()
    found = torch.autograd.grad(projected, list(probes.values()), allow_unused=True)
    return seen.states, {
        place: torch.zeros_like(probe) if gradient is None else gradient
        for (place, probe), gradient in zip(probes.items(), found, strict=True)
    }


def _of(states: Tensor, gradient: Tensor, batch: Batch) -> Passed:
    squares = (
        gradient.to(torch.promote_types(torch.float32, gradient.dtype)).square().sum(dim=-1, keepdim=True)
    )  # [B, T, 1]
    rows = valid_rows(gradient, batch)
    return Passed(valid_rows(states, batch), rows, _relative(squares, batch))


def _relative(squares: Tensor, batch: Batch) -> Tensor:
    """[N]: squares by their mean over the real positions of the example, with a floor."""
    mask = batch.get("attention_mask")
    lined_up = mask is not None and squares.shape[:-1] == mask.shape
    real = (mask != 0).to(squares).unsqueeze(-1) if lined_up and mask is not None else torch.ones_like(squares)
    axes = tuple(range(1, squares.dim()))
    mean = (squares * real).sum(axes, keepdim=True) / real.sum(axes, keepdim=True).clamp(min=1)
    # Answers that do not depend on the block at all weigh all positions alike.
    relative = torch.where(mean > 0, squares / mean.clamp(min=torch.finfo(squares.dtype).tiny), 1.0)
    return valid_rows((1 - FLOOR) * relative + FLOOR, batch)[:, 0]
