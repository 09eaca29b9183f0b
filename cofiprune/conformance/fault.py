"""Trace a difference between a masked model and its compacted self to the parameter that is described wrongly.

What a parameter assigns to a removed unit may take any value without the output changing: where it does change, its row
is wrong, or the row whose mask should silence it. A scale that was folded into the wrong module can be taken out again.
Where neither tells, the two models are compared module by module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cofiprune.compaction.slicing import positions, sliced
from cofiprune.conformance.calls import Crash, compared, crash_site, gap, holding, inside, largest, record
from cofiprune.conformance.specimens import Batch, Choice, Subject, Values, outputs
from cofiprune.masking import masks_of
from cofiprune.plan import Plan
from cofiprune.structure import Parameter, Side, Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def role_of(spec: Parameter, group: str) -> str | None:
    """Return what the mask of a group does to a parameter; None when it has no axis of the group."""
    return next((side.role for side in spec.prunable.values() if side.group == group), None)


def described(specs: Sequence[Parameter]) -> str:
    """Name parameters, each with its axes."""
    return " and ".join(f"{spec.name!r} ({_layout(spec)})" for spec in specs)


def _layout(spec: Parameter) -> str:
    told = []
    for dim, (length, side) in enumerate(zip(spec.shape, spec.sides, strict=True)):
        axis = (
            "no axis"
            if side is None
            else (f"{side.group} as copies {side.copies} x units {side.units} x block {side.block}, {side.role}")
        )
        told.append(f"dimension {dim}, {length} long: {axis}")
    return "; ".join(told)


def locate(subject: Subject, values: Values, choice: Choice, limit: float) -> str:
    """Say why a masked model and its compacted self differ.

    :param subject: without masks.
    :param values: masks under which the two differ; the fewest of them that suffice are examined.
    :param choice: the unit kinds that are masked.
    :param limit: the largest difference that is rounding.
    """
    values = _fewest(subject, values, choice, limit)
    with subject.masked(choice, values) as masks:
        plan = masks.plan()
        small = subject.compacted(plan)
        crash = crash_site(small, subject.batch)
        if crash is not None:
            found = f"The compacted model fails in {crash}. {_about_module(subject.structure, small, crash, values)}"
        elif all(bool((value > 0).all()) for value in values.values()):
            found = _wrong_scale(subject, small, plan, limit)
        else:
            found = _wrong_units(subject, values, limit)
        found = found or _first_difference(subject, small, plan, limit)
    return f"It takes {' and '.join(_shown(name, value) for name, value in values.items())}. {found}"


def _shown(name: str, value: Tensor) -> str:
    changed = {index: round(number, 3) for index, number in enumerate(value.tolist()) if number != 1}
    return f"{name} with unit {', '.join(f'{index} at {number:g}' for index, number in list(changed.items())[:6])}"


def _fewest(subject: Subject, values: Values, choice: Choice, limit: float) -> Values:
    """The mask of one unit, or else of one group, that is enough for a difference; all where neither is."""
    for name, value in values.items():
        if _differs(subject, {name: value}, choice, limit):
            for unit in (value != 1).nonzero().flatten().tolist():
                single = torch.ones_like(value)
                single[unit] = value[unit]
                if _differs(subject, {name: single}, choice, limit):
                    return {name: single}
            return {name: value}
    return values


def _differs(subject: Subject, values: Values, choice: Choice, limit: float) -> bool:
    with subject.masked(choice, values) as masks:
        plan = masks.plan()
        masked = subject.outputs()
        small = subject.compacted(plan)
    try:
        return compared(masked, outputs(small, subject.batch), plan) > limit
    except Exception:  # the caller looks where it fails
        return True


def _about_module(structure: Structure, small: nn.Module, crash: Crash, values: Values) -> str:
    """Quote the adapter on the module in which the compacted model fails."""
    own = [spec for spec in structure.parameters if spec.module == crash.module]
    below = [spec for spec in structure.parameters if inside(spec.module, crash.module) and spec not in own]
    if any(inside(path, crash.module) for path in structure.layers):
        # It failed outside the layers, so that those have run.
        below = [spec for spec in below if not structure.in_layers(spec)]
    # The bias or norm of a projection into the residual stream has an axis, and rightly no other.
    open_ = [spec for spec in below if len(spec.shape) > 1 or None in spec.sides]
    without = [repr(spec.name) for spec in open_ if not any(role_of(spec, name) for name in values)]
    told = []
    if own:
        told.append(f"{described(own)}: every dimension that follows a group needs its axis, and no other.")
    if without:
        told.append(f"Of the parameters below it, these have no axis of {', '.join(values)}: {', '.join(without[:8])}.")
    module = small.get_submodule(crash.module)
    integers = _integers(module)
    if integers and type(module).__module__.partition(".")[0] != "torch":
        told.append(f"If one of its integers follows a group, it belongs in the attributes of its block: {integers}.")
    for block in structure.blocks:
        if block.inner in values and inside(crash.module, block.exit.module):
            told += [f"{shared}: check module, argument, keyword and dim." for shared in block.shared] or [
                f"If it is given a tensor with an entry for every unit of {block.inner}, its block needs Shared(...)."
            ]
    return " ".join(told)


def _integers(module: nn.Module) -> str:
    found = {name: value for name, value in vars(module).items() if type(value) is int and not name.startswith("_")}
    return ", ".join(f"{name} = {value}" for name, value in found.items())


def _wrong_scale(subject: Subject, small: PreTrainedModel, plan: Plan, limit: float) -> str:
    """Name a module whose parameters carry a fractional mask that they should not, or lack one; masks are set."""
    masked = subject.outputs()
    weights, cut = dict(subject.model.named_parameters()), dict(small.named_parameters())
    modules: dict[str, list[Parameter]] = {}
    for spec in subject.structure.parameters:
        if any(side.group in plan.scale for side in spec.prunable.values()):
            modules.setdefault(spec.module, []).append(spec)
    for path, specs in modules.items():
        with ExitStack() as held:
            for spec in specs:
                turned = sliced(weights[spec.name].detach(), _other_role(spec), plan)
                held.enter_context(holding(cut[spec.name], turned))
            repaired = compared(masked, outputs(small, subject.batch), plan) <= limit
        if repaired:
            return (
                f"The module at fault is {path!r} with {described(specs)}: with the other role of its axes, scale for "
                "slice or slice for scale, the difference is gone. A matrix that is read directly cannot be scaled; a "
                "norm whose only reader is tied to a scaled table needs read_by."
            )
    return ""


def _other_role(spec: Parameter) -> Parameter:
    sides = (side and replace(side, role="slice" if side.role == "scale" else "scale") for side in spec.sides)
    return replace(spec, sides=tuple(sides))


def _wrong_units(subject: Subject, values: Values, limit: float) -> str:
    """Name a parameter in which the elements of a removed unit still change the output; masks are set."""
    structure = subject.structure
    stock = subject.outputs()
    weights = dict(subject.model.named_parameters())
    removed = {name: tuple((value == 0).nonzero().flatten().tolist()) for name, value in values.items()}

    def is_read(spec: Parameter) -> bool:
        for dim, side in spec.prunable.items():
            if units := removed.get(side.group):
                changed = weights[spec.name].detach().clone()
                changed.movedim(dim, 0)[positions(side, units)] += 1
                with holding(weights[spec.name], changed):
                    return largest(stock, subject.outputs()) > limit
        return False

    read = [spec for spec in structure.parameters if is_read(spec)]
    if not read:
        return ""
    order = {path: place for place, (path, _) in enumerate(record(subject.model, subject.batch))}
    first = min(read, key=lambda spec: order.get(spec.module, len(order)))
    return (
        f"The parameter at fault is {described([_blamed(structure, first, read, is_read)])}: what this assigns to a "
        "removed unit still changes the output. Correct the axes in its row: which group, which dimension, copies, "
        "block, role."
    )


def _blamed(
    structure: Structure, first: Parameter, read: Sequence[Parameter], is_read: Callable[[Parameter], bool]
) -> Parameter:
    """Choose between the rows that write a block's inner units and the projection that reads them."""
    group = next(side.group for side in first.prunable.values())
    writers = [spec for spec in structure.parameters if role_of(spec, group) == "slice" and not spec.gated]
    readers = [spec for spec in structure.parameters if role_of(spec, group) == "scale" and spec.gated]
    modules = {spec.module for spec in writers}
    if not readers or len(modules) < 2 or not modules <= {spec.module for spec in read}:
        return first
    # Either several modules agree with one another and the projection that masks them is the odd one out, or one row
    # describes them all, and wrongly: then the output ignores them once they are laid out as the projection is.
    side = next(side for side in readers[0].prunable.values() if side.group == group)
    turned = [_laid_out(spec, side) for spec in writers]
    return first if all(spec is not None and not is_read(spec) for spec in turned) else readers[0]


def _laid_out(spec: Parameter, like: Side) -> Parameter | None:
    """A parameter with the layout of another one's side, as often as that fits; None when it does not."""
    sides = list(spec.sides)
    for dim, side in spec.prunable.items():
        if side.group == like.group:
            times, remainder = divmod(side.length, like.length)
            if remainder:
                return None
            sides[dim] = replace(side, copies=times * like.copies, block=like.block)
    return replace(spec, sides=tuple(sides))


def _first_difference(subject: Subject, small: PreTrainedModel, plan: Plan, limit: float) -> str:
    """Name the first module, in the order in which they return, whose output differs; masks are set."""
    structure = subject.structure

    def differs(path: str, full: Tensor, cut: Tensor) -> bool:
        own = (spec for spec in structure.parameters if spec.module == path)
        return _differ(full, cut, plan, [*own, *structure.parameters], limit)

    path = _first_module(subject.model, small, subject.batch, differs)
    if path is None:
        return _NOWHERE
    module = subject.model.get_submodule(path)
    own = [spec for spec in structure.parameters if spec.module == path]
    if own:
        is_norm = "norm" in type(module).__name__.lower() and path not in {norm.module for norm in structure.norms}
        hint = ": declare it by norm(...)." if is_norm else "."
        return f"The first module that differs is {path!r} with {described(own)}{hint}"
    return (
        f"The first module that differs is {path!r}, though the modules in it agree: an integer of it may be "
        f"missing from the attributes of its block ({_integers(module) or 'it has none'}), or an axis in it has "
        "the wrong copies or block."
    )


def _first_module(
    model: PreTrainedModel, other: PreTrainedModel, batch: Batch, differs: Callable[[str, Tensor, Tensor], bool]
) -> str | None:
    """The path of the first module, in the order in which they return, whose output differs between two models."""
    found = record(other, batch)
    own = record(model, batch).items()
    return next((call[0] for call, value in own if call in found and differs(call[0], value, found[call])), None)


_NOWHERE = "No single module differs before the output does."


def _differ(full: Tensor, small: Tensor, plan: Plan, specs: Sequence[Parameter], limit: float) -> bool:
    """Tell whether a tensor of the masked model differs from the compacted model's on the kept units.

    :param specs: with the layouts that a dimension may have, likeliest first; where none fits, nothing is said.
    """
    sides = [side for spec in specs for side in spec.prunable.values()]
    for dim, (long, short) in enumerate(zip(full.shape, small.shape, strict=False)):
        if long != short:
            lengths = ((side, side.copies * plan.kept[side.group] * side.block) for side in sides)
            side = next((side for side, kept in lengths if (side.length, kept) == (long, short)), None)
            if side is None:
                return False
            full = full.index_select(dim, positions(side, plan.keep[side.group]))
    return full.shape == small.shape and gap(full, small) > limit


def tied_alone(subject: Subject, message: str) -> str:
    """Name a second name of a tied parameter in a message, which a row must describe too; "" when there is none."""
    first = {id(parameter): name for name, parameter in subject.model.named_parameters()}
    described = {spec.name for spec in subject.structure.parameters if any(spec.sides)}
    for name, parameter in subject.model.named_parameters(remove_duplicate=False):
        other = first[id(parameter)]
        if name != other and name in message and other in described:
            return f"{name!r} is tied to {other!r}, and needs a row of its own in addition to that one's."
    return ""


def first_change(subject: Subject, *, limit: float = 0.0) -> str:
    """Name the first module whose output the masks attached to a model change.

    :param limit: the largest change that is rounding.
    """
    stock = copy.deepcopy(subject.model)
    if (masks := masks_of(stock)) is not None:
        masks.detach()
    path = _first_module(subject.model, stock, subject.batch, lambda _, value, before: gap(value, before) > limit)
    if path is None:
        return _NOWHERE
    kind = next((norm.kind for norm in subject.structure.norms if norm.module == path), None)
    declared = "." if kind is None else f", declared by norm(kind={kind!r}): is that the kind that it is?"
    return f"The first module that differs is {path!r}{declared}"


def wrong_shapes(structure: Structure, small: PreTrainedModel, kept: Mapping[str, int]) -> str:
    """Name a parameter of a compacted model whose size is not the one that its sides say; "" when there is none."""
    found = {name: tuple(value.shape) for name, value in small.named_parameters()}
    for spec in structure.parameters:
        shape = spec.cut(kept).shape
        if spec.gate is not None and not kept[spec.gate]:
            if spec.name in found:
                return f"{spec.name!r} is there though {spec.gate!r} is removed."
        elif spec.name not in found:
            return f"{spec.name!r} went with a removed block, but no row of the block describes it: add one."
        elif found[spec.name] != shape:
            return f"{spec.name!r} has shape {found[spec.name]} in the place of {shape} ({_layout(spec)})."
    return ""


def scaled_by(structure: Structure, group: str) -> str:
    """Name the parameters that a group's mask multiplies."""
    gated = {spec.name for spec in structure.parameters if spec.gated and spec.gate == group}
    scaled = {spec.name for spec in structure.parameters if role_of(spec, group) == "scale"}
    found = sorted(map(repr, gated | scaled))
    return f"It scales {', '.join(found[:4])}." if found else "It scales nothing: no projection or norm has its axis."
