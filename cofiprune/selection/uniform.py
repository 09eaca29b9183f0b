"""The same shape in every layer: as many heads, as many feed-forward dimensions, and some layers gone as a whole.

That is less free than a shape for every block and loses more, but a plain configuration can say it. Where the family's
configuration derives the width of a head from the hidden size, heads and hidden dimensions go together or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cofiprune.accounting import Cost
from cofiprune.errors import TargetError
from cofiprune.selection.curves import Losses
from cofiprune.selection.target import Target
from cofiprune.structure import Block, Structure

_HIDDEN_LEVELS = 24


@dataclass(frozen=True)
class _Layer:
    """The blocks of a layer that is there, and what it loses by keeping its best units."""

    attention: Block
    ffn: Block
    heads: Sequence[float]
    """[1 + heads]: what is lost by how many are kept."""
    intermediate: Sequence[float]
    whole: float
    """What is lost with all of the layer."""
    may_go: bool


@dataclass(frozen=True)
class Shape:
    """Sizes that every layer has."""

    hidden: int
    heads: int
    layers: tuple[int, ...]
    """Which of the layers stay."""


def uniform_sizes(structure: Structure, lost: Losses, target: Target) -> dict[str, int]:
    """Return how many units of each group stay, the same in each layer that does.

    For every number of layers, heads and hidden dimensions there is one number of feed-forward dimensions that meets
    the target; the combination that loses the least is taken.

    :raises TargetError: when no shape meets the target, or layers differ already.
    """
    layers = _layers(structure, lost)
    cost = target.cost(structure)
    hidden_lost = lost.by_count.get("hidden")
    best: tuple[float, dict[str, int]] | None = None
    nearest = float("inf")
    for shape in _shapes(structure, layers, lost, target):
        sizes, intermediate = _fitting(structure, layers, shape, cost, target, "intermediate" in _kinds(lost))
        off = abs(cost.exact(sizes) - target.budget)
        nearest = min(nearest, off, key=abs)
        if off > target.tolerance * target.total:
            continue
        loss = 0.0 if hidden_lost is None else float(hidden_lost[shape.hidden])
        for index, layer in enumerate(layers):
            kept = index in shape.layers
            loss += layer.heads[shape.heads] + layer.intermediate[intermediate] if kept else layer.whole
        if loss < (float("inf") if best is None else best[0]):
            best = loss, sizes
    if best is None:
        off = nearest / target.total
        raise TargetError(f"{target} cannot be met with the same shape in every layer: the nearest is {off:.4f} of the "
                          "whole away. Allow more units, or leave out uniform")  # fmt: skip
    return best[1]


def _kinds(lost: Losses) -> set[str]:
    return {name.rpartition(".")[2] for name in lost.by_count}


def _layers(structure: Structure, lost: Losses) -> list[_Layer]:
    by_layer: dict[int, dict[str, Block]] = {}
    for block in structure.blocks:
        group = structure[block.gate]
        by_layer.setdefault(group.layer or 0, {})[group.kind] = block
    found = []
    for index, blocks in sorted(by_layer.items()):
        if set(blocks) != {"attention", "ffn"}:
            raise TargetError(f"layer {index} has lost a block already: it cannot have the shape of the others")
        attention, ffn = blocks["attention"], blocks["ffn"]
        heads, intermediate = (_inner(structure, lost, block) for block in (attention, ffn))
        whole = lost.block(attention) + lost.block(ffn)
        may_go = attention.gate in lost.gates and ffn.gate in lost.gates
        found.append(_Layer(attention, ffn, heads, intermediate, whole, may_go))
    sizes = {(len(layer.heads), len(layer.intermediate)) for layer in found}
    if len(sizes) > 1:
        raise TargetError("the layers have different sizes already: prune the dense model")
    return found


def _inner(structure: Structure, lost: Losses, block: Block) -> Sequence[float]:
    if block.inner is None or block.inner not in structure:
        return [0.0, 0.0]
    if block.inner in lost.by_count:
        return [float(value) for value in lost.by_count[block.inner]]
    return [float("inf")] * structure[block.inner].size + [0.0]


def _shapes(structure: Structure, layers: list[_Layer], lost: Losses, target: Target) -> Iterator[Shape]:
    """All combinations of layers, heads and hidden dimensions that may be tried."""
    order = sorted(range(len(layers)), key=lambda index: layers[index].whole)
    droppable = len(layers) - 1 if all(layer.may_go for layer in layers) else 0
    for gone in range(droppable + 1):
        kept = tuple(sorted(order[gone:]))
        for hidden, heads in _widths(structure, layers, lost, target):
            yield Shape(hidden, heads, kept)


def _widths(structure: Structure, layers: list[_Layer], lost: Losses, target: Target) -> list[tuple[int, int]]:
    """Hidden sizes and numbers of heads that go together."""
    full = structure["hidden"].size if "hidden" in structure else 0
    all_heads = len(layers[0].heads) - 1
    heads = range(1, all_heads + 1) if "heads" in _kinds(lost) else [all_heads]
    if target.tied_heads:
        both = "heads" in _kinds(lost) and "hidden" in lost.by_count
        return [(count * full // all_heads, count) for count in (heads if both else [all_heads])]
    step = target.round_to
    spread = {max(step, step * round(level * full / _HIDDEN_LEVELS / step)) for level in range(1, _HIDDEN_LEVELS)}
    hidden = sorted({full, *(size for size in spread if size <= full)}) if "hidden" in lost.by_count else [full]
    return [(size, count) for size in hidden for count in heads]


def _fitting(
    structure: Structure, layers: list[_Layer], shape: Shape, cost: Cost, target: Target, cuts: bool
) -> tuple[dict[str, int], int]:
    """The sizes of a shape with the number of feed-forward dimensions that comes nearest, and that number."""
    full, step = len(layers[0].intermediate) - 1, target.round_to

    def sizes_at(intermediate: int) -> dict[str, int]:
        sizes = dict(structure.sizes)
        if "hidden" in structure:
            sizes["hidden"] = shape.hidden
        for index, layer in enumerate(layers):
            there = index in shape.layers
            for block, units in ((layer.attention, shape.heads), (layer.ffn, intermediate)):
                sizes[block.gate] = int(there)
                if block.inner is not None and block.inner in structure:
                    sizes[block.inner] = units if there else 0
        return sizes

    if not cuts:
        return sizes_at(full), full
    low, high = 1, max(1, full // step)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost.exact(sizes_at(middle * step)) <= target.budget else (low, middle - 1)
    tried = {min(full, count * step) for count in (low, low + 1)} | ({full} if low == full // step else set())
    chosen = min(tried, key=lambda count: abs(cost.exact(sizes_at(count)) - target.budget))
    return sizes_at(chosen), chosen
