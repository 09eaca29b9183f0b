"""Choose a plan of exactly the target by scores: CoFi's own rule.

Learned gates end near the target, not on it. A plan is read off their scores in two moves: one threshold for all units
puts the sparsity just below the target, then single units of the blocks that are left are given up, lowest score first,
until nothing smaller would come nearer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

import torch
from torch import Tensor

from cofiprune.accounting import Cost
from cofiprune.plan import Plan
from cofiprune.selection.curves import LossCurve, units_kept
from cofiprune.selection.knapsack import best_sizes
from cofiprune.selection.target import Target
from cofiprune.structure import Structure


def select(
    structure: Structure,
    scores: Mapping[str, Tensor],
    target: Target,
    *,
    values: Mapping[str, Tensor] | None = None,
    worth: Mapping[str, Tensor] | None = None,
) -> Plan:
    """Choose the plan that meets a target, keeping the units with the highest scores, whatever their group.

    :param structure: of the dense model, or of a smaller one that is to go on from where it is.
    :param scores: by group name, [units]; groups that are not named stay whole.
    :param values: by group name, [units] in [0, 1]: factors of the kept units, folded in by `compact`.
    :param worth: by group name, [units], at least 0: what is lost with a unit, where sizes of whole groups are chosen;
        by default what its score is above the lowest one.
    :raises TargetError: when the plan's cost ends further than 0.005 of the whole from the target.
    """
    flat = {name: scores[name].detach().double().cpu() for name in structure if name in scores}
    cost = target.cost(structure)
    kept: dict[str, Tensor] = {}
    if not target.needs_levels(structure):
        kept = _threshold(structure, flat, cost, round(target.budget))
        _trim(structure, flat, cost, round(target.budget), kept)
    if not kept or not target.is_met(structure, _counts(structure, kept)):
        lowest = min(float(score.min()) for score in flat.values())
        lost = worth or {name: score - lowest for name, score in flat.items()}
        curves = {name: LossCurve.of(lost[name], score) for name, score in flat.items()}
        sizes = best_sizes(structure, curves, target)
        kept = units_kept(structure, curves, sizes)
        target.check(structure, sizes)
    factors = {name: mask.double() for name, mask in kept.items()}
    for name, value in (values or {}).items():
        if name in factors:
            soft = value.detach().double().cpu()
            factors[name] = factors[name] * torch.where(soft > 0, soft, factors[name])
    return Plan.from_values(structure, factors)


def _counts(structure: Structure, kept: Mapping[str, Tensor]) -> dict[str, int]:
    counts = {name: int(kept[name].sum()) if name in kept else size for name, size in structure.sizes.items()}
    return counts | {block.gate: 0 for block in structure.without_units(counts)}


def _threshold(structure: Structure, scores: Mapping[str, Tensor], cost: Cost, wanted: int) -> dict[str, Tensor]:
    """Keep the units above the lowest threshold whose plan costs no less than what is wanted."""
    levels = torch.unique(torch.cat(list(scores.values())))

    def keep(index: int) -> dict[str, Tensor]:
        found = {name: score >= levels[index] for name, score in scores.items()}
        if "hidden" in found and not bool(found["hidden"].any()):
            found["hidden"] = scores["hidden"] >= scores["hidden"].max()
        return found

    def costs_less(index: int) -> bool:
        return cost.exact(_counts(structure, keep(index))) < wanted

    return keep(bisect_left(range(1, len(levels)), True, key=costs_less))


def _trim(structure: Structure, scores: Mapping[str, Tensor], cost: Cost, wanted: int, kept: dict[str, Tensor]) -> None:
    """Give up single units, never whole blocks, lowest score first, until nothing smaller would come nearer.

    A first pass takes what fits into the surplus, a second one may end below the target, if that is nearer.
    """
    counts = _counts(structure, kept)
    living = {"hidden", *(block.inner for block in structure.blocks if counts[block.gate])}
    candidates = sorted(
        (float(scores[group.name][unit]), group.name, unit)
        for group in structure.groups
        if group.kind in ("intermediate", "heads", "hidden") and group.name in kept
        for unit in kept[group.name].nonzero().flatten().tolist()
    )
    surplus = cost.exact(counts) - wanted
    known: dict[str, int] = {}
    for slack in (1, 2):
        smallest = min((_saving(cost, counts, name) for name in {name for _, name, _ in candidates}), default=0)
        for _, name, unit in candidates:
            if slack * surplus < smallest:
                break
            if counts[name] <= 1 or not kept[name][unit] or name not in living:
                continue
            if name not in known:
                known[name] = _saving(cost, counts, name)
            if known[name] <= slack * surplus:
                kept[name][unit] = False
                counts[name] -= 1
                surplus -= known[name]
                # What a hidden dimension saves depends on all other sizes, and what other units save on those.
                known = {} if name == "hidden" else known
                known.pop("hidden", None)


def _saving(cost: Cost, counts: Mapping[str, int], name: str) -> int:
    if counts[name] < 1:
        return 0
    return cost.exact(counts) - cost.exact({**counts, name: counts[name] - 1})
