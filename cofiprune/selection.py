"""From scores to a plan of exactly the size asked for.

Learned gates end near the target, not on it. A plan is read off their scores in two moves: one
threshold for all units puts the sparsity just below the target, then single units of the blocks that
are left are given up, lowest score first, until nothing smaller would come nearer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cofiprune.accounting import Cost, layer_parameters
from cofiprune.allocation import allocate
from cofiprune.errors import TargetError
from cofiprune.losses import Losses
from cofiprune.plan import Plan
from cofiprune.structure import UNIT_KINDS, Block, Group, Structure, UnitKind
from cofiprune.target import TOLERANCE, Target
from cofiprune.uniform import uniform_sizes

_RESOLUTION = 40_000
"""Steps that a cost is cut into where combinations of whole blocks are searched."""
_INNER_LEVELS = 128
_HIDDEN_LEVELS = 128
"""Sizes of a group that such a search tries: a linear cost then goes in steps of less than twice the tolerance."""


@dataclass(frozen=True)
class Reachable:
    """The sparsities that a choice of units can give."""

    highest: float
    fine: bool
    """Whether steps are small enough that everything between 0 and `highest` is within the tolerance."""
    levels: tuple[float, ...]
    """The sparsities that can be had, ascending, where steps are large; empty when `fine`."""

    def nearest(self, target: float) -> tuple[float, ...]:
        """The reachable sparsities around a target."""
        if self.fine:
            return (self.highest,)
        below = [level for level in self.levels if level <= target]
        above = [level for level in self.levels if level > target]
        return (*below[-1:], *above[:1])


def reachable(
    structure: Structure,
    cost: Cost,
    units: str | Sequence[UnitKind] | None = None,
    tolerance: float = TOLERANCE,
) -> Reachable:
    """Work out which sparsities can be reached by removing units of some kinds.

    :param units: unit kinds; None for all that the structure has.
    """
    groups = structure.select(_listed(units))
    chosen = {group.name for group in groups}
    highest = 1 - cost.exact(_least(structure, groups)) / cost.exact(structure.sizes)
    reached = torch.zeros(_RESOLUTION + 1, dtype=torch.bool)
    levels = reached.nonzero().flatten()
    for hidden in _hidden_sizes(structure, chosen):
        reached |= _reached(structure, chosen, cost, hidden)
        levels = reached.nonzero().flatten()
        ends = torch.tensor([0, round(highest * _RESOLUTION)])
        if int(torch.cat([levels, ends]).sort().values.diff().max()) <= 2 * _slack(structure, tolerance):
            return Reachable(highest, True, ())
    return Reachable(highest, False, tuple(level / _RESOLUTION for level in levels.tolist()))


def check_target(structure: Structure, target: Target, units: str | Sequence[UnitKind] | None = None) -> None:
    """Make sure that a target can be met within the tolerance by removing units of some kinds.

    :param structure: of the dense model, or of a smaller one that is to go on from where it is.
    :raises TargetError: saying what is reachable.
    """
    cost = target.cost(structure)
    total = cost.exact(structure.sizes)
    groups = structure.select(_listed(units))
    if not layer_parameters(structure).exact(structure.sizes):
        raise TargetError(f"nothing is left in the layers of this {structure.family} model that could be removed")
    if target.left >= total:
        raise TargetError(f"{target}: this {structure.family} model is there already, with {target.text(total)}")
    if target.uniform:
        alike = {group.name: torch.ones(group.size) for group in groups}
        uniform_sizes(structure, Losses.of(structure, alike), target)
    share = target.removed(structure)
    found = reachable(structure, cost, units, target.tolerance)
    kinds = [unit for unit in UNIT_KINDS if any(group.unit == unit for group in groups)]
    chosen = f"units {', '.join(kinds)}"
    if share > found.highest + target.tolerance:
        raise TargetError(
            f"{target} cannot be reached with {chosen} on this {structure.family} model: "
            f"removing all that can go gives {target.text((1 - found.highest) * total)}"
        )
    if not found.fine and min(abs(level - share) for level in found.levels) * _RESOLUTION > _slack(
        structure, target.tolerance
    ):
        near = " and ".join(target.text((1 - level) * total) for level in found.nearest(share))
        others = [unit for unit in UNIT_KINDS if unit not in kinds]
        more = f". More is reachable with other units too: {', '.join(others)}" if others else ""
        raise TargetError(
            f"{target} cannot be reached within {target.tolerance:.2g} with {chosen} on this {structure.family} model, "
            f"where they go in large steps; reachable next to it: {near}{more}"
        )


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
    wanted = round(target.left)
    if target.by_levels(structure):
        lost = Losses.of(structure, worth or _above_lowest(flat))
        kept = best_units(flat, sizes_for(structure, lost, target))
    else:
        kept = _threshold(structure, flat, cost, wanted)
        _trim(structure, flat, cost, wanted, kept)
    found = cost.exact(_counts(structure, kept))
    if abs(found - wanted) > target.tolerance * total and not target.by_levels(structure):
        kept = _by_blocks(structure, flat, cost, wanted, start=int(kept["hidden"].sum()) if "hidden" in kept else 0)
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


def _least(structure: Structure, groups: Sequence[Group]) -> dict[str, int]:
    chosen = {group.name for group in groups}
    counts = dict(structure.sizes)
    counts.update({name: 1 if name == "hidden" else 0 for name in chosen})
    for block in structure.blocks:
        if not counts[block.gate] or (block.inner is not None and not counts[block.inner]):
            counts[block.gate] = 0
    return counts


def _listed(units: str | Sequence[UnitKind] | None) -> str | tuple[UnitKind, ...] | None:
    return units if units is None or isinstance(units, str) else tuple(units)


def _slack(structure: Structure, tolerance: float = TOLERANCE) -> float:
    """A tolerance in steps of the search, less what rounding every block to whole steps can add up to."""
    return tolerance * _RESOLUTION - len(structure.blocks) - 1


def _hidden_sizes(structure: Structure, chosen: Iterable[str]) -> list[int]:
    """Numbers of hidden dimensions that a search tries: both ends, then the middle between any two, and so on."""
    if "hidden" not in structure:
        return [0]
    size = structure["hidden"].size
    if "hidden" not in chosen:
        return [size]
    sizes = _spread(size, _HIDDEN_LEVELS)
    order, stride = [len(sizes) - 1, 0], 2 ** len(sizes).bit_length()
    while stride > 1:
        order += range(stride // 2, len(sizes), stride)
        stride //= 2
    return [sizes[index] for index in dict.fromkeys(order)]


def _spread(size: int, levels: int) -> list[int]:
    """About `levels` numbers from 1 to size, ascending, both ends among them."""
    return sorted({1, *(max(1, round(level * size / levels)) for level in range(1, levels + 1))})


def _reached(structure: Structure, chosen: Iterable[str], cost: Cost, hidden: int) -> Tensor:
    """Whether each step of the cost can be removed with so many hidden dimensions: [_RESOLUTION + 1] bool."""
    names = set(chosen)
    full = {**structure.sizes, "hidden": hidden}
    total = cost.exact(structure.sizes)
    reached = torch.zeros(_RESOLUTION + 1, dtype=torch.bool)
    reached[_steps(total - cost.exact(full), total)] = True
    for block in structure.blocks:
        shifted = reached.clone()
        for step in {_steps(saved, total) for _, _, saved in _cuts(block, names, cost, full)}:
            shifted[step:] |= reached[: len(reached) - step]
        reached = shifted
    return reached


def _steps(saved: int, total: int) -> int:
    return saved * _RESOLUTION // total  # rounded down, so that all blocks together do not exceed the whole


def _cuts(block: Block, chosen: set[str], cost: Cost, full: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """The cuts of a block that a search tries: the group, the size that it is cut to, and the cost saved."""
    found = []
    whole = cost.exact(full)
    if block.inner is not None and block.inner in chosen:
        counts = _spread(full[block.inner], _INNER_LEVELS)[:-1]
        left = cost.along(full, block.inner, counts)
        found += [(block.inner, count, whole - each) for count, each in zip(counts, left, strict=True)]
    if block.gate in chosen or block.inner in chosen:
        found.append((block.gate, 0, whole - cost.exact({**full, block.gate: 0})))
    return found


@dataclass(frozen=True)
class _Option:
    """One level of a block: how many steps of the cost it gives up and the scores lost with it."""

    step: int
    loss: float
    group: str | None
    """The group cut; None for the block as it is."""
    size: int
    """The size that it is cut to."""


def _by_blocks(
    structure: Structure, scores: Mapping[str, Tensor], cost: Cost, wanted: int, *, start: int
) -> dict[str, Tensor]:
    """Choose a level for each block by dynamic programming over the discretised cost.

    For structures that go in large steps: loses the least score among the combinations that come
    nearest to what is wanted.

    :param start: the number of hidden dimensions to stay near.
    """
    total = cost.exact(structure.sizes)
    aim = (total - wanted) / total * _RESOLUTION
    hidden = _fitting_hidden(structure, set(scores), cost, aim, start)
    full = {**structure.sizes, "hidden": hidden}
    tables = [_options(block, scores, cost, full, total) for block in structure.blocks]
    best = torch.full((_RESOLUTION + 1,), torch.inf, dtype=torch.float64)
    best[_steps(total - cost.exact(full), total)] = 0
    choices = []
    for table in tables:
        rows = torch.full((len(table), _RESOLUTION + 1), torch.inf, dtype=torch.float64)
        for row, option in zip(rows, table, strict=True):
            row[option.step :] = best[: len(best) - option.step] + option.loss
        best, choice = rows.min(dim=0)
        choices.append(choice)
    distance = (torch.arange(_RESOLUTION + 1) - aim).abs().masked_fill(torch.isinf(best), torch.inf)
    slack = max(float(distance.min()), 0.6 * TOLERANCE * _RESOLUTION)
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
    _trim(structure, scores, cost, wanted, kept)
    return kept


def _fitting_hidden(structure: Structure, chosen: set[str], cost: Cost, aim: float, start: int) -> int:
    """The number of hidden dimensions nearest to `start` with which a number of steps can be removed."""
    sizes = _hidden_sizes(structure, chosen)
    if len(sizes) == 1:
        return sizes[0]
    found = (float("inf"), start)
    for hidden in sorted(sizes, key=lambda size: abs(size - start)):
        levels = _reached(structure, chosen, cost, hidden).nonzero().flatten()
        distance = float((levels - aim).abs().min())
        if distance <= _slack(structure):
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
    for name, size, saved in _cuts(block, set(scores), cost, full):
        lost = loss(name, size) + (loss(block.inner, 0) if name == block.gate else 0.0)
        found.append(_Option(_steps(saved, total), lost, name, size))
    return found
