"""Finding the parameter whose row assigns the wrong elements to a unit.

What a parameter assigns to a removed unit may take any value without the output changing. Where it does change, either
this row is wrong or the one whose mask was to silence it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cofiprune.compaction.slicing import positions
from cofiprune.conformance.specimens import Batch, outputs
from cofiprune.conformance.trace import gap, record
from cofiprune.conformance.wording import layout, module_of, role_of
from cofiprune.structure import Parameter, Side, Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Values = Mapping[str, Tensor]


def wrong_units(model: PreTrainedModel, batch: Batch, structure: Structure, values: Values, limit: float) -> str:
    """Name a parameter in which the elements of a removed unit still change the output; masks are set."""
    stock = outputs(model, batch)
    weights = dict(model.named_parameters())

    def is_loud(spec: Parameter) -> bool:
        removed = _removed(spec, values)
        if removed is None:
            return False
        dim, rows = removed
        parameter = weights[spec.name]
        with torch.no_grad():
            before = parameter.clone()
            parameter.index_add_(dim, rows, torch.ones_like(before).index_select(dim, rows))
            after = outputs(model, batch)
            parameter.copy_(before)
        return any(gap(after[name], value) > limit for name, value in stock.items())

    loud = [spec for spec in structure.parameters if is_loud(spec)]
    if not loud:
        return ""
    order = {path: place for place, (path, _) in enumerate(record(model, batch))}
    first = _blamed(structure, min(loud, key=lambda spec: order.get(module_of(spec), len(order))), loud, is_loud)
    return (
        f"The parameter at fault is {first.name!r} ({layout(first)}): what this assigns to a removed unit still "
        "changes the output. Correct the axes in its row: which group, which dimension, copies, block, role."
    )


def _removed(spec: Parameter, values: Values) -> tuple[int, Tensor] | None:
    """The first dimension of a parameter along which the masks remove something, and what."""
    for dim, side in enumerate(spec.sides):
        if side is not None and side.group in values:
            gone = tuple((values[side.group] == 0).nonzero().flatten().tolist())
            if gone:
                return dim, positions(side, gone)
    return None


def _blamed(
    structure: Structure, first: Parameter, loud: Sequence[Parameter], is_loud: Callable[[Parameter], bool]
) -> Parameter:
    """Choose between the rows that write a block's inner units and the projection that reads them."""
    group = next(side.group for side in first.sides if side is not None)
    writers = [spec for spec in structure.parameters if role_of(spec, group) == "slice" and not spec.gated]
    readers = [spec for spec in structure.parameters if role_of(spec, group) == "scale" and spec.gated]
    modules = {module_of(spec) for spec in writers}
    if not readers or len(modules) < 2 or not modules <= {module_of(spec) for spec in loud}:
        return first
    # Either several modules agree with one another and the projection that masks them is the odd one out, or one row
    # describes them all, and wrongly: then nothing is heard of them where they are laid out as the projection is.
    read = next(side for side in readers[0].sides if side is not None and side.group == group)
    turned = [_laid_out(spec, read) for spec in writers]
    fit = all(spec is not None and not is_loud(spec) for spec in turned)
    return first if fit else readers[0]


def _laid_out(spec: Parameter, like: Side) -> Parameter | None:
    """A parameter with the layout of another one's side, as often as that fits; None when it does not."""
    sides = list(spec.sides)
    for dim, side in enumerate(sides):
        if side is not None and side.group == like.group:
            times, rest = divmod(side.length, like.length)
            if rest:
                return None
            sides[dim] = replace(side, copies=times * like.copies, block=like.block)
    return replace(spec, sides=tuple(sides))
