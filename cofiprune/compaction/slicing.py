"""Physical slicing: a smaller model of the same class, with fractional masks folded into its weights.

The new weights are cut first, parameter by parameter. A deep copy of the model is then made *around* them, so that tied
weights stay tied and the dense weights are never copied. `table` says in plain values what else is changed, or what is
cut of a model whose weights come later, and `removal.cut` does it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cofiprune.bypass import attends
from cofiprune.compaction.removal import KINDS, Table, cut
from cofiprune.errors import PlanError
from cofiprune.inference.fusion import unfuse
from cofiprune.masking import masks_of
from cofiprune.parts import encoder_config
from cofiprune.plan import Plan
from cofiprune.record import record, sizes_of
from cofiprune.structure import Block, BlockExit, Narrow, Parameter, Shared, Side, Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode(False)  # the copy must be able to learn
def compacted(model: PreTrainedModel, structure: Structure, plan: Plan) -> PreTrainedModel:
    """Return a smaller copy of a model; `compact` with a structure that is known.

    :param plan: one that was checked against the structure.
    """
    kept = plan.kept
    cut = {
        spec.name: None if _is_gone(spec, kept) else sliced(parameter.detach(), spec, plan)
        for spec, parameter in _parameters(model, structure)
    }
    small = _copy_around(model, cut)
    copied = masks_of(small)
    if copied is not None:
        copied.detach()
    unfuse(small)
    finish(small, structure, kept, plan.keep)
    return small


def sliced(weight: Tensor, spec: Parameter, plan: Plan) -> Tensor:
    """Cut one parameter to its kept units and fold fractional masks into it; a new tensor.

    :param weight: of shape `spec.shape`.
    """
    value = weight
    for dim, side in spec.prunable.items():
        keep = plan.keep[side.group]
        if len(keep) < side.units:
            value = value.index_select(dim, positions(side, keep).to(value.device))
        if side.role == "scale" and side.group in plan.scale:
            factors = torch.tensor(plan.scale[side.group], dtype=torch.float64).repeat_interleave(side.block)
            factors = factors.repeat(side.copies).view(-1, *[1] * (value.dim() - dim - 1))
            value = (value.double() * factors.to(value.device)).to(weight.dtype)
    if spec.gated and spec.gate is not None and spec.gate in plan.scale:
        value = (value.double() * plan.scale[spec.gate][0]).to(weight.dtype)
    return value.clone() if value is weight else value.contiguous()


@torch.no_grad()
def write_back(model: PreTrainedModel, structure: Structure, small: PreTrainedModel, plan: Plan) -> None:
    """Write the weights of a compacted model back to their places in the full one: the inverse of `compacted`.

    Weights that the plan removes stay as they are. The small model's weights contain the plan's scales: under masks,
    the full model computes the same only with those of `plan.hard`.

    :raises PlanError: when the plan belongs to another model.
    """
    plan.check(structure)
    source, kept = dict(small.named_parameters()), plan.kept
    for spec, parameter in _parameters(model, structure):
        if _is_gone(spec, kept):
            continue
        index = [
            torch.arange(length) if side is None else positions(side, plan.keep[side.group])
            for side, length in zip(spec.sides, spec.shape, strict=True)
        ]
        grid = torch.meshgrid(*(row.to(parameter.device) for row in index), indexing="ij")
        parameter[grid] = source[spec.name].to(parameter.device, parameter.dtype)


def positions(side: Side, keep: tuple[int, ...]) -> Tensor:
    """Return the indices of the kept units' elements along a dimension, [copies * kept * block]."""
    layout = torch.arange(side.length).view(side.copies, side.units, side.block)
    return layout[:, list(keep)].flatten()


def reshape_skeleton(model: PreTrainedModel, structure: Structure, kept: Mapping[str, int]) -> None:
    """Cut a new model to the shapes of a compacted one, in place; of its values, the first ones stay.

    :param kept: units of every group; groups of a kind that it does not name keep all of theirs.
    :raises PlanError: when that fits no compacted model of this structure.
    """
    finish(model, structure, checked_sizes(structure, kept))


def checked_sizes(structure: Structure, kept: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes of all groups, checked as `reshape_skeleton` says."""
    for name, size in kept.items():
        if name not in structure or not 0 <= size <= structure[name].size:
            raise PlanError(f"recorded size {size} for group {name!r} does not fit this {structure.family} model")
    kinds = {name.rpartition(".")[2] for name in kept}
    for name in structure:
        if name not in kept and name.rpartition(".")[2] in kinds:
            raise PlanError(f"no size is recorded for group {name!r} of this {structure.family} model")
    sizes = {**structure.sizes, **kept}
    for block in structure.blocks:
        if block.inner is not None and (sizes[block.gate] == 0) != (sizes[block.inner] == 0):
            raise PlanError(f"the recorded sizes of {block.gate!r} and {block.inner!r} do not go together")
    return sizes


def finish(
    model: PreTrainedModel,
    structure: Structure,
    kept: Mapping[str, int],
    keep: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Adapt the modules to their new parameters: removed blocks, size attributes, the record in the configuration.

    :param kept: new sizes of the groups.
    :param keep: the kept indices; None when they are loaded from a file later.
    """
    index = (
        None
        if keep is None
        else {
            shared.module: torch.tensor(keep[block.inner])
            for block in structure.blocks
            if block.inner is not None
            for shared in block.shared
        }
    )
    cut(model, table(structure, kept), index)
    if any(kept[name] != size for name, size in structure.sizes.items()):
        sizes = {**(sizes_of(model) or {}), **kept}
        if "hidden" not in structure:  # nor did a part that was compacted by itself lose any
            sizes.pop("hidden", None)
        config = encoder_config(model)
        config.__dict__.pop("quantization_config", None)  # that part's
        model.config.quantization_config = record(sizes, structure.table)
        for name, value in structure.compacted_settings.items():
            setattr(config, name, value)


def table(structure: Structure, kept: Mapping[str, int]) -> Table:
    """Say in plain values how a model of a structure becomes one of other sizes; see `removal.cut`."""
    shapes, removed, dropped, picked, narrowed = {}, {}, {}, {}, {}
    attributes: dict[str, dict[str, int]] = {}
    for spec in structure.parameters:
        new = spec.cut(kept).shape
        if new != spec.shape and not _is_gone(spec, kept):
            shapes[spec.name] = [None if now == old else now for now, old in zip(new, spec.shape, strict=True)]
    for each in structure.attributes:
        if 0 < kept[each.group] < structure.sizes[each.group]:
            attributes.setdefault(each.module, {})[each.name] = kept[each.group] * each.per_unit
    for block in structure.blocks:
        if not kept[block.gate]:
            removed.update(_placeholders(structure, block))
            dropped.update(dict.fromkeys(block.dropped, True))
            continue
        if block.narrow is not None:
            path, width = block.narrow.module, _inner_width(structure, block, kept)
            readers = [each.removeprefix(f"{path}.") for each in block.narrow.readers]
            narrowed[path] = {**_plain(block.narrow), "readers": readers, "width": width}
        if block.inner is not None and kept[block.inner] < structure.sizes[block.inner]:
            picked.update({each.module: {**_plain(each), "units": kept[block.inner]} for each in block.shared})
    kinds = (shapes, attributes, removed, dropped, picked, narrowed)
    return dict(zip(KINDS, kinds, strict=True))


def _placeholders(structure: Structure, block: Block) -> dict[str, dict[str, Any]]:
    """The rows of a removed block's modules, the first of which that has a matrix keeps a marker in its place."""
    rows: dict[str, dict[str, Any]] = {}
    marked = False
    for exit in (block.exit, *block.bypassed):
        marker = None if marked else _matrix_inside(exit.module, structure, block)
        marked = marked or marker is not None
        rows[exit.module] = {
            **_plain(exit),
            "attends": attends(block, exit),
            "mark": marker,
            "shared": [_plain(each) for each in block.shared if each.module == exit.module],
        }
    return rows


def _inner_width(structure: Structure, block: Block, kept: Mapping[str, int]) -> int:
    """Elements of a block's inner units that its last projection reads."""
    last = next(spec for spec in structure.parameters if spec.gate == block.gate and spec.gated and len(spec.shape) > 1)
    sides = last.cut(kept).prunable.values()
    return next((side.length for side in sides if side.group == block.inner), last.shape[1])


def _plain(place: BlockExit | Narrow | Shared) -> dict[str, Any]:
    return {name: value for name, value in asdict(place).items() if name != "module"}


def _matrix_inside(path: str, structure: Structure, block: Block) -> str | None:
    """Name, within a module, of a matrix of a block that lies in it; its last projection if that does.

    Others may be stored joined into one (query, key and value, say), which a single element does not survive.
    """
    names = [
        (not spec.gated, spec.name)
        for spec in structure.parameters
        if spec.gate == block.gate and spec.name.startswith(f"{path}.") and len(spec.shape) > 1
    ]
    return min(names)[1].removeprefix(f"{path}.") if names else None


def _is_gone(spec: Parameter, kept: Mapping[str, int]) -> bool:
    return spec.gate is not None and not kept[spec.gate]


def _parameters(model: nn.Module, structure: Structure) -> list[tuple[Parameter, nn.Parameter]]:
    return list(zip(structure.parameters, model.parameters(), strict=True))


def _copy_around(model: PreTrainedModel, cut: Mapping[str, Tensor | None]) -> PreTrainedModel:
    """Deep-copy a model with other parameters in the place of its own; None leaves one element."""
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        value = cut[name]
        new = parameter.detach().new_zeros(1) if value is None else value
        memo[id(parameter)] = nn.Parameter(new, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)
