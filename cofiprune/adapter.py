"""The contract of an adapter: it describes where units live, and the core acts.

An adapter turns a configuration into a `Family`: rows that say which side of which parameter
belongs to heads, feed-forward dimensions or the hidden size, and where a block's output leaves it.
There is no `forward` in an adapter, no tensor arithmetic and no loop over weights. `structure`
resolves the rows against a model into a `Structure`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from cofiprune.errors import AdapterError, suggest
from cofiprune.record import recorded_sizes
from cofiprune.structure import (
    Block,
    Exit,
    Group,
    Kind,
    Norm,
    Parameter,
    Role,
    Shared,
    Side,
    SizeAttribute,
    Structure,
    unit_of,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ENTRY_POINT_GROUP = "cofiprune.adapters"


@dataclass(frozen=True)
class Axis:
    """One prunable direction of a parameter, before it meets a model."""

    kind: Kind
    copies: int = 1
    role: Role = "slice"
    block: int | None = None
    """Elements per unit; None derives it from the parameter's shape."""

    def times(self, copies: int) -> Axis:
        """The same axis, `copies` of it after one another (a fused projection)."""
        return replace(self, copies=copies)

    def of(self, block: int) -> Axis:
        """The same axis with `block` elements per unit, checked against the parameter's shape."""
        return replace(self, block=block)

    @property
    def scaled(self) -> Axis:
        """The same axis, multiplied by the mask."""
        return replace(self, role="scale")

    @property
    def zeroed(self) -> Axis:
        """The same axis, zero where the mask is zero."""
        return replace(self, role="zero")


HIDDEN = Axis("hidden")
HEADS = Axis("heads")
INTERMEDIATE = Axis("intermediate")


@dataclass(frozen=True)
class Row:
    """Modules of one shape, and the axes of their parameters."""

    modules: str
    """Path relative to the layer (in blocks), to the encoder (in the stem) or to the model (in heads);
    braces list alternatives: `attention.self.{query,key,value}`."""
    tensors: Mapping[str, tuple[Axis | None, ...]]
    """Axes by parameter name inside the module; dimensions beyond those named are not prunable."""
    gated: bool = False
    rows: tuple[int, int] = (0, 0)
    norm: Literal["layer", "rms"] | None = None
    read_by: str | None = None
    """For a norm whose only reader is a matrix: that matrix's path from the model. When it is tied to an
    embedding table, which carries the mask already, compaction folds nothing into the norm."""
    table: bool = False
    optional: bool = False


def linear(
    modules: str,
    *,
    reads: Axis | None = None,
    writes: Axis | None = None,
    rows: tuple[int, int] = (1, 0),
    optional: bool = False,
) -> Row:
    """A projection: weight [out, in, ...] and, where there is one, bias [out].

    :param reads: the axis of the input side.
    :param writes: the axis of the output side.
    :param rows: (a, b) when the matrix is applied to a * sequence_length + b rows per example.
    """
    return Row(modules, {"weight": (writes, reads), "bias": (writes,)}, rows=rows, optional=optional)


def projection(modules: str, *, reads: Axis) -> Row:
    """The last projection of a block: from its inner units into the residual stream.

    Masks of inner units, of hidden dimensions and of the block itself all scale it.
    """
    tensors = {"weight": (HIDDEN.scaled, reads.scaled), "bias": (HIDDEN.scaled,)}
    return Row(modules, tensors, gated=True, rows=(1, 0))


def embedding(modules: str, *, writes: Axis | None = HIDDEN, optional: bool = False) -> Row:
    """A lookup table [entries, width] that is added into the residual stream."""
    axis = None if writes is None else writes.scaled
    return Row(modules, {"weight": (None, axis)}, table=True, optional=optional)


def norm(
    modules: str,
    *,
    kind: Literal["layer", "rms"] = "layer",
    read_by: str | None = None,
    optional: bool = False,
) -> Row:
    """A normalisation over the hidden dimension, with or without a bias."""
    tensors = {"weight": (HIDDEN.scaled,), "bias": (HIDDEN.scaled,)}
    return Row(modules, tensors, norm=kind, read_by=read_by, optional=optional)


def tensor(module: str, name: str, *axes: Axis | None, optional: bool = False) -> Row:
    """A parameter that a module holds itself."""
    return Row(module, {name: axes}, optional=optional)


@dataclass(frozen=True, kw_only=True)
class BlockTable:
    """The rows of one block kind, relative to a layer, and where its output leaves it."""

    rows: tuple[Row, ...]
    exit: Exit
    skipped: tuple[str | Exit, ...] = ()
    """Modules that do not run when the block is gone: a path for one that hands its first argument on; an `Exit` with
    `residual=False` for one that gives zeros because the exit above adds the residual to them."""
    dropped: tuple[str, ...] = ()
    """What the layer itself holds for this block, where it has it: a parameter, in whose place a single 0 stays when
    the block is gone, or a module that the layer can do without, in whose place None stays."""
    shared: tuple[Shared, ...] = ()
    """What modules of the block get from outside the layer for all inner units of the dense model."""
    attributes: tuple[tuple[str, str, Axis], ...] = ()
    """(module, attribute, axis): integers that the module keeps about its own size. The axis's block is
    the number per unit; None means that it counts elements, derived like a parameter's."""
    pairwise: int = 0
    """Multiply-accumulates per inner element and pair of tokens, beyond attention's own two products."""
    per_token: int = 0
    """Multiply-accumulates per inner element and token, beyond the parameters' own."""


@dataclass(frozen=True, kw_only=True)
class ConfigSizes:
    """How a configuration calls the sizes of a model that has the same shape in every layer."""

    layers: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    heads: str = "num_attention_heads"
    intermediate: str = "intermediate_size"
    head_dim: str | None = None
    """The setting that states the width of a head; None where it is the hidden size over the number of heads."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where the units of a family live, for one configuration."""

    sizes: Mapping[Kind, int]
    """Units of `hidden`, and per layer of `heads` and `intermediate`, as the configuration says."""
    layers: str
    """Path of the list of layers, relative to the encoder; `*` stands for every member of a list on the way."""
    stem: tuple[Row, ...]
    """Everything outside the layers that every model of the family may have, relative to the encoder."""
    attention: BlockTable
    ffn: BlockTable
    heads: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)
    """Rows of the task heads by the ending of the class's name, relative to the whole model."""
    encoder: str = ""
    """Path of the encoder in models with a head whose class does not name it as their base model."""
    applications: tuple[int, ...] | None = None
    """How often each layer runs in a forward pass, where layers share their weights; None for once each."""
    config: ConfigSizes | None = None
    """How the configuration calls its sizes; None where a smaller one cannot be said so, as when layers differ."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Unit kinds ("head", "intermediate" or "hidden") that cannot be pruned exactly for this configuration,
    with the reason. A block can always be removed."""


class Adapter:
    """What a family's author implements: the model types and `describe`."""

    model_types: tuple[str, ...] = ()
    """The `config.model_type` values that it serves."""
    trial_settings: Mapping[str, Any] = MappingProxyType({})
    """Settings of the small configurations that `check_adapter` tries, where a model does not run with stock ones."""

    def describe(self, config: PretrainedConfig) -> Family:
        """Return the family's table for one configuration."""
        raise AdapterError(f"{type(self).__name__} has no describe(config); return a Family from it")

    def structure(self, model: PreTrainedModel, *, dense: bool = False) -> Structure:
        """Resolve the table against a model.

        :param dense: read the model as having its configuration's sizes, whatever sizes are recorded in it.
        :raises AdapterError: when a row names a module or a shape that the model does not have.
        """
        recorded = None if dense else recorded_sizes(model.config)
        return _Resolver(model, self.describe(model.config), recorded).structure()


_registered: dict[str, Adapter] = {}


def register_adapter(adapter: Adapter) -> None:
    """Make an adapter known for its model types; it takes precedence over installed ones.

    :raises AdapterError: when it is not an `Adapter` instance or names no model type.
    """
    if not isinstance(adapter, Adapter):
        hint = " (pass an instance: MyAdapter(), not MyAdapter)" if isinstance(adapter, type) else ""
        raise AdapterError(f"register_adapter takes an instance of cofiprune.Adapter, not {adapter!r}{hint}")
    if isinstance(adapter.model_types, str) or not adapter.model_types:
        raise AdapterError(f"{type(adapter).__name__}.model_types must be a tuple of `config.model_type` names")
    for model_type in adapter.model_types:
        _registered[model_type] = adapter


@contextmanager
def temporarily(adapter: Adapter) -> Iterator[None]:
    """Register an adapter for the length of a `with` block."""
    before = dict(_registered)
    register_adapter(adapter)
    try:
        yield
    finally:
        _registered.clear()
        _registered.update(before)


def known_families() -> tuple[str, ...]:
    """Return the model types that have an adapter, registered or installed, sorted."""
    return tuple(sorted({*_registered, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))}))


def adapter_for(model: PreTrainedModel) -> Adapter:
    """Return the adapter of a model's family.

    :raises AdapterError: when the object is not a transformers encoder, or no adapter serves its family.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if not isinstance(model, nn.Module) or model_type is None:
        raise AdapterError(f"expected a transformers model (a PreTrainedModel), found {type(model).__name__}")
    if getattr(config, "is_decoder", False):
        raise AdapterError(
            f"{type(model).__name__} is configured as a decoder; cofiprune prunes encoders. "
            "Load it with is_decoder=False."
        )
    if has_decoder(model):
        raise AdapterError(
            f"{type(model).__name__} is an encoder with a decoder; cofiprune prunes encoders. "
            "Load the encoder alone, by a class such as T5EncoderModel."
        )
    if model_type not in _registered:
        points = entry_points(group=ENTRY_POINT_GROUP, name=model_type)
        if not points:
            raise AdapterError(
                f"no adapter for model type {model_type!r} ({type(model).__name__}). Families with one: "
                f"{', '.join(known_families())}. To add one, subclass cofiprune.Adapter and call "
                "cofiprune.register_adapter(MyAdapter()); docs/how-to/add-an-adapter.md shows how."
            )
        _registered[model_type] = next(iter(points)).load()
    return _registered[model_type]


def has_decoder(model: nn.Module) -> bool:
    """Whether a model, or the model under its head, has a decoder beside its encoder."""
    base = getattr(model, getattr(model, "base_model_prefix", "") or "_", model)
    return all(isinstance(getattr(base, part, None), nn.Module) for part in ("encoder", "decoder"))


def structure(model: PreTrainedModel) -> Structure:
    """List the prunable groups of a model: a mapping from group name to `Group`.

    :raises AdapterError: when the model's family has no adapter.
    """
    return adapter_for(model).structure(model)


def expand(pattern: str) -> list[str]:
    """Expand braces: `a.{b,c}.d` gives `a.b.d` and `a.c.d`.

    >>> expand("attention.{query,key}")
    ['attention.query', 'attention.key']
    """
    parts = re.split(r"\{([^}]*)\}", pattern)
    choices = [part.split(",") if odd % 2 else [part] for odd, part in enumerate(parts)]
    return ["".join(pieces) for pieces in itertools.product(*choices)]


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _placed(exit: Exit, path: str) -> Exit:
    """An exit whose module is named from the model instead of from the layer."""
    return replace(exit, module=_join(path, exit.module))


class _Resolver:
    """Walks a family's rows over one model and collects the entries of its structure."""

    def __init__(self, model: PreTrainedModel, family: Family, recorded: Mapping[str, int] | None) -> None:
        self.model = model
        self.family = family
        base = model.base_model_prefix
        places = (each for each in (base, family.encoder) if each)
        self.base = next((each for each in places if isinstance(getattr(model, each, None), nn.Module)), "")
        self.modules = dict(model.named_modules())
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.recorded = recorded
        self.described: dict[str, Parameter] = {}
        self.norms: list[Norm] = []
        self.tables: list[str] = []
        self.refused = dict(family.refused)
        if unknown := self.refused.keys() - {"head", "intermediate", "hidden"}:
            raise AdapterError(
                f"{self._who()}: refused names {sorted(unknown)}; only head, intermediate and hidden can be refused"
            )

    def structure(self) -> Structure:
        paths = tuple(self._members(_join(self.base, self.family.layers)))
        self.applications = self.family.applications or (1,) * len(paths)
        if len(self.applications) != len(paths):
            raise AdapterError(f"{self._who()}: {len(self.applications)} applications for {len(paths)} layers")
        head_rows = self._head_rows()
        groups = [] if "hidden" in self.refused else [Group("hidden", self._size("hidden"), "hidden")]
        blocks: list[Block] = []
        attributes: list[SizeAttribute] = []
        self.sizes = {group.name: group.size for group in groups}
        kinds: tuple[tuple[Kind, Kind, BlockTable], ...] = (
            ("attention", "heads", self.family.attention),
            ("ffn", "intermediate", self.family.ffn),
        )
        for index, path in enumerate(paths):
            for gate, inner, table in kinds:
                found = self._block(index, path, gate, inner, table)
                if found is not None:
                    new_groups, block, new_attributes = found
                    groups += new_groups
                    blocks.append(block)
                    attributes += new_attributes
        for row in self.family.stem:
            self._row(row, self.base, None)
        for row in head_rows:
            self._row(row, "", None)
        return Structure(
            family=self.model.config.model_type,
            groups=tuple(groups),
            parameters=tuple(self._parameters()),
            norms=tuple(self.norms),
            blocks=tuple(blocks),
            attributes=tuple(attributes),
            layers=paths,
            embeddings=tuple(self.tables),
            refused=self.refused,
        )

    def _members(self, path: str) -> list[str]:
        """Paths of the modules in a list, or in every list that a path with `*` stands for."""
        before, star, after = path.partition(".*")
        if star:
            return [found for each in self._members(before) for found in self._members(each + after)]
        if path not in self.modules:
            raise AdapterError(f"{self._who()}: no list of layers at {path!r}")
        return [f"{path}.{name}" for name, _ in self.modules[path].named_children()]

    def _who(self) -> str:
        return f"adapter of {self.model.config.model_type!r} on {type(self.model).__name__}"

    def _size(self, kind: Kind, name: str | None = None) -> int:
        if self.recorded is not None:
            return self.recorded[name or kind]
        return int(self.family.sizes[kind])

    def _head_rows(self) -> tuple[Row, ...]:
        """Rows of the task head; without a description of it, the hidden size cannot be pruned."""
        if not self.base:
            return ()
        for cls in type(self.model).__mro__:
            for ending, rows in self.family.heads.items():
                if cls.__name__.endswith(ending):
                    return rows
        reason = (
            f"its head {type(self.model).__name__} is not described by the adapter, so that what reads the hidden "
            f"dimensions is unknown; described heads end in {', '.join(self.family.heads)}"
        )
        self.refused.setdefault("hidden", reason)
        return ()

    def _block(
        self, index: int, path: str, gate: Kind, inner: Kind, table: BlockTable
    ) -> tuple[list[Group], Block, list[SizeAttribute]] | None:
        prefix = f"layers.{index}."
        gate_name, inner_name = prefix + gate, prefix + inner
        if self.recorded is not None and not self.recorded[gate_name]:
            return None
        groups = [Group(gate_name, 1, gate, index)]
        if not self._refuses(inner):
            groups.append(Group(inner_name, self._size(inner, inner_name), inner, index))
        self.sizes.update({group.name: group.size for group in groups})
        times = self.applications[index]
        for row in table.rows:
            self._row(replace(row, rows=(times * row.rows[0], times * row.rows[1])), path, prefix, gate_name)
        elements = self._elements(gate_name, inner)
        attributes = [
            SizeAttribute(_join(path, module), name, prefix + axis.kind, axis.block or elements)
            for module, name, axis in table.attributes
            if not self._refuses(axis.kind)
        ]
        block = Block(
            gate=gate_name,
            inner=None if self._refuses(inner) else inner_name,
            exit=_placed(table.exit, path),
            skipped=tuple(_placed(Exit(each) if isinstance(each, str) else each, path) for each in table.skipped),
            dropped=tuple(_join(path, name) for name in table.dropped),
            shared=tuple(replace(each, module=_join(path, each.module)) for each in table.shared),
            pairwise=((2 if gate == "attention" else 0) + table.pairwise) * elements * times,
            per_token=table.per_token * elements * times,
        )
        return groups, block, attributes

    def _elements(self, gate: str, inner: Kind) -> int:
        """Elements per inner unit as the block's last projection reads them; where the units are refused, of all."""
        for parameter in self.described.values():
            if parameter.gate == gate and parameter.gated and len(parameter.shape) > 1:
                if self._refuses(inner):
                    return parameter.shape[1]
                for side in parameter.sides:
                    if side is not None and side.group.endswith(inner):
                        return side.block
        raise AdapterError(f"{self._who()}: no projection(...) row of {gate!r} reads {inner!r}")

    def _refuses(self, kind: Kind) -> bool:
        return unit_of(kind) in self.refused

    def _row(self, row: Row, root: str, layer: str | None, gate: str | None = None) -> None:
        for path in (_join(root, pattern) for pattern in expand(row.modules)):
            module = self.modules.get(path)
            if module is None:
                if row.optional:
                    continue
                near = suggest(path, self.modules)
                raise AdapterError(
                    f"{self._who()}: row {row.modules!r} names the module {path!r}, which the model does not have."
                    f"{near} Mark the row optional=True if some models lack it."
                )
            if row.norm is not None and isinstance(module, nn.Identity):
                continue  # a norm that this layer does without
            if row.norm is not None and "hidden" not in self.refused:
                self.norms.append(Norm(path, row.norm))
            for name, axes in row.tensors.items():
                parameter = module._parameters.get(name)
                if parameter is not None:
                    self._describe(parameter, _join(path, name), row, axes, layer, gate)

    def _describe(
        self,
        parameter: nn.Parameter,
        name: str,
        row: Row,
        axes: tuple[Axis | None, ...],
        layer: str | None,
        gate: str | None,
    ) -> None:
        canonical = self.names[id(parameter)]
        if canonical in self.described:
            # A tied matrix: the row that came first (the embedding table) owns it; it is applied as a matrix too.
            known = self.described[canonical]
            self.described[canonical] = replace(known, rows=row.rows)
            return
        padded = (*axes, *[None] * (parameter.dim() - len(axes)))
        sides = tuple(
            self._side(name, axis, length, layer) for axis, length in zip(padded, parameter.shape, strict=True)
        )
        if row.read_by is not None and self._tied(row.read_by):
            sides = tuple(side and replace(side, role="slice") for side in sides)
        rows = row.rows if parameter.dim() > 1 else (0, 0)
        shape = tuple(parameter.shape)
        self.described[canonical] = Parameter(canonical, shape, sides, gate, row.gated, rows, name)
        if row.table:
            self.tables.append(canonical)

    def _tied(self, path: str) -> bool:
        module, _, name = path.rpartition(".")
        parameter = self.modules[module]._parameters.get(name) if module in self.modules else None
        return parameter is not None and self.names[id(parameter)] in self.tables

    def _side(self, name: str, axis: Axis | None, length: int, layer: str | None) -> Side | None:
        if axis is None or self._refuses(axis.kind):
            return None
        group = axis.kind if axis.kind == "hidden" else f"{layer}{axis.kind}"
        units = self.sizes[group]
        block = axis.block or length // (axis.copies * units)
        if axis.copies * units * block != length:
            raise AdapterError(
                f"{self._who()}: parameter {name!r} has length {length} along {axis.kind!r}, which is not "
                f"copies {axis.copies} x units {units} x block {axis.block or 'any whole number'}"
            )
        return Side(group, units, axis.copies, block, axis.role)

    def _parameters(self) -> list[Parameter]:
        found = []
        for name, parameter in self.model.named_parameters():
            known = self.described.get(name)
            shape = tuple(parameter.shape)
            # Heads that read a pooled vector are applied once per example.
            rows = (0, 1) if len(shape) > 1 else (0, 0)
            found.append(known or Parameter(name, shape, (None,) * len(shape), rows=rows))
        return found
