"""From scores to a plan of exactly the size asked for.

Learned gates end near the target, not on it. A plan is read off their scores in two moves: one
threshold for all units puts the sparsity just below the target, then single units of the blocks that
are left are given up, lowest score first, until nothing smaller would come nearer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cofiprune.accounting import Cost
from cofiprune.errors import TargetError
from cofiprune.plan import Plan
from cofiprune.structure import Block, Group, Structure, UnitKind

TOLERANCE = 0.005
_RESOLUTION = 40_000


def check_fraction(target: float, name: str = "target_sparsity") -> float:
    """Return a sparsity target as a float in (0, 1).

    :raises TargetError: for anything else; a percentage is recognised and the fraction suggested.
    """
    if isinstance(target, bool) or not isinstance(target, int | float):
        raise TargetError(f"{name} takes a number in (0, 1), not {target!r}")
    if 0 < target < 1:
        return float(target)
    hint = f"; {target:g} % is {name}={target / 100:g}" if 1 < target < 100 else ""
    raise TargetError(f"{name} is the share removed and lies in (0, 1); got {target:g}{hint}")


@dataclass(frozen=True)
class Reachable:
    """The sparsities that a choice of units can give."""

    highest: float
    fine: bool
    """Whether steps are small enough that everything between 0 and `highest` is within the tolerance."""
    levels: tuple[float, ...]
    """The sparsities that whole blocks and heads can give; empty when `fine`."""

    def nearest(self, target: float) -> tuple[float, ...]:
        """The reachable sparsities around a target."""
        if self.fine:
            return (self.highest,)
        below = [level for level in self.levels if level <= target]
        above = [level for level in self.levels if level > target]
        return (*below[-1:], *above[:1])


def reachable(structure: Structure, cost: Cost, units: Sequence[UnitKind] | None = None) -> Reachable:
    """Work out which sparsities can be reached by removing units of some kinds.

    :param units: unit kinds; None for all that the structure has.
    """
    groups = structure.select(None if units is None else tuple(units))
    least = _least(structure, groups)
    total = cost.exact(structure.sizes)
    highest = 1 - cost.exact(least) / total
    kinds = {group.unit for group in groups}
    if "intermediate" in kinds or "hidden" in kinds:
        return Reachable(highest, True, ())
    reached = torch.zeros(_RESOLUTION + 1, dtype=torch.bool)
    reached[0] = True
    for options in _block_options(structure, groups, cost):
        shifted = torch.zeros_like(reached)
        for removed in options:
            step = round(removed / total * _RESOLUTION)
            shifted[step:] |= reached[: len(reached) - step]
        reached = shifted
    levels = tuple(index / _RESOLUTION for index in reached.nonzero().flatten().tolist())
    return Reachable(highest, False, levels)


def check_target(structure: Structure, cost: Cost, target: float, units: Sequence[UnitKind] | None = None) -> None:
    """Make sure that a target can be met within the tolerance by removing units of some kinds.

    :raises TargetError: saying what is reachable.
    """
    found = reachable(structure, cost, units)
    chosen = "these units" if units is None else f"units {tuple(units)}"
    if target > found.highest + TOLERANCE:
        raise TargetError(
            f"sparsity {target:g} cannot be reached with {chosen} on this {structure.family} model: "
            f"removing all that can go gives {found.highest:.4f}"
        )
    if not found.fine and min(abs(level - target) for level in found.levels) > TOLERANCE - 1 / _RESOLUTION:
        near = " and ".join(f"{level:.4f}" for level in found.nearest(target))
        raise TargetError(
            f"sparsity {target:g} cannot be reached within {TOLERANCE} with {chosen}, which go in large steps; "
            f'reachable next to it: {near}. Units "intermediate" or "hidden" make every target reachable.'
        )


def select(
    structure: Structure,
    scores: Mapping[str, Tensor],
    cost: Cost,
    target: float,
    *,
    values: Mapping[str, Tensor] | None = None,
) -> Plan:
    """Choose the plan that removes `target` of a cost, keeping the units with the highest scores.

    Scores of all groups are compared with one another.

    :param scores: by group name, [units]; groups that are not named stay whole.
    :param values: by group name, [units] in [0, 1]: factors of the kept units, folded in by `compact`.
    :raises TargetError: when the sparsity ends further than 0.005 from the target.
    """
    flat = {name: scores[name].detach().double().cpu() for name in structure if name in scores}
    total = cost.exact(structure.sizes)
    wanted = total * (1 - target)
    kept = _threshold(structure, flat, cost, wanted)
    _trim(structure, flat, cost, wanted, kept)
    found = cost.exact(_counts(structure, kept))
    if abs(found - wanted) > TOLERANCE * total:
        kept = _by_blocks(structure, flat, cost, wanted, kept)
        found = cost.exact(_counts(structure, kept))
    if abs(found - wanted) > TOLERANCE * total:
        raise TargetError(f"the nearest plan to sparsity {target:g} has {1 - found / total:.4f}")
    factors = {name: mask.double() for name, mask in kept.items()}
    for name, value in (values or {}).items():
        if name in factors:
            soft = value.detach().double().cpu()
            factors[name] = factors[name] * torch.where(soft > 0, soft, factors[name])
    return Plan.from_values(structure, factors)


def _counts(structure: Structure, kept: Mapping[str, Tensor]) -> dict[str, int]:
    counts = {name: int(kept[name].sum()) if name in kept else size for name, size in structure.sizes.items()}
    for block in structure.blocks:
        if not counts[block.gate] or (block.inner is not None and not counts[block.inner]):
            counts[block.gate] = 0
    return counts


def _threshold(structure: Structure, scores: Mapping[str, Tensor], cost: Cost, wanted: float) -> dict[str, Tensor]:
    """Keep the units above the lowest threshold whose plan costs no less than what is wanted."""
    levels = torch.cat(list(scores.values())).unique()
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


def _trim(
    structure: Structure, scores: Mapping[str, Tensor], cost: Cost, wanted: float, kept: dict[str, Tensor]
) -> None:
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
    for slack in (1, 2):
        smallest = min((_saving(cost, counts, name) for name in {name for _, name, _ in candidates}), default=0)
        for _, name, unit in candidates:
            if slack * surplus < smallest:
                break
            if counts[name] <= 1 or not kept[name][unit] or not _is_alive(structure, counts, name):
                continue
            saved = _saving(cost, counts, name)
            if saved <= slack * surplus:
                kept[name][unit] = False
                counts[name] -= 1
                surplus -= saved


def _saving(cost: Cost, counts: Mapping[str, int], name: str) -> int:
    if counts[name] < 1:
        return 0
    return cost.exact(counts) - cost.exact({**counts, name: counts[name] - 1})


def _is_alive(structure: Structure, counts: Mapping[str, int], name: str) -> bool:
    return all(counts[block.gate] > 0 for block in structure.blocks if block.inner == name)


def _least(structure: Structure, groups: Sequence[Group]) -> dict[str, int]:
    chosen = {group.name for group in groups}
    counts = dict(structure.sizes)
    counts.update({name: 1 if name == "hidden" else 0 for name in chosen})
    for block in structure.blocks:
        if not counts[block.gate] or (block.inner is not None and not counts[block.inner]):
            counts[block.gate] = 0
    return counts


def _block_options(structure: Structure, groups: Sequence[Group], cost: Cost) -> list[list[int]]:
    """What each block can give up, in elements of the cost, when the hidden size stays."""
    chosen = {group.name for group in groups}
    full = dict(structure.sizes)
    total = cost.exact(full)
    options = []
    for block in structure.blocks:
        found = {0}
        if block.gate in chosen or block.inner in chosen:
            found.add(total - cost.exact({**full, block.gate: 0}))
        if block.inner is not None and block.inner in chosen:
            found.update(total - cost.exact({**full, block.inner: count}) for count in range(1, full[block.inner]))
        options.append(sorted(found))
    return options


@dataclass(frozen=True)
class _Option:
    """One level of a block: how many steps of the cost it gives up and the scores lost with it."""

    step: int
    loss: float
    group: str | None
    """The group cut; None for the block as it is."""
    count: int
    """Units of it given up, lowest scores first."""


_LEVELS = 32


def _by_blocks(
    structure: Structure, scores: Mapping[str, Tensor], cost: Cost, wanted: float, start: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Choose a level for each block by dynamic programming over the discretised cost.

    For structures that go in large steps: loses the least score among the combinations that come
    nearest to what is wanted. The hidden dimensions stay as they are in `start`.
    """
    full = {**structure.sizes, **({"hidden": int(start["hidden"].sum())} if "hidden" in start else {})}
    total = cost.exact(full)
    blocks = [block for block in structure.blocks if block.gate in scores or block.inner in scores]
    tables = [_options(block, scores, cost, full) for block in blocks]
    best = torch.full((_RESOLUTION + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0
    choices = []
    for table in tables:
        rows = torch.full((len(table), _RESOLUTION + 1), torch.inf, dtype=torch.float64)
        for row, option in zip(rows, table, strict=True):
            row[option.step :] = best[: len(best) - option.step] + option.loss
        best, choice = rows.min(dim=0)
        choices.append(choice)
    aim = (total - wanted) / total * _RESOLUTION
    distance = (torch.arange(_RESOLUTION + 1) - aim).abs().masked_fill(torch.isinf(best), torch.inf)
    slack = max(float(distance.min()), 0.6 * TOLERANCE * _RESOLUTION)
    position = int(best.masked_fill(distance > slack, torch.inf).argmin())
    kept = {name: torch.ones(len(score), dtype=torch.bool) for name, score in scores.items()}
    kept.update({name: mask for name, mask in start.items() if name == "hidden"})
    for block, table, choice in zip(reversed(blocks), reversed(tables), reversed(choices), strict=True):
        option = table[int(choice[position])]
        position -= option.step
        if option.group == block.gate:
            for name in (block.gate, block.inner):
                if name is not None and name in kept:
                    kept[name][:] = False
        elif option.group is not None:
            kept[option.group][scores[option.group].argsort()[: option.count]] = False
    _trim(structure, scores, cost, wanted, kept)
    return kept


def _options(block: Block, scores: Mapping[str, Tensor], cost: Cost, full: Mapping[str, int]) -> list[_Option]:
    total = cost.exact(full)
    lowest = min(float(score.min()) for score in scores.values()) - 1

    def step(changed: Mapping[str, int]) -> int:
        return round((total - cost.exact({**full, **changed})) / total * _RESOLUTION)

    found = [_Option(0, 0.0, None, 0)]
    whole = float((scores[block.gate] - lowest).sum()) if block.gate in scores else 0.0
    if block.inner is not None and block.inner in scores:
        losses = (scores[block.inner] - lowest).sort().values.cumsum(0)
        size = len(losses)
        counts = sorted({round(level * size / _LEVELS) for level in range(1, _LEVELS)} & set(range(1, size)))
        found += [
            _Option(step({block.inner: size - count}), float(losses[count - 1]), block.inner, count) for count in counts
        ]
        whole += float(losses[-1])
    return [*found, _Option(step({block.gate: 0}), whole, block.gate, 1)]
