"""A compacted model of one shape as a plain one: its configuration states its sizes, and it loads without cofiprune.

What the adapter declares (`ConfigSizes`) says how the configuration calls the sizes. Layers that are gone as a whole
are left out, and the others numbered anew.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from cofiprune.adapter import ConfigSizes, adapter_for
from cofiprune.compaction.slicing import compact
from cofiprune.errors import PlanError
from cofiprune.plan import Plan
from cofiprune.record import recorded_sizes
from cofiprune.structure import UNIT_KINDS, Parameter, Structure, UnitKind

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def config_sizes(model: PreTrainedModel) -> ConfigSizes:
    """How the model's configuration calls its sizes.

    :raises PlanError: when its family's adapter does not say, or the model has been compacted already.
    """
    names = adapter_for(model).describe(model.config).config
    if names is None:
        raise PlanError(
            f"the configuration of {model.config.model_type} cannot say that a model of one shape is smaller, or its "
            "adapter does not declare how; compact it without plain, or leave out uniform"
        )
    if recorded_sizes(model.config) is not None:
        raise PlanError(
            "this model has been compacted to sizes that its configuration cannot say; start from the dense one"
        )
    return names


def plain_units(model: PreTrainedModel, structure: Structure, asked: Sequence[UnitKind] | None) -> tuple[UnitKind, ...]:
    """The unit kinds that a plain model of this class can have fewer of.

    A pooler, for instance, has as many outputs as there were hidden dimensions: no configuration says a smaller hidden
    size without cutting them too.

    :param asked: kinds that must be among them; None for all that can.
    :raises PlanError: when one of them is not.
    """
    names = config_sizes(model)
    present = {group.unit for group in structure.groups}
    heads = structure["layers.0.heads"].size if "layers.0.heads" in structure else 1
    width = structure["hidden"].size // heads if "hidden" in structure else 0
    possible: set[UnitKind] = {"layer", "intermediate"}
    if names.head_dim is not None:
        possible.add("head")
    if heads > 1 and width:
        kept = {"hidden": width * (heads - 1)}
        if names.head_dim is None:
            kept |= {name: heads - 1 for name in structure if name.endswith(".heads")}
        if _says(model, names, structure, kept):
            possible |= {"hidden", "head"}
    refused = [unit for unit in asked or () if unit not in possible]
    if refused:
        raise PlanError(
            f"a plain {type(model).__name__} cannot have fewer {' and '.join(map(repr, refused))} units; with uniform, "
            f"units takes {', '.join(unit for unit in UNIT_KINDS if unit in possible & present)}"
        )
    return tuple(asked) if asked is not None else tuple(unit for unit in UNIT_KINDS if unit in possible & present)


def _says(model: PreTrainedModel, names: ConfigSizes, structure: Structure, kept: Mapping[str, int]) -> bool:
    """Whether the configuration for some sizes builds the model that compaction would leave."""
    masks = {name: (torch.arange(structure[name].size) < count).double() for name, count in kept.items()}
    plan = Plan.from_values(structure, masks)
    with torch.device("meta"):
        built = type(model)(_configured(model.config, names, structure, plan, _layers(structure, plan)))
    shapes = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    return all(shapes.get(spec.name) == _shape(spec, plan) for spec in structure.parameters)


def _shape(spec: Parameter, plan: Plan) -> tuple[int, ...]:
    sides = zip(spec.shape, spec.sides, strict=True)
    return tuple(
        size if side is None else side.copies * len(plan.keep[side.group]) * side.block for size, side in sides
    )


def as_plain(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Return what a plan leaves as a model of a smaller configuration, the same class, dtype, device and mode.

    :raises PlanError: when the plan has not one shape in all layers, or the family's configuration cannot say it.
    """
    names = config_sizes(model)
    structure = adapter_for(model).structure(model)
    layers = _layers(structure, plan)
    config = _configured(model.config, names, structure, plan, layers)
    small = compact(model, plan)
    with torch.device("meta"):
        plain: PreTrainedModel = type(model)(config)
    moved = {f"{structure.layers[old]}.": f"{structure.layers[new]}." for new, old in enumerate(layers)}
    gone = tuple(f"{path}." for index, path in enumerate(structure.layers) if index not in layers)
    tensors = {}
    for name, value in small.state_dict().items():
        if not name.startswith(gone) or not gone:
            before = next((path for path in moved if name.startswith(path)), "")
            tensors[moved.get(before, "") + name.removeprefix(before)] = value
    plain.to_empty(device=model.device)
    plain.to(dtype=model.dtype)  # type: ignore[call-arg]
    fresh = type(model)(config)  # buffers that are no part of a state dict
    for name, buffer in fresh.named_buffers():
        plain.get_buffer(name).copy_(buffer)
    plain.load_state_dict(tensors)
    plain.tie_weights()
    plain.train(model.training)
    return plain


def _layers(structure: Structure, plan: Plan) -> list[int]:
    """The layers that stay.

    :raises PlanError: when they differ in shape.
    """
    shapes: dict[int, tuple[int, ...]] = {}
    for index in range(len(structure.layers)):
        names = [name for name, group in structure.items() if group.layer == index]
        sizes = tuple(len(plan.keep[name]) for name in names)
        if any(sizes):
            shapes[index] = sizes
    if len(set(shapes.values())) != 1 or any(0 in sizes for sizes in shapes.values()):
        raise PlanError("the layers that the plan leaves differ in shape, which a plain configuration cannot say")
    return list(shapes)


def _configured(
    config: PretrainedConfig, names: ConfigSizes, structure: Structure, plan: Plan, layers: list[int]
) -> PretrainedConfig:
    """A copy of the configuration with the sizes that the plan leaves."""
    first = f"layers.{layers[0]}."
    heads, all_heads = (_size(sizes, f"{first}heads") for sizes in (plan.kept, structure.sizes))
    hidden, all_hidden = (_size(sizes, "hidden") for sizes in (plan.kept, structure.sizes))
    smaller = copy.deepcopy(config)
    if names.head_dim is None and heads is not None and heads * (all_hidden or 0) != (hidden or 0) * (all_heads or 0):
        raise PlanError(
            f"{config.model_type} derives the width of a head from {names.hidden} and {names.heads}: a plain model can "
            f"have {heads} heads of {all_heads} only with the same share of hidden dimensions, and the plan keeps "
            f"{hidden} of {all_hidden}"
        )
    if names.head_dim is not None:
        setattr(smaller, names.head_dim, getattr(config, names.head_dim))
    intermediate = _size(plan.kept, f"{first}intermediate")
    for name, value in ((names.hidden, hidden), (names.heads, heads), (names.intermediate, intermediate)):
        if value is not None:
            setattr(smaller, name, value)
    setattr(smaller, names.layers, len(layers))
    return smaller


def _size(sizes: object, name: str) -> int | None:
    assert isinstance(sizes, dict)
    found: int | None = sizes.get(name)
    return found
