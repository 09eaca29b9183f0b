"""From scores to a plan of exactly the size asked for.

Learned gates end near the target, not on it. A plan is read off their scores in two moves: one
threshold for all units puts the sparsity just below the target, then single units of the blocks that
are left are given up, lowest score first, until nothing smaller would come nearer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cofiprune.accounting import Cost
from cofiprune.errors import TargetError
from cofiprune.plan import Plan
from cofiprune.selection.blockwise import by_blocks
from cofiprune.selection.curves import Losses
from cofiprune.selection.knapsack import allocate
from cofiprune.selection.target import Target
from cofiprune.selection.uniform import uniform_sizes
from cofiprune.structure import Structure


def select(
    structure: Structure,
    scores: Mapping[str, Tensor],
    target: Target,
    *,
    values: Mapping[str, Tensor] | None = None,
    worth: Mapping[str, Tensor] | None = None,
) -> Plan:
    """Choose the plan that leaves as much of a cost as the target says, keeping the units with the highest scores.

    Scores of all groups are compared with one another.

    :param structure: of the dense model, or of a smaller one that is to go on from where it is.
    :param scores: by group name, [units]; groups that are not named stay whole.
    :param values: by group name, [units] in [0, 1]: factors of the kept units, folded in by `compact`.
    :param worth: by group name, [units], at least 0: what is lost with a unit, for targets that are met by sizes of
        whole groups; by default what its score is above the lowest one.
    :raises TargetError: when the plan's cost ends further than 0.005 of the whole from the target.
    """
    flat = {name: scores[name].detach().double().cpu() for name in structure if name in scores}
    cost = target.cost(structure)
    total = cost.exact(structure.sizes)
    wanted = round(target.budget)
    if target.needs_levels(structure):
        lost = Losses.of(structure, worth or _above_lowest(flat))
        kept = best_units(flat, sizes_for(structure, lost, target))
    else:
        kept = _threshold(structure, flat, cost, wanted)
        _trim(structure, flat, cost, wanted, kept)
    found = cost.exact(_counts(structure, kept))
    if abs(found - wanted) > target.tolerance * total and not target.needs_levels(structure):
        kept = by_blocks(structure, flat, cost, wanted, start=int(kept["hidden"].sum()) if "hidden" in kept else 0)
        _trim(structure, flat, cost, wanted, kept)
        found = cost.exact(_counts(structure, kept))
    if abs(found - wanted) > target.tolerance * total:
        raise TargetError(f"the nearest plan to {target} has {target.text(found)}")
    factors = {name: mask.double() for name, mask in kept.items()}
    for name, value in (values or {}).items():
        if name in factors:
            soft = value.detach().double().cpu()
            factors[name] = factors[name] * torch.where(soft > 0, soft, factors[name])
    return Plan.from_values(structure, factors)


def sizes_for(structure: Structure, lost: Losses, target: Target, *, may_empty: bool = True) -> dict[str, int]:
    """How many units of each group stay, where that is decided for whole groups.

    :param may_empty: whether blocks may go whose gates have no loss of their own, by losing all of their units.
    :raises TargetError: when no sizes meet the target.
    """
    if target.uniform:
        return uniform_sizes(structure, lost, target)
    return allocate(structure, lost, target, may_empty=may_empty)


def best_units(scores: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The units with the highest scores, so many of each group: bool, [units]."""
    found = {}
    for name, score in scores.items():
        found[name] = torch.zeros(len(score), dtype=torch.bool)
        found[name][score.argsort(descending=True, stable=True)[: sizes[name]]] = True
    return found


def _above_lowest(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    lowest = min(float(score.min()) for score in scores.values())
    return {name: score - lowest for name, score in scores.items()}


def _counts(structure: Structure, kept: Mapping[str, Tensor]) -> dict[str, int]:
    counts = {name: int(kept[name].sum()) if name in kept else size for name, size in structure.sizes.items()}
    for block in structure.blocks:
        if not counts[block.gate] or (block.inner is not None and not counts[block.inner]):
            counts[block.gate] = 0
    return counts


def _threshold(structure: Structure, scores: Mapping[str, Tensor], cost: Cost, wanted: int) -> dict[str, Tensor]:
    """Keep the units above the lowest threshold whose plan costs no less than what is wanted."""
    levels = torch.unique(torch.cat(list(scores.values())))
    low, high = 0, len(levels) - 1

    def keep(index: int) -> dict[str, Tensor]:
        found = {name: score >= levels[index] for name, score in scores.items()}
        if "hidden" in found and not bool(found["hidden"].any()):
            found["hidden"] = scores["hidden"] >= scores["hidden"].max()
        return found

    while low < high:
        middle = (low + high + 1) // 2
        if cost.exact(_counts(structure, keep(middle))) >= wanted:
            low = middle
        else:
            high = middle - 1
    return keep(low)


def _trim(structure: Structure, scores: Mapping[str, Tensor], cost: Cost, wanted: int, kept: dict[str, Tensor]) -> None:
    """Give up single units, never whole blocks, lowest score first, until nothing smaller would come nearer.

    A first pass takes what fits into the surplus, a second one may end below the target, if that is nearer.
    """
    candidates = sorted(
        (float(scores[group.name][unit]), group.name, unit)
        for group in structure.groups
        if group.kind in ("intermediate", "heads", "hidden") and group.name in kept
        for unit in kept[group.name].nonzero().flatten().tolist()
    )
    counts = _counts(structure, kept)
    surplus = cost.exact(counts) - wanted
    known: dict[str, int] = {}
    for slack in (1, 2):
        smallest = min((_saving(cost, counts, name) for name in {name for _, name, _ in candidates}), default=0)
        for _, name, unit in candidates:
            if slack * surplus < smallest:
                break
            if counts[name] <= 1 or not kept[name][unit] or not _is_alive(structure, counts, name):
                continue
            if name not in known:
                known[name] = _saving(cost, counts, name)
            if known[name] <= slack * surplus:
                kept[name][unit] = False
                counts[name] -= 1
                surplus -= known[name]
                # What a unit saves depends on the sizes of other groups, of its own only where the cost is not linear.
                if name == "hidden":
                    known = {}
                else:
                    known.pop("hidden", None)
                    if not cost.linear:
                        known.pop(name, None)


def _saving(cost: Cost, counts: Mapping[str, int], name: str) -> int:
    if counts[name] < 1:
        return 0
    return cost.exact(counts) - cost.exact({**counts, name: counts[name] - 1})


def _is_alive(structure: Structure, counts: Mapping[str, int], name: str) -> bool:
    return all(counts[block.gate] > 0 for block in structure.blocks if block.inner == name)
