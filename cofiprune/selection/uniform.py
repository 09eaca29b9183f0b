"""The same shape in every layer: as many heads, as many feed-forward dimensions, and some layers gone as a whole.

That is less free than a shape for every block and loses more, but a configuration can state it. Where the family's
configuration derives the width of a head from the hidden size, heads and hidden dimensions go together or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cofiprune.errors import TargetError
from cofiprune.selection.curves import BlockTable, Curves, block_tables, hidden_sizes, sizes_of, spread
from cofiprune.selection.target import Target
from cofiprune.structure import Structure

_HIDDEN_LEVELS = 128
Layer = tuple[BlockTable, BlockTable]
"""The attention and the feed-forward block of a layer."""


@dataclass(frozen=True, order=True)
class _Shape:
    """Sizes that every layer has; the less is lost the better."""

    loss: float
    gone: tuple[int, ...]
    """Layers that go as a whole."""
    hidden: int
    heads: int
    intermediate: int
    off: float
    """Distance of the cost from the budget."""


def uniform_sizes(structure: Structure, curves: Curves, target: Target) -> dict[str, int]:
    """Return how many units of each group stay, the same in each layer that does.

    For every number of layers, heads and hidden dimensions there is one number of feed-forward dimensions that comes
    nearest to the target; the combination that loses the least is taken.

    :raises TargetError: when no shape meets the target, or layers differ already.
    """
    pairs = _pairs(structure)
    shapes = list(_shapes(structure, pairs, curves, target))
    met = [shape for shape in shapes if shape.off <= target.tolerance * target.total]
    if not met:
        off = min((shape.off for shape in shapes), default=np.inf) / target.total
        raise TargetError(f"{target} cannot be met with the same shape in every layer: the nearest is {off:.4f} of the "
                          "whole away. Allow more units, or leave out uniform")  # fmt: skip
    best, units = min(met), [0] * len(structure.blocks)
    for layer, (attention, ffn) in enumerate(pairs):
        if layer not in best.gone:
            units[attention], units[ffn] = best.heads, best.intermediate
    return sizes_of(structure, best.hidden, units)


def _pairs(structure: Structure) -> list[tuple[int, int]]:
    """Return the positions of the attention and the feed-forward block of each layer among the blocks."""
    by_layer: dict[int, dict[str, int]] = {}
    for position, block in enumerate(structure.blocks):
        group = structure[block.gate]
        by_layer.setdefault(group.layer or 0, {})[group.kind] = position
    for layer, blocks in sorted(by_layer.items()):
        if set(blocks) != {"attention", "ffn"}:
            raise TargetError(f"layer {layer} has lost a block already: it cannot have the shape of the others")
    pairs = [(blocks["attention"], blocks["ffn"]) for _, blocks in sorted(by_layer.items())]
    inner = [tuple(structure.sizes.get(structure.blocks[place].inner or "") for place in pair) for pair in pairs]
    if len(set(inner)) > 1:
        raise TargetError("the layers have different sizes already: prune the dense model")
    return pairs


def _shapes(structure: Structure, pairs: Sequence[tuple[int, int]], curves: Curves, target: Target) -> Iterator[_Shape]:
    """Give all combinations of layers, heads and hidden dimensions that may be tried, each as near as it comes."""
    cost = target.cost(structure)
    all_heads = structure.sizes.get(structure.blocks[pairs[0][0]].inner or "", 1)
    all_hidden = structure.sizes.get("hidden", 0)
    droppable = len(pairs) - 1 if all(block.gate in curves for block in structure.blocks) else 0
    if target.tied_heads:
        widths = sorted({heads * all_hidden // all_heads for heads in range(1, all_heads + 1)})
        widths = widths if "hidden" in curves else [all_hidden]
    else:
        widths = spread(hidden_sizes(structure, curves, target.round_to), _HIDDEN_LEVELS).tolist()
    for hidden in widths:
        tables = block_tables(structure, curves, cost, hidden, target.round_to)
        layers = [(tables[attention], tables[ffn]) for attention, ffn in pairs]
        wanted = cost.exact(sizes_of(structure, hidden)) - target.budget
        lost = float(curves["hidden"].by_size[hidden]) if "hidden" in curves else 0.0
        order = sorted(range(len(layers)), key=lambda layer: sum(table.loss[0] for table in layers[layer]))
        for number in range(droppable + 1):
            gone = tuple(sorted(order[:number]))
            whole = [table for layer in gone for table in layers[layer]]
            left = wanted - sum(float(table.saved[0]) for table in whole)
            for off, loss, heads, intermediate in _nearest([layers[layer] for layer in order[number:]], left):
                if not target.tied_heads or heads * all_hidden // all_heads == hidden:
                    loss += lost + sum(float(table.loss[0]) for table in whole)
                    yield _Shape(loss, gone, hidden, heads, intermediate, off)


def _nearest(layers: Sequence[Layer], wanted: float) -> Iterator[tuple[float, float, int, int]]:
    """Give, for each number of heads, the number of feed-forward dimensions that comes nearest to what is to be saved.

    :return: how far it is, what is lost, and the two numbers.
    """
    saved, loss = (
        [np.sum([getattr(layer[part], name) for layer in layers], axis=0)[1:] for part in (0, 1)]
        for name in ("saved", "loss")
    )
    off = np.abs(saved[0][:, None] + saved[1] - wanted)
    off[:, ~np.isfinite(loss[1])] = np.inf
    for heads in np.flatnonzero(np.isfinite(loss[0])).tolist():
        chosen = int(off[heads].argmin())
        yield float(off[heads, chosen]), float(loss[0][heads] + loss[1][chosen]), heads + 1, chosen + 1
