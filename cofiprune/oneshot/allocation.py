"""From importances to scores that compare across groups, so that one threshold gives a balanced plan.

One-shot pruning has no training to make up for a bottleneck, and a block that is gone altogether cannot be
repaired. So every group gives up about the same share of its units, and the coarse kinds, which all blocks share
(hidden dimensions) or which are whole blocks, hold out longest: at a threshold t they give up t ** COARSE. Within a
kind, units are compared inside their group and, as a second opinion, with the units of all groups of the same
shape (Isomorphic Pruning, Fang et al., 2024, arXiv:2407.04616).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from cofiprune.structure import Group, Kind, Structure, UnitKind

COARSE = 16
"""How much longer hidden dimensions and whole blocks hold out: at half of the heads gone, none; at 90 %, 18 %."""
SECOND_OPINION = 0.25
"""Weight of the comparison across groups against the one inside the group."""


def scores(
    structure: Structure,
    importance: Mapping[str, Tensor],
    units: str | Sequence[UnitKind] | None = None,
) -> dict[str, Tensor]:
    """Return scores in (0, 1] of the units that may be removed, [n] by group name; those with the highest stay.

    The best unit of every group scores 1, so that a threshold removes no block before it has gone through all others.

    :param importance: by group name, [n] of any scale per kind; for a block's gate, its importance among the blocks.
    :param units: unit kinds that may be removed; None for all that the structure has.
    """
    chosen = structure.select(units if units is None or isinstance(units, str) else tuple(units))
    names = {group.name for group in chosen}
    inner = {block.gate: block.inner for block in structure.blocks if block.inner in names}
    found = {name: torch.ones(1, dtype=torch.float64) for name in inner if name in names}
    for alike in _alike(group for group in chosen if group.name not in found).values():
        everywhere = _ranks(torch.cat([importance[group.name] for group in alike]))
        parts = torch.split(everywhere, [group.size for group in alike])
        for group, across in zip(alike, parts, strict=True):
            found[group.name] = _score(group, importance[group.name], across, largest=float(everywhere.max()))
    return found


def _score(group: Group, importance: Tensor, across: Tensor, *, largest: float) -> Tensor:
    if group.size == 1 and group.kind in ("attention", "ffn"):
        score = torch.where(across == largest, torch.ones_like(across), across)
    else:
        score = (1 - SECOND_OPINION) * _ranks(importance) + SECOND_OPINION * across
        score[importance.argmax()] = 1
    return score if group.kind in ("heads", "intermediate") else score ** (1 / COARSE)


def _ranks(values: Tensor) -> Tensor:
    """The share of values below each, in (0, 1)."""
    order = torch.empty_like(values)
    order[values.argsort(stable=True)] = torch.arange(len(values), dtype=values.dtype)
    return (order + 0.5) / len(values)


def _alike(groups: Iterable[Group]) -> dict[tuple[Kind, int], list[Group]]:
    """Collect groups of the same kind and size."""
    found: defaultdict[tuple[Kind, int], list[Group]] = defaultdict(list)
    for group in groups:
        found[group.kind, group.size].append(group)
    return found
