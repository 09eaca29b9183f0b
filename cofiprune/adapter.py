"""The contract of an adapter: it describes where units live, and the core acts.

An adapter turns a configuration into a `Family`: rows that say which side of which parameter
belongs to heads, feed-forward dimensions or the hidden size, and where a block's output leaves it.
There is no `forward` in an adapter, no tensor arithmetic and no loop over weights. `structure`
resolves the rows against a model into a `Structure`.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from cofiprune.errors import AdapterError, CheckpointError, suggest
from cofiprune.record import recorded_sizes, recorded_table
from cofiprune.refusals import refuse, refuse_undeclared
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


HIDDEN = Axis("hidden", block=1)
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
    read_in: str | None = None
    """Path of the module that reads these parameters itself, where the modules that hold them are not called."""


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


def projection(modules: str, *, reads: Axis, read_in: str | None = None) -> Row:
    """The last projection of a block: from its inner units into the residual stream.

    Masks of inner units, of hidden dimensions and of the block itself all scale it.

    :param read_in: path of the module that reads its weight and bias, where the projection itself is not called.
    """
    tensors = {"weight": (HIDDEN.scaled, reads.scaled), "bias": (HIDDEN.scaled,)}
    return Row(modules, tensors, gated=True, rows=(1, 0), read_in=read_in)


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
class RestTable:
    """What a layer holds beside its two blocks: it stays, whatever is removed of them, and is part of no group but
    `hidden`. The convolution and the last norm of a conformer's layer, for instance."""

    rows: tuple[Row, ...] = ()
    """Its rows, relative to a layer."""
    exits: tuple[str | Exit, ...] = ()
    """Where it joins the residual stream, so that the laws can look at a layer without it: a path for a module that
    the stream runs through; an `Exit` with `residual=False` for one whose output is added to it."""


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
    rest: RestTable = RestTable()
    """What every layer holds beside these two."""
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
    stored: bool = False
    """Whether a compacted model carries the table with it, because nothing that is installed has it."""
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
        family = self.describe(model.config)
        found = _Resolver(model, family, recorded).structure()
        return replace(found, table=family_entries(family)) if self.stored else found


class TableAdapter(Adapter):
    """The adapter of a table that is there already: a derived one, or one that a compacted model carries."""

    def __init__(self, model_type: str, family: Family, *, stored: bool = False) -> None:
        self.model_types = (model_type,)
        self.family = family
        self.stored = stored

    def describe(self, config: PretrainedConfig) -> Family:
        return self.family


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
    """Return the adapter of a model's family: the one registered or installed for it, or else one derived from it.

    A compacted model of a family whose adapter was derived carries the table that it was cut by.

    :raises AdapterError: when the object is not a transformers encoder as it stands (see `refusals`), or no adapter
        serves its family and none can be derived.
    """
    refuse(model)
    model_type = model.config.model_type
    table = recorded_table(model.config)
    if table is not None:
        return TableAdapter(model_type, family_from(table), stored=True)
    if model_type not in _registered:
        installed = _installed(model_type)
        if installed is None:
            refuse_undeclared(model)
            return _derive(model)
        _registered[model_type] = installed
    return _registered[model_type]


def _installed(model_type: str) -> Adapter | None:
    """Load the adapter that an installed package names for a model type; None when none does.

    :raises AdapterError: when packages name different ones, or what one names is no adapter or does not load.
    """
    # An entry point that is found twice (two folders on the path with one package's metadata) is still one adapter.
    points = {point.value: point for point in entry_points(group=ENTRY_POINT_GROUP, name=model_type)}
    if len(points) > 1:
        named = ", ".join(f"{_package(point)} ({value!r})" for value, point in points.items())
        raise AdapterError(
            f"{len(points)} packages name an adapter for model type {model_type!r}: {named}. Uninstall all but one, or "
            "choose one of them by cofiprune.register_adapter(adapter), which goes before what is installed."
        )
    for value, point in points.items():
        who = f"the adapter of model type {model_type!r} that the package {_package(point)} names, {value!r},"
        try:
            found = point.load()
        except Exception as error:  # whatever importing someone else's module raises
            raise AdapterError(f"{who} cannot be loaded: {type(error).__name__}: {error}") from error
        if not isinstance(found, Adapter):
            if isinstance(found, type) and issubclass(found, Adapter):
                what = f"it is the class {found.__name__}; the entry point has to name an instance of it"
            else:
                what = f"it is a {type(found).__name__}, not a cofiprune.Adapter"
            raise AdapterError(f"{who} cannot be used: {what}")
        return found
    return None


def _package(point: EntryPoint) -> str:
    return "of an unknown name" if point.dist is None else point.dist.name


def family_entries(family: Family) -> dict[str, Any]:
    """A table as plain values, which JSON can hold."""
    entries: dict[str, Any] = _family_schema().dump_python(family, mode="json", exclude_defaults=True)
    return entries


def family_from(entries: Mapping[str, Any]) -> Family:
    """The inverse of `family_entries`.

    :raises CheckpointError: for entries that make no table.
    """
    try:
        family: Family = _family_schema().validate_python(entries)
    except ValueError as error:
        raise CheckpointError(f"the table that this model carries cannot be read: {error}") from None
    return family


@functools.cache
def _family_schema() -> Any:
    from pydantic import TypeAdapter  # imported late: loading a model of an installed family does not need it

    return TypeAdapter(Family)


_derivers: list[Callable[[PreTrainedModel], Adapter]] = []


def derive_by(deriver: Callable[[PreTrainedModel], Adapter]) -> None:
    """Set what makes an adapter for a model of a family without one; it lies above this module and is given to it."""
    _derivers[:] = [deriver]


def _derive(model: PreTrainedModel) -> Adapter:
    for deriver in _derivers:
        return deriver(model)
    raise AdapterError(f"no adapter for model type {model.config.model_type!r} ({type(model).__name__})")


def encoder_path(model: PreTrainedModel, encoder: str = "") -> str:
    """Path of the encoder in a model: its base model, or where the family says that it lies; "" for a bare encoder."""
    places = (each for each in (model.base_model_prefix, encoder) if each)
    return next((each for each in places if isinstance(getattr(model, each, None), nn.Module)), "")


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


def _placed(exit: str | Exit, path: str) -> Exit:
    """An exit whose module is named from the model instead of from the layer."""
    found = Exit(exit) if isinstance(exit, str) else exit
    return replace(found, module=_join(path, found.module))


class _Resolver:
    """Walks a family's rows over one model and collects the entries of its structure."""

    def __init__(self, model: PreTrainedModel, family: Family, recorded: Mapping[str, int] | None) -> None:
        self.model = model
        self.family = family
        self.base = encoder_path(model, family.encoder)
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
            for row in self.family.rest.rows:
                self._row(self._repeated(row, index), path, f"layers.{index}.")
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
            applications=self.applications if any(times > 1 for times in self.applications) else (),
            embeddings=tuple(self.tables),
            refused=self.refused,
            rest=tuple(_placed(each, path) for path in paths for each in self.family.rest.exits),
        )

    def _repeated(self, row: Row, layer: int) -> Row:
        """A row of a layer that may be applied several times."""
        times = self.applications[layer]
        return replace(row, rows=(times * row.rows[0], times * row.rows[1]))

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
        if kind not in self.family.sizes:
            raise AdapterError(f"{self._who()}: sizes has {', '.join(self.family.sizes) or 'nothing'}, and no {kind!r}")
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
            self._row(self._repeated(row, index), path, prefix, gate_name)
        elements = self._elements(gate_name, inner)
        self._check_modules(path, gate_name, table)
        attributes = [
            SizeAttribute(_join(path, module), name, prefix + axis.kind, axis.block or elements)
            for module, name, axis in table.attributes
            if not self._refuses(axis.kind)
        ]
        block = Block(
            gate=gate_name,
            inner=None if self._refuses(inner) else inner_name,
            exit=_placed(table.exit, path),
            skipped=tuple(_placed(each, path) for each in table.skipped),
            dropped=tuple(_join(path, name) for name in table.dropped),
            shared=tuple(replace(each, module=_join(path, each.module)) for each in table.shared),
            pairwise=((2 if gate == "attention" else 0) + table.pairwise) * elements * times,
            per_token=table.per_token * elements * times,
        )
        return groups, block, attributes

    def _check_modules(self, path: str, gate: str, table: BlockTable) -> None:
        """Make sure that the modules which a block's table names beside its rows are there."""
        named = [("exit", table.exit.module), *(("shared", each.module) for each in table.shared)]
        named += [("skipped", each if isinstance(each, str) else each.module) for each in table.skipped]
        named += [("attributes", module) for module, _, axis in table.attributes if not self._refuses(axis.kind)]
        for entry, module in named:
            found = _join(path, module)
            if found not in self.modules:
                raise AdapterError(
                    f"{self._who()}: {entry} of {gate!r} names the module {found!r}, which the model does not have."
                    f"{suggest(found, self.modules)}"
                )

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
                    reader = None if row.read_in is None else _join(root, row.read_in)
                    self._describe(parameter, _join(path, name), row, axes, layer, gate, reader)

    def _describe(
        self,
        parameter: nn.Parameter,
        name: str,
        row: Row,
        axes: tuple[Axis | None, ...],
        layer: str | None,
        gate: str | None,
        reader: str | None,
    ) -> None:
        canonical = self.names[id(parameter)]
        if canonical in self.described:
            known = self.described[canonical]
            if known.described_as == name and (known.gate or gate):
                owners = " and ".join(owner or "no block" for owner in dict.fromkeys((known.gate, gate)))
                raise AdapterError(
                    f"{self._who()}: row {row.modules!r} describes {name!r}, which a row before it describes already "
                    f"(as part of {owners}); a parameter takes one row, in the block that it is removed with"
                )
            # The row that came first (the embedding table) owns it; it is applied as a matrix too, by a module that is
            # tied to it or by a head that reads the table itself.
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
        self.described[canonical] = Parameter(canonical, shape, sides, gate, row.gated, rows, name, reader)
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
