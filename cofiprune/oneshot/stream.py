"""The residual stream in one shot: which of its dimensions go, and what the norms over it make of the others.

A hidden dimension is written and read in every layer. What it costs to lose it is what it costs all places that read
the stream, when each of them fits its other inputs to make up for it (`surgeon.stream_curve`). That leaves out the
norms: their statistics are those of the dimensions that stay, which scales every state by a factor of its own. On
average over the rows that is an affine map of each dimension, and so the norms' own weights and biases can undo it.

Shapes: H hidden, N positions of a batch that are not padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cofiprune.oneshot.heads import head_maps
from cofiprune.oneshot.layerwise import Batch, Enough, placed, readers, valid_rows
from cofiprune.oneshot.loss_curves import Curve, Moments, stream_curve
from cofiprune.oneshot.sensitivity import entered
from cofiprune.structure import Block, Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RIDGE = 1e-3
"""Pull of a norm's factors towards 1, relative to the mean variance of a dimension."""


def hidden_curve(model: PreTrainedModel, structure: Structure, batches: Sequence[Batch], *, seed: int) -> Curve | None:
    """What it costs to lose ever more hidden dimensions; None where nothing that reads them can be watched.

    :param batches: on any device.
    """
    places = _places(model, structure, placed(batches[0], model))
    width = structure["hidden"].size
    moments = {place: Moments(width, width) for place in places}
    for seen in entered(model, places, batches, seed=seed):
        for place, what in seen.items():
            moments[place].add(what)
    found = [part for part in moments.values() if part.rows and part.finite]
    return stream_curve(found) if found else None


def _places(model: PreTrainedModel, structure: Structure, batch: Batch) -> dict[str, list[str]]:
    """The maps that read the stream: those of a block read the same, those of the head are each on their own."""
    reading = {
        spec.name.rpartition(".")[0]
        for spec in structure.parameters
        if len(spec.sides) == 2 and spec.sides[1] is not None and spec.sides[1].group == "hidden"
    }
    found = {
        block.gate: [path for path in readers(model, structure, block) if path in reading] for block in structure.blocks
    }
    found |= {path: [path] for path in head_maps(model, structure, batch) if path in reading}
    return {place: paths for place, paths in found.items() if paths}


def norms_of(structure: Structure, block: Block) -> list[str]:
    """The norms over the stream that go with a block."""
    gates = {spec.name.rpartition(".")[0]: spec.gate for spec in structure.parameters}
    return [norm.module for norm in structure.norms if gates.get(norm.module) == block.gate]


def norms_outside(model: nn.Module, structure: Structure, batch: Batch) -> tuple[list[str], list[str]]:
    """The norms over the stream outside of the layers: those that run before them, and those that run after.

    :param batch: on the model's device.
    """
    inside = tuple(f"{path}." for path in structure.layers)
    paths = [norm.module for norm in structure.norms if not norm.module.startswith(inside)]
    order: list[str] = []
    with ExitStack() as hooks, torch.no_grad():
        for path in (*paths, structure.layers[0]):
            module = model.get_submodule(path)
            hooks.callback(module.register_forward_pre_hook(lambda *_, path=path: order.append(path)).remove)
        model(**batch)
    first = order.index(structure.layers[0]) if structure.layers[0] in order else len(order)
    return list(dict.fromkeys(order[:first])), list(dict.fromkeys(order[first + 1 :]))


def refit_outside(
    reference: nn.Module, small: nn.Module, paths: Sequence[str], keep: Tensor, batches: Sequence[Batch]
) -> None:
    """Refit norms outside of the layers, one after the other.

    :param keep: hidden dimensions of the reference that the small model has.
    :param batches: on the models' device.
    """
    for path in paths:
        fit = AffineFit(len(keep))
        for batch in batches:
            given, wanted = (valid_rows(_output(model, path, batch), batch) for model in (small, reference))
            fit.add(given, wanted[:, keep.to(wanted.device)])
        fit.correct(small.get_submodule(path))


@torch.no_grad()
def _output(model: nn.Module, path: str, batch: Batch) -> Tensor:
    """What a module puts out; the pass ends there."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        found.append(output.clone())
        raise Enough

    handle = model.get_submodule(path).register_forward_hook(note)
    try:
        model(**batch)
    except Enough:
        pass
    finally:
        handle.remove()
    return found[0]


class AffineFit:
    """A regression of each dimension on itself: a factor and a shift, from sums over batches."""

    def __init__(self, width: int) -> None:
        """Start empty, for so many dimensions."""
        self.rows = 0
        self.sums = torch.zeros(4, width, dtype=torch.float64)

    def add(self, given: Tensor, wanted: Tensor) -> None:
        """Add the rows of a batch: [N, H] as it is, and as it should be."""
        given, wanted = given.double().cpu(), wanted.double().cpu()
        self.rows += len(given)
        self.sums += torch.stack([part.sum(dim=0) for part in (given, wanted, given.square(), given * wanted)])

    def correct(self, norm: nn.Module) -> None:
        """Put the factors and shifts into a norm's weight and bias, as far as it has them and they learn."""
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        if not self.rows or weight is None or not weight.requires_grad:
            return
        given, wanted, squares, products = self.sums / self.rows
        shifts = bias is not None and bias.requires_grad
        variance, covariance = (squares - given.square(), products - given * wanted) if shifts else (squares, products)
        pull = RIDGE * variance.mean() + torch.finfo(torch.float64).tiny
        factor = (covariance + pull) / (variance + pull)
        if not bool(factor.isfinite().all()):
            return
        with torch.no_grad():
            weight.mul_(factor.to(weight))
            if bias is not None and shifts:
                bias.mul_(factor.to(bias)).add_((wanted - factor * given).to(bias))
