"""From importances to scores that compare across groups, so that one threshold gives a balanced plan.

One-shot pruning has no training to make up for a bottleneck, and a block that is gone altogether cannot be
repaired. So every group gives up about the same share of its units, those that matter least inside the group, and
the coarse kinds, hidden dimensions and whole blocks, hold out longest: at a threshold t they give up t ** COARSE.
Between units of the same rank, the one goes first that matters less among the groups of the same kind and size
(ranking structurally identical groups only: Isomorphic Pruning, Fang et al., 2024, arXiv:2407.04616).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from cofiprune.structure import Group, Kind, Structure, UnitKind

COARSE = 16
"""How much longer hidden dimensions and whole blocks hold out: at half of the heads gone, none; at 90 %, 18 %."""


def scores(
    structure: Structure,
    importance: Mapping[str, Tensor],
    units: str | Sequence[UnitKind] | None = None,
) -> dict[str, Tensor]:
    """Return scores in (0, 1] of the units that may be removed, [n] by group name; those with the highest stay.

    The best unit of every group scores 1, of whole blocks the best of each kind, so that a threshold removes no block
    before it has gone through all other units.

    :param importance: by group name, [n] of any scale per kind; for a block's gate, its importance among the blocks.
    :param units: unit kinds that may be removed; None for all that the structure has.
    """
    chosen = structure.select(units if units is None or isinstance(units, str) else tuple(units))
    names = {group.name for group in chosen}
    inner = {block.gate: block.inner for block in structure.blocks if block.inner in names}
    found = {name: torch.ones(1, dtype=torch.float64) for name in inner if name in names}
    for alike in _alike(group for group in chosen if group.name not in found).values():
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
    chosen = structure.select(units if units is None or isinstance(units, str) else tuple(units))
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


def _order(values: Tensor) -> Tensor:
    """How many values are below each, [n]; of equal ones the first is below the others."""
    order = torch.empty_like(values)
    order[values.argsort(stable=True)] = torch.arange(len(values), dtype=values.dtype)
    return order


def _rank(values: Tensor) -> Tensor:
    """The share of values below each, in (0, 1)."""
    return (_order(values) + 0.5) / len(values)


def _alike(groups: Iterable[Group]) -> dict[tuple[Kind, int], list[Group]]:
    """Collect groups of the same kind and size."""
    found: defaultdict[tuple[Kind, int], list[Group]] = defaultdict(list)
    for group in groups:
        found[group.kind, group.size].append(group)
    return found
