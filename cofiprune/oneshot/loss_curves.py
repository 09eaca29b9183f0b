"""Loss curves of blocks: the order in which their units go, and the loss when the units that stay make up for them.

Structured optimal brain surgery (ZipLM, Kurtic et al., 2023, arXiv:2302.04089) under a Kronecker-factored loss (K-FAC,
Martens and Grosse, 2015, arXiv:1503.05671): a change D of the weights W of a block's last projection raises the loss by
tr(G D A D^T) / 2, A being the second moments of its inputs, weighted by how much the outputs depend on the position,
and G those of the outputs' derivatives with respect to its outputs. Removing the columns M costs least with
D = -W_M ((A^-1)_MM)^-1 (A^-1)_M, whatever G is, and then

    tr(G W_M ((A^-1)_MM)^-1 W_M^T) / 2.

The cheapest unit goes, the others take over, A^-1 is downdated, and so on: of two redundant units, only one
goes cheaply. Because all blocks count in the same loss, their curves compare. The bias is an input that is always 1 and
stays.

Shapes: n inputs of a projection, u units of b inputs each, H outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cofiprune.data.batches import to_model
from cofiprune.errors import DataError
from cofiprune.oneshot.layerwise import Batch, linears, projections, readers
from cofiprune.oneshot.reconstruction import head_linears
from cofiprune.oneshot.sensitivity import Sensitivity, sensitivity
from cofiprune.selection.curves import LossCurve
from cofiprune.structure import Side, Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RIDGE = 1e-3
"""Added to the second moments, relative to their mean: dead units and constant inputs have none of their own."""
UNWEIGHTED = 0.01
"""Part of the second moments in which all positions count alike, for directions that the outputs see nothing of yet."""
AT_ONCE = 0.1
"""Share of the units left that may go before the rest is looked at again, where a unit is a single input."""


class Moments:
    """Second moments around a block's last projection, summed over batches."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.weighted = torch.zeros(inputs + 1, inputs + 1)
        self.plain = torch.zeros(inputs + 1, inputs + 1)
        self.outputs = torch.zeros(outputs, outputs)
        self.weight = 0.0
        self.rows = 0
        self.batches = 0

    def add(self, seen: Sensitivity) -> None:
        """Add a batch."""
        rows, gradients = seen.inputs, seen.gradients
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        squares = gradients.square().sum(dim=1)
        self.weighted += ((rows * squares.unsqueeze(1)).T @ rows).cpu()
        self.plain += (rows.T @ rows).cpu()
        self.outputs += (gradients.T @ gradients).cpu()
        self.weight += float(squares.sum())
        self.rows += len(rows)
        self.batches += 1

    @property
    def finite(self) -> bool:
        """True if all statistics are finite."""
        return all(bool(torch.isfinite(part).all()) for part in (self.weighted, self.plain, self.outputs))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [n + 1, n + 1] and G [H, H], in float64; G has trace 1."""
        # Where the outputs see nothing of the block, its inputs say in which order its units go, at no cost.
        floor = UNWEIGHTED * self.weight / max(self.rows, 1) if self.weight else 1.0
        inputs = (self.weighted + floor * self.plain).double() / max(self.batches, 1)
        size = len(inputs) - 1
        inputs.diagonal()[:size] += RIDGE * inputs.diagonal()[:size].mean()
        inputs.diagonal().add_(1e-12 * float(inputs[-1, -1]) + torch.finfo(torch.float64).tiny)
        return inputs, self.outputs.double() / max(self.weight, torch.finfo(torch.float32).tiny)


def block_curves(
    model: PreTrainedModel, structure: Structure, gates: Sequence[str], batches: Sequence[Batch], *, seed: int
) -> dict[str, LossCurve]:
    """Return the curves of the inner units of some blocks, by gate.

    :param gates: of the blocks; those without a last projection that can be watched have no curve.
    :param batches: on any device.
    :raises DataError: when statistics are not finite.
    """
    last = {gate: paths for gate, paths in projections(model, structure).items() if gate in gates}
    every = [path for paths in last.values() for path in paths]
    moments = _moments(sensitivity(model, {path: (path,) for path in every}, batches, seed=seed))
    # Gradients carry what is not finite down to the blocks before; the inputs say where it comes from.
    source = [path for path, found in moments.items() if not bool(found.plain.isfinite().all())]
    for path in (*source, *moments):
        if not moments[path].finite:
            raise DataError(
                f"what passes {path} on the rows of the data set is not finite, so that there are no statistics of it. "
                "Look for values that overflow in the rows or, in half precision, in the model"
            )
    sides = {path: spec.sides[1] for path, spec in linears(model, structure)}
    curves = {}
    for gate, paths in last.items():
        side = sides[paths[0]]
        # Weights that another module reads itself are not seen.
        if side is not None and all(path in moments for path in paths):
            curves[gate] = curve({model.get_submodule(path): moments[path] for path in paths}, side)
    return curves


def curve(projections: Mapping[nn.Module, Moments], side: Side) -> LossCurve:
    """Remove the units of one projection, or those that several share, one after the other.

    :param projections: with their moments, which are finite.
    :param side: how the inputs of each divide into units.
    """
    return _removed([_state(module, moments, side) for module, moments in projections.items()], side.units)


def _state(module: nn.Module, moments: Moments, side: Side) -> _State:
    assert isinstance(module, nn.Linear)
    inputs, outputs = moments.factors()
    bias = torch.zeros(module.out_features) if module.bias is None else module.bias
    weight = torch.cat([module.weight.detach().cpu(), bias.detach().cpu().unsqueeze(1)], dim=1).double()
    # One unit after the other, and the bias last.
    order_of = torch.arange(side.length).view(side.copies, side.units, side.block).transpose(0, 1).flatten()
    columns = torch.cat([order_of, torch.tensor([side.length])])
    inverse = torch.linalg.inv(inputs[columns][:, columns])
    return _State(weight[:, columns], inverse, outputs, side.copies * side.block)


def hidden_curve(
    model: PreTrainedModel, structure: Structure, batches: Sequence[Batch], *, seed: int
) -> LossCurve | None:
    """Return the curve of the hidden dimensions; None where nothing that reads them can be watched.

    A hidden dimension is written and read in every layer. What it costs to lose it is what it costs all places that
    read the stream, when each of them fits its other inputs to make up for it: W is the identity there, and G is that
    of the derivatives with respect to what is read.

    :param batches: on any device.
    """
    places = _places(model, structure, to_model(batches[0], model))
    moments = _moments(sensitivity(model, places, batches, seed=seed, of_inputs=True))
    factors = [found.factors() for found in moments.values() if found.finite]
    width = structure["hidden"].size
    identity = torch.eye(width, width + 1, dtype=torch.float64)
    states = [_State(identity, torch.linalg.inv(inputs), outputs) for inputs, outputs in factors]
    return _removed(states, width) if states else None


def _moments(seen: Iterable[Mapping[str, Sensitivity]]) -> dict[str, Moments]:
    """Sum up what is seen in the batches, by place."""
    found: dict[str, Moments] = {}
    for batch in seen:
        for place, what in batch.items():
            if place not in found:
                found[place] = Moments(what.inputs.shape[1], what.gradients.shape[1])
            found[place].add(what)
    return found


def _places(model: PreTrainedModel, structure: Structure, batch: Batch) -> dict[str, list[str]]:
    """Return the linear layers that read the stream: those of a block read the same, each of the head by itself."""
    sides = {path: spec.sides[1] for path, spec in linears(model, structure)}
    reading = {path for path, side in sides.items() if side is not None and side.group == "hidden"}
    found = {
        block.gate: [path for path in readers(model, structure, block) if path in reading] for block in structure.blocks
    }
    found |= {path: [path] for path in head_linears(model, structure, batch) if path in reading}
    return {place: paths for place, paths in found.items() if paths}


def _removed(states: Sequence[_State], units: int) -> LossCurve:
    """Remove units that several projections share, the cheapest first, until none is left."""
    left = torch.arange(units)
    order: list[int] = []
    losses: list[float] = []
    while len(left):
        scores = torch.stack([state.scores(len(left)) for state in states]).sum(dim=0)
        together = max(1, int(AT_ONCE * len(left))) if states[0].block == 1 else 1
        gone = scores.argsort(stable=True)[:together]
        cost = sum(state.remove(gone, len(left)) for state in states)
        parts = scores[gone].clamp(min=0) + 1e-30
        for unit, part in zip(left[gone].tolist(), (parts * cost / parts.sum()).tolist(), strict=True):
            order.append(unit)
            losses.append(part + (losses[-1] if losses else 0.0))
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[gone] = False
        left = left[stays]
    return LossCurve(tuple(order), tuple(losses))


@dataclass
class _State:
    """A projection from which units are removed."""

    weight: Tensor
    """[H, n + 1], the bias last."""
    inverse: Tensor
    """[n + 1, n + 1] of the inputs' second moments."""
    outputs: Tensor
    """[H, H]"""
    block: int = 1

    def scores(self, units: int) -> Tensor:
        """[u]: what removing each of the units would cost."""
        block, columns = self.block, units * self.block
        grid = self.inverse[:columns, :columns].reshape(units, block, units, block)
        own = torch.linalg.inv(grid.diagonal(dim1=0, dim2=2).permute(2, 0, 1))  # [u, b, b]
        parts = self.weight[:, :columns].reshape(-1, units, block)
        seen = (self.outputs @ self.weight[:, :columns]).reshape(-1, units, block)
        return torch.einsum("hub,huc,ubc->u", parts, seen, own) / 2

    def remove(self, gone: Tensor, units: int) -> float:
        """Remove some units, let the others take over, and return what it cost."""
        columns = (gone.unsqueeze(1) * self.block + torch.arange(self.block)).flatten()
        own = torch.linalg.inv(self.inverse[columns][:, columns])
        weight = self.weight[:, columns]
        cost = float((own * (weight.T @ (self.outputs @ weight))).sum()) / 2
        taken_over = own @ self.inverse[columns]
        stays = torch.ones(len(self.inverse), dtype=torch.bool)
        stays[columns] = False
        self.weight = (self.weight - weight @ taken_over)[:, stays]
        self.inverse = (self.inverse - self.inverse[:, columns] @ taken_over)[stays][:, stays]
        return max(cost, 0.0)
