"""Choosing a level for each block by its scores, for structures that go in large steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cofiprune.accounting import Cost
from cofiprune.selection.reachable import RESOLUTION, amounts, cuts, hidden_sizes, slack_of, steps
from cofiprune.selection.target import TOLERANCE
from cofiprune.structure import Block, Structure


@dataclass(frozen=True)
class _Option:
    """One level of a block: how many steps of the cost it gives up and the scores lost with it."""

    step: int
    loss: float
    group: str | None
    """The group cut; None for the block as it is."""
    size: int
    """The size that it is cut to."""


def by_blocks(
    structure: Structure, scores: Mapping[str, Tensor], cost: Cost, wanted: int, *, start: int
) -> dict[str, Tensor]:
    """Choose a level for each block by dynamic programming over the discretised cost.

    For structures that go in large steps: loses the least score among the combinations that come
    nearest to what is wanted.

    :param start: the number of hidden dimensions to stay near.
    """
    total = cost.exact(structure.sizes)
    aim = (total - wanted) / total * RESOLUTION
    hidden = _fitting_hidden(structure, set(scores), cost, aim, start)
    full = {**structure.sizes, "hidden": hidden}
    tables = [_options(block, scores, cost, full, total) for block in structure.blocks]
    best = torch.full((RESOLUTION + 1,), torch.inf, dtype=torch.float64)
    best[steps(total - cost.exact(full), total)] = 0
    choices = []
    for table in tables:
        rows = torch.full((len(table), RESOLUTION + 1), torch.inf, dtype=torch.float64)
        for row, option in zip(rows, table, strict=True):
            row[option.step :] = best[: len(best) - option.step] + option.loss
        best, choice = rows.min(dim=0)
        choices.append(choice)
    distance = (torch.arange(RESOLUTION + 1) - aim).abs().masked_fill(torch.isinf(best), torch.inf)
    slack = max(float(distance.min()), 0.6 * TOLERANCE * RESOLUTION)
    position = int(best.masked_fill(distance > slack, torch.inf).argmin())
    kept = {name: torch.ones(len(score), dtype=torch.bool) for name, score in scores.items()}
    if "hidden" in scores:
        kept["hidden"][scores["hidden"].argsort()[: len(scores["hidden"]) - hidden]] = False
    for block, table, choice in zip(reversed(structure.blocks), reversed(tables), reversed(choices), strict=True):
        option = table[int(choice[position])]
        position -= option.step
        if option.group == block.gate:
            for name in (block.gate, block.inner):
                if name is not None and name in kept:
                    kept[name][:] = False
        elif option.group is not None:
            score = scores[option.group]
            kept[option.group][score.argsort()[: len(score) - option.size]] = False
    return kept


def _fitting_hidden(structure: Structure, chosen: set[str], cost: Cost, aim: float, start: int) -> int:
    """The number of hidden dimensions nearest to `start` with which a number of steps can be removed."""
    sizes = hidden_sizes(structure, chosen)
    if len(sizes) == 1:
        return sizes[0]
    found = (float("inf"), start)
    for hidden in sorted(sizes, key=lambda size: abs(size - start)):
        levels = amounts(structure, chosen, cost, hidden).nonzero().flatten()
        distance = float((levels - aim).abs().min())
        if distance <= slack_of(structure):
            return hidden
        found = min(found, (distance, hidden))
    return found[1]


def _options(
    block: Block, scores: Mapping[str, Tensor], cost: Cost, full: Mapping[str, int], total: int
) -> list[_Option]:
    lowest = min(float(score.min()) for score in scores.values()) - 1

    def loss(name: str | None, count: int) -> float:
        """Scores lost when a group is cut to its best `count` units."""
        if name is None or name not in scores:
            return 0.0
        return float((scores[name] - lowest).sort().values[: len(scores[name]) - count].sum())

    found = [_Option(0, 0.0, None, 0)]
    for name, size, saved in cuts(block, set(scores), cost, full):
        lost = loss(name, size) + (loss(block.inner, 0) if name == block.gate else 0.0)
        found.append(_Option(steps(saved, total), lost, name, size))
    return found
