"""Uniform compacted models: the configuration itself states the smaller sizes, and they load without cofiprune.

The adapter names the sizes in its family's configuration (`ConfigSizes`). Layers that are removed as a whole are left
out, and the others are numbered anew.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from cofiprune.compaction.slicing import compacted
from cofiprune.errors import PlanError
from cofiprune.parts import encoder_config, encoder_within
from cofiprune.plan import Plan
from cofiprune.record import sizes_of
from cofiprune.structure import UNIT_KINDS, ConfigSizes, Structure, UnitKind

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def config_names(model: PreTrainedModel, structure: Structure) -> ConfigSizes:
    """Return the names of the sizes in a model's configuration.

    :raises PlanError: when its family's adapter does not give them, or the model has been compacted already.
    """
    if structure.config_sizes is None:
        raise PlanError(
            f"the configuration of {structure.family} cannot state smaller sizes, or its adapter does not "
            "declare that it can (Family(uniform=True)); leave out uniform"
        )
    if sizes_of(model) is not None:
        raise PlanError(
            "this model has been compacted to sizes that its configuration does not state; start from the dense one"
        )
    _stating(model, model.config)
    return structure.config_sizes


def _stating(model: PreTrainedModel, config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a model's configuration, or of a copy of it, that states the sizes of its encoder.

    :raises PlanError: when the encoder is inside a model whose configuration does not hold the encoder's.
    """
    path = encoder_within(model)
    if not path:
        return config
    inner = type(encoder_config(model))
    held: list[PretrainedConfig] = [value for value in vars(config).values() if type(value) is inner]
    if len(held) != 1:
        raise PlanError(
            f"the configuration of {type(model).__name__} does not hold that of its encoder, model.{path}, and cannot "
            f"state smaller sizes: prune model.{path} by itself with uniform, and put what compact() returns in its "
            "place; or leave out uniform"
        )
    return held[0]


def uniform_units(
    model: PreTrainedModel, structure: Structure, asked: Sequence[UnitKind] | None
) -> tuple[UnitKind, ...]:
    """Return the unit kinds of which a uniform model of this class can have fewer.

    A pooler, for instance, has as many outputs as the dense model has hidden dimensions: no configuration states a
    smaller hidden size without cutting them too.

    :param asked: kinds that must be among them; None for all that can.
    :raises PlanError: when one of them is not.
    """
    names = config_names(model, structure)
    heads = structure["layers.0.heads"].size if "layers.0.heads" in structure else 1
    width = structure["hidden"].size // heads if "hidden" in structure else 0
    possible: set[UnitKind] = {"layer", "intermediate"}
    if names.head_dim is not None:
        possible.add("head")
    if heads > 1 and width:
        kept = {"hidden": width * (heads - 1)}
        if names.head_dim is None:
            kept |= {group.name: heads - 1 for group in structure.groups if group.kind == "heads"}
        if _builds(model, names, structure, kept):
            possible |= {"hidden", "head"}
    present = [unit for unit in UNIT_KINDS if unit in possible and structure.present(unit)]
    refused = [unit for unit in asked or () if unit not in possible]
    if refused:
        raise PlanError(
            f"a uniform {type(model).__name__} cannot have fewer {' and '.join(map(repr, refused))} units; with "
            f"uniform, units takes {', '.join(present)}"
        )
    return tuple(present if asked is None else asked)


def _builds(model: PreTrainedModel, names: ConfigSizes, structure: Structure, kept: Mapping[str, int]) -> bool:
    """Return whether the configuration for some sizes builds the model that compaction would leave."""
    masks = {name: (torch.arange(structure[name].size) < count).double() for name, count in kept.items()}
    plan = Plan.from_values(structure, masks)
    with torch.device("meta"):
        built = type(model)(_configured(model, names, structure, plan, _layers(structure, plan)))
    shapes = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    return all(shapes.get(spec.name) == spec.cut(plan.kept).shape for spec in structure.parameters)


@torch.inference_mode(False)
def uniform_copy(model: PreTrainedModel, structure: Structure, plan: Plan) -> PreTrainedModel:
    """Return a smaller copy of a model, of a smaller configuration; the same class, dtype, device and mode.

    :raises PlanError: when the layers differ in shape, or the family's configuration cannot state the sizes.
    """
    names = config_names(model, structure)
    layers = _layers(structure, plan)
    config = _configured(model, names, structure, plan, layers)
    small = compacted(model, structure, plan)
    with torch.device("meta"):
        uniform: PreTrainedModel = type(model)(config)
    moved = {f"{structure.layers[old]}.": f"{structure.layers[new]}." for new, old in enumerate(layers)}
    gone = tuple(f"{path}." for index, path in enumerate(structure.layers) if index not in layers)
    tensors = {}
    for name, value in small.state_dict().items():
        if not gone or not name.startswith(gone):
            before = next((path for path in moved if name.startswith(path)), "")
            tensors[moved.get(before, "") + name.removeprefix(before)] = value
    for name in [name for name in tensors if name.endswith(names.by_layer)]:
        columns = tensors[name].unflatten(-1, (len(structure.layers), -1))
        tensors[name] = columns[..., layers, :].flatten(-2)
    uniform.to_empty(device=model.device)
    uniform.to(dtype=model.dtype)  # type: ignore[call-arg]
    with torch.random.fork_rng(devices=[]):
        fresh = type(model)(config)
    for name, buffer in fresh.named_buffers():  # those that are no part of a state dict
        uniform.get_buffer(name).copy_(buffer)
    uniform.load_state_dict(tensors)
    uniform.tie_weights()
    uniform.train(model.training)
    return uniform


def _layers(structure: Structure, plan: Plan) -> list[int]:
    """The layers that stay.

    :raises PlanError: when they differ in shape.
    """
    shapes: dict[int, tuple[int, ...]] = {}
    for index in range(len(structure.layers)):
        sizes = tuple(len(plan.keep[group.name]) for group in structure.groups if group.layer == index)
        if any(sizes):
            shapes[index] = sizes
    if len(set(shapes.values())) != 1 or any(0 in sizes for sizes in shapes.values()):
        raise PlanError("the layers that the plan leaves differ in shape, which one configuration cannot state")
    return list(shapes)


def _configured(
    model: PreTrainedModel, names: ConfigSizes, structure: Structure, plan: Plan, layers: list[int]
) -> PretrainedConfig:
    """A copy of the model's configuration with the sizes that the plan leaves."""
    kept, dense = plan.kept, structure.sizes
    heads_name, intermediate_name = (f"layers.{layers[0]}.{kind}" for kind in ("heads", "intermediate"))
    heads, hidden = kept.get(heads_name), kept.get("hidden")
    all_heads, all_hidden = dense.get(heads_name), dense.get("hidden")
    if names.head_dim is None and heads is not None and heads * (all_hidden or 0) != (hidden or 0) * (all_heads or 0):
        raise PlanError(
            f"{structure.family} derives the width of a head from {names.hidden} and {names.heads}: a uniform model "
            f"can have {heads} heads of {all_heads} only with the same share of hidden dimensions, and the plan keeps "
            f"{hidden} of {all_hidden}"
        )
    whole = copy.deepcopy(model.config)
    smaller = _stating(model, whole)
    if names.head_dim is not None:
        setattr(smaller, names.head_dim, getattr(_stating(model, model.config), names.head_dim))
    sizes = ((names.hidden, hidden), (names.heads, heads), (names.intermediate, kept.get(intermediate_name)))
    for name, value in sizes:
        if value is not None:
            setattr(smaller, name, value)
    setattr(smaller, names.layers, len(layers))
    return whole
