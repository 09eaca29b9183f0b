"""Tracing a difference between a masked model and its compacted self to the parameter described wrongly.

A parameter's description can be tried on its own: by `units`, and a scale folded into the wrong module can be taken out
again. Where neither tells, the two models are compared module by module.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cofiprune.compaction import compact
from cofiprune.compaction.slicing import positions, sliced
from cofiprune.conformance.specimens import Batch, outputs
from cofiprune.conformance.trace import Crash, crash_site, gap, inside, record
from cofiprune.conformance.units import wrong_units
from cofiprune.conformance.wording import described, layout, module_of, role_of
from cofiprune.masking import attach, masks_of
from cofiprune.plan import Plan
from cofiprune.structure import Parameter, Side, Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Values = Mapping[str, Tensor]


def locate(
    model: PreTrainedModel, batch: Batch, structure: Structure, values: Values, choice: Sequence[str], limit: float
) -> str:
    """Say why a masked model and its compacted self differ.

    :param model: without masks.
    :param values: masks under which the two differ; the fewest of them that suffice are looked at.
    :param choice: the unit kinds that are masked.
    :param limit: the largest difference that is none.
    """
    values = _fewest(model, batch, values, choice, limit)
    fractional = all(bool((value > 0).all()) for value in values.values())
    with attach(model, tuple(choice)) as masks:
        masks.update(values)
        plan = masks.plan()
        small = compact(model)
        crash = crash_site(small, batch)
        found = ""
        if crash is not None:
            found = f"The compacted model fails in {crash}. {_of_module(structure, small, crash, values)}"
        elif fractional:
            found = _wrong_scale(model, small, batch, structure, plan, limit)
        else:
            found = wrong_units(model, batch, structure, values, limit)
        found = found or _first_difference(model, small, batch, structure, plan, limit)
    return f"It takes {' and '.join(_shown(name, value) for name, value in values.items())}. {found}"


def _shown(name: str, value: Tensor) -> str:
    changed = {index: round(number, 3) for index, number in enumerate(value.tolist()) if number != 1}
    return f"{name} with unit {', '.join(f'{index} at {number:g}' for index, number in list(changed.items())[:6])}"


def _fewest(model: PreTrainedModel, batch: Batch, values: Values, choice: Sequence[str], limit: float) -> Values:
    """The mask of one unit, or else of one group, that is enough for a difference; all where neither is."""
    for name, value in values.items():
        if _differs(model, batch, {name: value}, choice, limit):
            for unit in (value != 1).nonzero().flatten().tolist():
                single = torch.ones_like(value)
                single[unit] = value[unit]
                if _differs(model, batch, {name: single}, choice, limit):
                    return {name: single}
            return {name: value}
    return values


def _differs(model: PreTrainedModel, batch: Batch, values: Values, choice: Sequence[str], limit: float) -> bool:
    with attach(model, tuple(choice)) as masks:
        masks.update(values)
        plan = masks.plan()
        masked = outputs(model, batch)
        small = compact(model)
    return crash_site(small, batch) is not None or not _same(masked, outputs(small, batch), plan, limit)


def _same(masked: Mapping[str, Tensor], cut: Mapping[str, Tensor], plan: Plan, limit: float) -> bool:
    return all(_close(value, cut[name], plan, (), limit) is True for name, value in masked.items())


def _of_module(structure: Structure, small: nn.Module, crash: Crash, values: Values) -> str:
    """What the adapter says about the module in which the compacted model fails."""
    own = [spec for spec in structure.parameters if module_of(spec) == crash.module]
    below = [spec for spec in structure.parameters if inside(module_of(spec), crash.module) and spec not in own]
    if any(inside(path, crash.module) for path in structure.layers):
        # It failed between the layers, or beside them: what is in them has been there.
        below = [spec for spec in below if not structure.in_layers(spec)]
    # The bias or norm of a projection into the residual stream has an axis, and rightly no other.
    open_ = [spec for spec in below if len(spec.shape) > 1 or None in spec.sides]
    without = [repr(spec.name) for spec in open_ if not any(role_of(spec, name) for name in values)]
    told = []
    if own:
        told.append(f"{described(own)}: every dimension that follows a group needs its axis, and no other.")
    if without:
        told.append(f"Of the parameters below it, these have no axis of {', '.join(values)}: {', '.join(without[:8])}.")
    integers = _integers(small.get_submodule(crash.module))
    if integers and type(small.get_submodule(crash.module)).__module__.partition(".")[0] != "torch":
        told.append(f"If one of its integers follows a group, it belongs in the attributes of its block: {integers}.")
    told += _given(structure, crash, values)
    return " ".join(told)


def _given(structure: Structure, crash: Crash, values: Values) -> list[str]:
    """What the adapter says about tensors that a module gets with an entry for every inner unit."""
    blocks = [block for block in structure.blocks if block.inner in values and inside(crash.module, block.exit.module)]
    found = [f"{shared}: check module, argument, keyword and dim." for block in blocks for shared in block.shared]
    return found or [
        f"If it is given a tensor with an entry for every unit of {block.inner}, its block needs Shared(...)."
        for block in blocks
    ]


def _integers(module: nn.Module) -> str:
    found = {name: value for name, value in vars(module).items() if type(value) is int and not name.startswith("_")}
    return ", ".join(f"{name} = {value}" for name, value in found.items())


def _wrong_scale(
    model: PreTrainedModel, small: PreTrainedModel, batch: Batch, structure: Structure, plan: Plan, limit: float
) -> str:
    """Name a module whose parameters carry a fractional mask that they should not, or lack one; masks are set."""
    masked = outputs(model, batch)
    weights = dict(model.named_parameters())
    cut = dict(small.named_parameters())
    modules: dict[str, list[Parameter]] = {}
    for spec in structure.parameters:
        if any(side is not None and side.group in plan.scale for side in spec.sides):
            modules.setdefault(module_of(spec), []).append(spec)
    for path, specs in modules.items():
        kept = [cut[spec.name].detach().clone() for spec in specs]
        for spec in specs:
            cut[spec.name].data.copy_(sliced(weights[spec.name].detach(), _other_role(spec), plan))
        repaired = _same(masked, outputs(small, batch), plan, limit)
        for spec, value in zip(specs, kept, strict=True):
            cut[spec.name].data.copy_(value)
        if repaired:
            return (
                f"The module at fault is {path!r} with {described(specs)}: with the other role of its axes, scale for "
                "slice or slice for scale, the difference is gone. A matrix that is read directly cannot be scaled; a "
                "norm whose only reader is tied to a scaled table needs read_by."
            )
    return ""


def _other_role(spec: Parameter) -> Parameter:
    turned = {"slice": "scale", "zero": "scale", "scale": "slice"}
    sides = tuple(side and replace(side, role=turned[side.role]) for side in spec.sides)  # type: ignore[arg-type]
    return replace(spec, sides=sides)


def _first_difference(
    model: PreTrainedModel, small: PreTrainedModel, batch: Batch, structure: Structure, plan: Plan, limit: float
) -> str:
    """Name the first module, in the order in which they finish, whose output differs; masks are set."""
    cut = record(small, batch)
    norms = {norm.module for norm in structure.norms}
    for call, value in record(model, batch).items():
        path = call[0]
        if call not in cut or _close(value, cut[call], plan, _sides_near(structure, path), limit) is not False:
            continue
        module = model.get_submodule(path)
        own = [spec for spec in structure.parameters if module_of(spec) == path]
        if own and "norm" in type(module).__name__.lower() and path not in norms:
            return f"The first module that differs is {path!r} with {described(own)}: declare it by norm(...)."
        if own:
            return f"The first module that differs is {path!r} with {described(own)}."
        integers = _integers(module) or "it has none"
        return (
            f"The first module that differs is {path!r}, though the modules in it agree: an integer of it may be "
            f"missing from the attributes of its block ({integers}), or an axis in it has the wrong copies or block."
        )
    return "No single module differs before the output does."


def _sides_near(structure: Structure, path: str) -> list[Side]:
    """Sides of a module's parameters, then all others: the layouts that its output may have."""
    near = [(module_of(spec) != path, side) for spec in structure.parameters for side in spec.sides if side is not None]
    return [side for _, side in sorted(near, key=lambda pair: pair[0])]


def _close(full: Tensor, small: Tensor, plan: Plan, sides: Sequence[Side], limit: float) -> bool | None:
    """Whether a tensor of the masked model is the compacted model's on the kept units; None when not comparable."""
    if full.dim() != small.dim():
        return None
    for dim, (long, short) in enumerate(zip(full.shape, small.shape, strict=True)):
        if long != short:
            index = _kept_positions(long, short, plan, sides)
            if index is None:
                return None
            full = full.index_select(dim, index)
    return gap(full, small) <= limit


def _kept_positions(long: int, short: int, plan: Plan, sides: Sequence[Side]) -> Tensor | None:
    for side in sides:
        keep = plan.keep[side.group]
        if side.length == long and side.copies * len(keep) * side.block == short:
            return positions(side, keep)
    for name, length in plan.sizes.items():
        if length == long and len(plan.keep[name]) == short:
            return torch.tensor(plan.keep[name])
    return None


def tied_alone(model: PreTrainedModel, structure: Structure, message: str) -> str:
    """Name a second name of a tied parameter in a message, which a row must describe too; "" when there is none."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    sides = {spec.name: spec.sides for spec in structure.parameters}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names[id(parameter)]
        if name != first and name in message and any(sides[first]):
            return f"{name!r} is tied to {first!r}, and needs a row of its own beside that one's."
    return ""


def first_change(model: PreTrainedModel, batch: Batch, structure: Structure, *, limit: float = 0.0) -> str:
    """Name the first module whose output the masks attached to a model change.

    :param limit: the largest change that is none.
    """
    kinds = {norm.module: norm.kind for norm in structure.norms}
    stock = copy.deepcopy(model)
    masks = masks_of(stock)
    if masks is not None:
        masks.detach()
    before = record(stock, batch)
    for call, value in record(model, batch).items():
        if call in before and (value.shape != before[call].shape or gap(value, before[call]) > limit):
            kind = kinds.get(call[0])
            declared = "" if kind is None else f", declared by norm(kind={kind!r}): is that the kind that it is?"
            return f"The first module that differs is {call[0]!r}{declared or '.'}"
    return "No single module differs before the output does."


def wrong_shapes(structure: Structure, small: PreTrainedModel, plan: Plan) -> str:
    """Name a parameter of a compacted model whose size is not the one that its sides say; "" when there is none."""
    found = {name: tuple(value.shape) for name, value in small.named_parameters()}
    for spec in structure.parameters:
        shape = tuple(
            length if side is None else side.copies * plan.kept[side.group] * side.block
            for length, side in zip(spec.shape, spec.sides, strict=True)
        )
        if spec.gate is not None and not plan.kept[spec.gate]:
            if spec.name in found:
                return f"{spec.name!r} is there though {spec.gate!r} is removed."
        elif spec.name not in found:
            return f"{spec.name!r} went with a removed block, but no row of the block describes it: add one."
        elif found[spec.name] != shape:
            return f"{spec.name!r} has shape {found[spec.name]} in the place of {shape} ({layout(spec)})."
    return ""


def scaled_by(structure: Structure, group: str) -> str:
    """Name the parameters that a group's mask multiplies."""
    found = [
        repr(spec.name)
        for spec in structure.parameters
        if (spec.gated and spec.gate == group) or role_of(spec, group) == "scale"
    ]
    return f"It scales {', '.join(found[:4])}." if found else "It scales nothing: no projection or norm has its axis."
