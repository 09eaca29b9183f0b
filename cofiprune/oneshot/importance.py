"""Importance of units from the weights alone or from activations, and scores that compare across groups.

A unit's importance is a share: the importances of a group sum to one, so that groups of different sizes and
scales compare. From the weights it is the product of the shares that the unit has in the squared norms of what
writes into it and what reads from it (both halves matter: a unit that is never written is as dead as one that is
never read). From activations it is the share of the energy that the matrices reading the units put out because
of it, tr(W_u G_u W_u^T) for the unit's columns W_u and the Gram matrix G_u of its activations: the
activation-weighted norm of Wanda (Sun et al., 2024, arXiv:2306.11695), summed over the whole unit. The bias of a
block's last projection can take over the mean of what is removed, so there G_u is taken about the mean (FLAP, An
et al., 2024, arXiv:2312.11983).

Scores give a balanced plan by one threshold. Without training nothing makes up for a bottleneck, and a block that is
gone altogether cannot be reconstructed. So every group gives up about the same share of its units, those that matter
least inside the group, and the coarse kinds, hidden dimensions and whole blocks, hold out longest: at a threshold t
they give up t ** COARSE. Between units of the same rank, the one goes first that matters less among the groups of the
same kind and size (ranking structurally identical groups only: Isomorphic Pruning, Fang et al., 2024,
arXiv:2407.04616).

Shapes: n units of a group, b elements of a unit, N positions of a batch that are not padding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cofiprune.data.batches import to_model
from cofiprune.hooks import After, Before, watching
from cofiprune.oneshot.layerwise import Batch, linears, valid_rows
from cofiprune.structure import Group, Kind, Side, Structure, UnitKind

COARSE = 16
"""Exponent by which hidden dimensions and whole blocks hold out longer: with half of the heads gone none go, with 90 %
18 %."""


def weight_importance(model: nn.Module, structure: Structure) -> dict[str, Tensor]:
    """Return the importance of the units of every group: [n], sums to one; of a block's gate any positive number."""
    squares: defaultdict[str, defaultdict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    values = dict(model.named_parameters())
    for spec in structure.parameters:
        if not structure.in_layers(spec) or (len(spec.shape) == 1 and spec.name.endswith("bias")):
            continue
        for dim, side in enumerate(spec.sides):
            if side is not None and side.role != "zero":
                part = "scales" if len(spec.shape) == 1 else "reads" if dim else "writes"
                rows = _by_unit(values[spec.name].detach().cpu().double().square(), dim, side)
                squares[side.group][part].append(rows.sum(dim=(1, 2)))
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

    A block's own is the energy of its output relative to that of the residual stream after its layer.
    """
    readers = {
        path: _Reader(path, side, centred=spec.gated)
        for path, spec in linears(model, structure)
        # A matrix whose columns are zeroed reads something else beside the units (relative positions).
        if structure.in_layers(spec) and (side := spec.sides[1]) is not None and side.role != "zero"
    }
    streams = dict.fromkeys(structure.layers, 0.0)

    def read(path: str, batch: Batch) -> Before:
        return lambda module, args, kwargs: readers[path].add(valid_rows(args[0], batch))

    def leave(path: str, batch: Batch) -> After:
        def add(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            streams[path] += float(valid_rows(states, batch).square().sum())

        return add

    for batch in batches:
        before, after = {path: read(path, batch) for path in readers}, {path: leave(path, batch) for path in streams}
        with watching(model, before=before, after=after):
            model(**to_model(batch, model))
    gates = {block.inner: block.gate for block in structure.blocks}
    shares: defaultdict[str, list[Tensor]] = defaultdict(list)
    found = {}
    for reader in readers.values():
        if not reader.rows:
            continue  # not called as a module
        energies = reader.energies(model)
        name = reader.side.group
        shares[name].append(_share(energies))
        layer = structure[name].layer
        if layer is not None and name in gates:
            found[gates[name]] = (energies.sum() / max(streams[structure.layers[layer]], 1e-30)).reshape(1)
    return {**found, **{name: torch.stack(parts).mean(0) for name, parts in shares.items()}}


def scores(
    structure: Structure,
    importance: Mapping[str, Tensor],
    units: str | Sequence[UnitKind] | None = None,
) -> dict[str, Tensor]:
    """Return scores in (0, 1] of the units that may be removed, [n] by group name; those with the highest stay.

    The best unit of every group scores 1, of whole blocks the best of each kind, so that a threshold removes no block
    before it has gone through all other units.

    :param importance: by group name, [n] of any scale per kind; for a block's gate, its importance among the blocks.
    """
    chosen = {group.name: group for group in structure.select(units)}
    gates = [block.gate for block in structure.blocks if block.gate in chosen and block.inner in chosen]
    found = {name: torch.ones(1, dtype=torch.float64) for name in gates}
    same: defaultdict[tuple[Kind, int], list[Group]] = defaultdict(list)
    for name, group in chosen.items():
        if name not in found:
            same[group.kind, group.size].append(group)
    for alike in same.values():
        ranks = _rank(torch.cat([importance[group.name] for group in alike]))
        for group, rank in zip(alike, torch.split(ranks, [group.size for group in alike]), strict=True):
            best = importance[group.name].argmax()
            share = (_order(importance[group.name]) + rank) / group.size
            if group.kind not in ("attention", "ffn") or rank[best] == ranks.max():
                share[best] = 1
            found[group.name] = share if group.kind in ("heads", "intermediate") else share ** (1 / COARSE)
    return found


def worth(
    structure: Structure,
    importance: Mapping[str, Tensor],
    units: str | Sequence[UnitKind] | None = None,
) -> dict[str, Tensor]:
    """Return what is lost with each unit that may be removed, [n] by group name, for choosing sizes of whole groups.

    A block is worth 1 in its units, and by its rank among the blocks up to 1 more when it goes as a whole; a hidden
    dimension is worth its share of every block.
    """
    chosen = structure.select(units)
    found: dict[str, Tensor] = {}
    gates = [group for group in chosen if group.kind in ("attention", "ffn")]
    if gates:
        for group, rank in zip(gates, _rank(torch.cat([importance[group.name] for group in gates])), strict=True):
            found[group.name] = 1 + rank.reshape(1)
    for group in chosen:
        if group.name not in found:
            shares = importance[group.name] / importance[group.name].sum()
            found[group.name] = shares * (len(structure.blocks) if group.kind == "hidden" else 1)
    return found


@dataclass
class _Reader:
    """A matrix that reads the units of a group, and the statistics of what it reads."""

    module: str
    side: Side
    centred: bool
    rows: int = 0
    gram: Tensor | float = 0.0
    """[n, b, b]"""
    total: Tensor | float = 0.0
    """[n, b]"""

    def add(self, rows: Tensor) -> None:
        """Add the rows of a batch: [N, width]."""
        units = _by_unit(rows, 1, self.side)  # [n, b, N]
        self.gram = self.gram + (units @ units.transpose(1, 2)).cpu().double()
        self.total = self.total + units.sum(dim=2).cpu().double()
        self.rows += len(rows)

    def energies(self, model: nn.Module) -> Tensor:
        """[n]: summed squares of what the matrix puts out because of each unit."""
        gram, total = torch.as_tensor(self.gram), torch.as_tensor(self.total)
        if self.centred:
            gram = gram - total.unsqueeze(2) * total.unsqueeze(1) / self.rows
        weight = model.get_parameter(f"{self.module}.weight")
        columns = _by_unit(weight.detach().cpu().double(), 1, self.side)  # [n, b, outputs]
        return (gram * (columns @ columns.transpose(1, 2))).sum(dim=(1, 2)).clamp(min=0)


def _by_unit(values: Tensor, dim: int, side: Side) -> Tensor:
    """Bring the units to the front: [n, b, everything else]."""
    rows = values.movedim(dim, 0).reshape(side.copies, side.units, side.block, -1)
    return rows.transpose(0, 1).reshape(side.units, side.copies * side.block, -1)


def _share(values: Tensor) -> Tensor:
    """Divide by the sum; equal shares when all are zero."""
    total = values.sum()
    return values / total if float(total) > 0 else torch.full_like(values, 1 / len(values))


def _order(values: Tensor) -> Tensor:
    """Count the values below each, [n]; of equal ones the first is below the others."""
    order = torch.empty_like(values)
    order[values.argsort(stable=True)] = torch.arange(len(values), dtype=values.dtype)
    return order


def _rank(values: Tensor) -> Tensor:
    """The share of values below each, in (0, 1)."""
    return (_order(values) + 0.5) / len(values)
