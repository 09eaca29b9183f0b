"""How much a unit matters, from the weights alone or from what flows through them.

A unit's importance is a share: the importances of a group sum to one, so that groups of different sizes and
scales compare. From the weights it is the product of the shares that the unit has in the squared norms of what
writes into it and what reads from it (both halves matter: a unit that is never written is as dead as one that is
never read). From activations it is the share of the energy that the matrices reading the units put out because
of it, tr(W_u G_u W_u^T) for the unit's columns W_u and the Gram matrix G_u of its activations: the
activation-weighted norm of Wanda (Sun et al., 2024, arXiv:2306.11695), summed over the whole unit. The bias of a
block's last projection can take over the mean of what is removed, so there G_u is taken about the mean (FLAP, An
et al., 2024, arXiv:2312.11983).

Shapes: n units of a group, b elements of a unit, N positions of a batch that are not padding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cofiprune.oneshot.layerwise import Batch, placed, valid_rows
from cofiprune.structure import Parameter, Side, Structure


def weight_importance(model: nn.Module, structure: Structure) -> dict[str, Tensor]:
    """Return the importance of the units of every group: [n], sums to one; of a block's gate any positive number."""
    squares: defaultdict[str, defaultdict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    values = dict(model.named_parameters())
    for spec in structure.parameters:
        if not structure.in_layers(spec) or (len(spec.shape) == 1 and spec.name.endswith("bias")):
            continue
        for dim, side in enumerate(spec.sides):
            if side is not None and side.role != "zero":
                rows = _by_unit(values[spec.name].detach().cpu().double().square(), dim, side)
                squares[side.group][_part(spec, dim)].append(rows.sum(dim=(1, 2)))
    found = {}
    for name, parts in squares.items():
        shares = [torch.stack([_share(part) for part in same]).mean(0) for same in parts.values()]
        found[name] = _share(torch.stack(shares).prod(0))
    for block in structure.blocks:
        sums = [torch.stack(same).sum() for same in squares[block.inner].values()] if block.inner else []
        found[block.gate] = torch.stack(sums).prod().reshape(1) if sums else torch.ones(1, dtype=torch.float64)
    return found


@torch.no_grad()
def activation_importance(model: nn.Module, structure: Structure, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Return the importance [n] of every group that an `nn.Linear` of the layers reads, and of the gates above those.

    A block's own is the energy of its output relative to that of the residual stream.
    """
    readers = list(_readers(model, structure))
    streams = [_Stream() for _ in structure.layers]
    with ExitStack() as hooks:
        for reader in readers:
            hooks.callback(model.get_submodule(reader.module).register_forward_pre_hook(reader.note).remove)
        for path, stream in zip(structure.layers, streams, strict=True):
            hooks.callback(model.get_submodule(path).register_forward_hook(stream.note).remove)
        for batch in batches:
            for reader in readers:
                reader.batch = batch
            for stream in streams:
                stream.batch = batch
            model(**placed(batch, model))
    return _collected(model, structure, [reader for reader in readers if reader.rows], streams)


def _collected(
    model: nn.Module, structure: Structure, readers: Sequence[_Reader], streams: Sequence[_Stream]
) -> dict[str, Tensor]:
    gates = {block.inner: block.gate for block in structure.blocks}
    shares: defaultdict[str, list[Tensor]] = defaultdict(list)
    found = {}
    for reader in readers:
        energies = reader.energies(model)
        name = reader.side.group
        shares[name].append(_share(energies))
        layer = structure[name].layer
        if layer is not None and name in gates:
            found[gates[name]] = (energies.sum() / max(streams[layer].energy, 1e-30)).reshape(1)
    return {**found, **{name: torch.stack(parts).mean(0) for name, parts in shares.items()}}


@dataclass
class _Stream:
    """The energy of the residual stream after a layer."""

    batch: Batch = field(default_factory=dict)
    energy: float = 0.0

    def note(self, module: nn.Module, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        self.energy += float(valid_rows(states, self.batch).square().sum())


@dataclass
class _Reader:
    """A matrix that reads the units of a group, and the statistics of what it reads."""

    module: str
    side: Side
    centred: bool
    batch: Batch
    rows: int = 0
    gram: Tensor | None = None
    """[n, b, b]"""
    total: Tensor | None = None
    """[n, b]"""

    def note(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        rows = valid_rows(args[0], self.batch)
        units = _by_unit(rows, 1, self.side)  # [n, b, N]
        gram = (units @ units.transpose(1, 2)).cpu().double()
        total = units.sum(dim=2).cpu().double()
        self.gram = gram if self.gram is None else self.gram + gram
        self.total = total if self.total is None else self.total + total
        self.rows += len(rows)

    def energies(self, model: nn.Module) -> Tensor:
        """[n]: summed squares of what the matrix puts out because of each unit."""
        assert self.gram is not None
        assert self.total is not None
        gram = self.gram
        if self.centred:
            gram = gram - self.total.unsqueeze(2) * self.total.unsqueeze(1) / self.rows
        weight = model.get_parameter(f"{self.module}.weight")
        columns = _by_unit(weight.detach().cpu().double(), 1, self.side)  # [n, b, outputs]
        return (gram * (columns @ columns.transpose(1, 2))).sum(dim=(1, 2)).clamp(min=0)


def _readers(model: nn.Module, structure: Structure) -> Iterator[_Reader]:
    for spec in structure.parameters:
        path, _, name = spec.name.rpartition(".")
        if name != "weight" or not structure.in_layers(spec) or len(spec.sides) != 2:
            continue
        side = spec.sides[1]
        # A matrix whose columns are zeroed reads something else beside the units (relative positions).
        if side is not None and side.role != "zero" and isinstance(model.get_submodule(path), nn.Linear):
            yield _Reader(path, side, centred=spec.gated, batch={})


def _part(spec: Parameter, dim: int) -> str:
    """The part that a parameter plays for the units along one of its dimensions."""
    if len(spec.shape) == 1:
        return "scales"
    return "writes" if dim == 0 else "reads"


def _by_unit(values: Tensor, dim: int, side: Side) -> Tensor:
    """Bring the units to the front: [n, b, everything else]."""
    rows = values.movedim(dim, 0).reshape(side.copies, side.units, side.block, -1)
    return rows.transpose(0, 1).reshape(side.units, side.copies * side.block, -1)


def _share(values: Tensor) -> Tensor:
    """Divide by the sum; equal shares when all are zero."""
    total = values.sum()
    return values / total if float(total) > 0 else torch.full_like(values, 1 / len(values))
