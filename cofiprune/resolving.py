"""Resolving a family's table against one model: every entry is looked up, measured and placed in a `Structure`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from cofiprune.errors import AdapterError, suggest
from cofiprune.family import Axis, BlockTable, Family, Weights, expand
from cofiprune.refusals import refuse_computed
from cofiprune.structure import (
    Block,
    BlockExit,
    Group,
    Kind,
    Narrow,
    Norm,
    Parameter,
    Side,
    SizeAttribute,
    Structure,
    unit_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def encoder_path(model: PreTrainedModel, encoder: str = "") -> str:
    """Return the path of a model's encoder: its base model, or the family's own path; "" for a bare encoder."""
    places = (each for each in (model.base_model_prefix, encoder) if each)
    return next((each for each in places if isinstance(getattr(model, each, None), nn.Module)), "")


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _placed(exit: str | BlockExit, path: str) -> BlockExit:
    """An exit with its module's path from the model instead of from the layer."""
    found = BlockExit(exit) if isinstance(exit, str) else exit
    return replace(found, module=_join(path, found.module))


def members(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """Return the paths of the modules in a list, or in every list that a path with `*` stands for."""
    before, star, after = path.partition(".*")
    if star:
        return [found for each in members(modules, before) for found in members(modules, each + after)]
    if path not in modules:
        raise AdapterError(f"no list of layers at {path!r}")
    return [f"{path}.{name}" for name, _ in modules[path].named_children()]


def stages_of(paths: Sequence[str], pattern: str) -> tuple[int, ...]:
    """Return for every layer which member of the list before the first `*` of a path it is in; 0 without one."""
    before, star, _ = pattern.partition("*")
    names = [path.removeprefix(before).partition(".")[0] if star else "" for path in paths]
    order = list(dict.fromkeys(names))
    return tuple(map(order.index, names))


@dataclass(frozen=True)
class _Scope:
    """The part of a model that an entry belongs to."""

    path: str
    """The module that the entry's paths are relative to."""
    prefix: str = ""
    """Of the names of the layer's groups."""
    gate: str | None = None
    times: int = 1
    """Times that a forward pass applies it."""


class Resolver:
    """Looks up a family's table in one model and collects the entries of its structure."""

    def __init__(
        self, model: PreTrainedModel, family: Family, recorded: Mapping[str, int] | None, within: str = ""
    ) -> None:
        """Prepare to resolve.

        :param recorded: sizes of the groups of a compacted model; None takes those of the configuration.
        :param within: the path of the model of this family, where it is inside another one.
        """
        self.model = model
        self.family = family
        self.recorded = recorded
        self.within = within
        encoder: Any = model.get_submodule(within)
        self.config = encoder.config
        self.base = _join(within, encoder_path(encoder, family.encoder))
        self.modules = dict(model.named_modules())
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.groups: dict[str, Group] = {}
        self.described: dict[str, Parameter] = {}
        self.norms: list[Norm] = []
        self.blocks: list[Block] = []
        self.attributes: list[SizeAttribute] = []
        self.tables: list[str] = []
        self.refused = dict(family.refused)
        if unknown := self.refused.keys() - {"head", "intermediate", "hidden"}:
            raise AdapterError(f"refused names {sorted(unknown)}; only head, intermediate and hidden can be refused")

    def structure(self) -> Structure:
        """Return the structure.

        :raises AdapterError: when the table does not fit the model.
        """
        family = self.family
        paths = tuple(members(self.modules, _join(self.base, family.layers)))
        self.stages = stages_of(paths, _join(self.base, family.layers))
        applications = family.applications or (1,) * len(paths)
        if len(applications) != len(paths):
            raise AdapterError(f"{len(applications)} applications for {len(paths)} layers")
        head_rows = self._head_rows()
        if "hidden" not in self.refused:
            self._add_group("hidden", "hidden", None)
        for index, (path, times) in enumerate(zip(paths, applications, strict=True)):
            layer = _Scope(path, f"layers.{index}.", times=times)
            self._add_block(index, layer, "attention", "heads", family.attention)
            self._add_block(index, layer, "ffn", "intermediate", family.ffn)
            self._add(family.extra.rows, layer)
        self._add(family.stem, _Scope(self.base))
        self._add(head_rows, _Scope(""))
        return Structure(
            family=self.model.config.model_type,
            groups=tuple(self.groups.values()),
            parameters=tuple(self._parameters()),
            norms=tuple(self.norms),
            blocks=tuple(self.blocks),
            attributes=tuple(self.attributes),
            layers=paths,
            applications=applications if any(times > 1 for times in applications) else (),
            embeddings=tuple(self.tables),
            refused=self.refused,
            extra=tuple(_placed(each, path) for path in paths for each in family.extra.exits),
            compacted_settings=family.compacted_settings,
            config_sizes=family.config if family.uniform else None,
        )

    def _add_group(self, name: str, kind: Kind, layer: int | None) -> None:
        size: object = 1
        if self.recorded is not None:
            size = self.recorded[name]
        elif kind not in ("attention", "ffn"):
            setting = getattr(self.family.config, kind)
            size = self.family.sizes.get(kind, getattr(self.config, setting, None))
            if isinstance(size, tuple | list) and layer is not None:
                size = size[self.stages[layer]]
            if not isinstance(size, int):
                raise AdapterError(
                    f"its configuration has {size!r} for {setting!r}, where the number of {kind!r} "
                    f"units is expected; name the right setting by ConfigSizes({kind}=...), or give the number in sizes"
                )
        assert isinstance(size, int)
        self.groups[name] = Group(name, size, kind, layer)

    def _head_rows(self) -> tuple[Weights, ...]:
        """Entries of the task head; without a description of it, the hidden size cannot be pruned."""
        if not self.base:
            return ()
        # A class of one's own around the encoder may be called as a head of the family and be another.
        own = self.within and not type(self.model).__module__.startswith("transformers.")
        for cls in () if own else type(self.model).__mro__:
            for ending, rows in self.family.heads.items():
                if cls.__name__.endswith(ending):
                    return rows
        reason = (
            f"its head {type(self.model).__name__} is not described by the adapter, so that what reads the hidden "
            f"dimensions is unknown; described heads end in {', '.join(self.family.heads)}"
        )
        self.refused.setdefault("hidden", reason)
        return ()

    def _add_block(self, index: int, layer: _Scope, gate: Kind, inner: Kind, table: BlockTable) -> None:
        gate_name, inner_name = layer.prefix + gate, layer.prefix + inner
        if self.recorded is not None and not self.recorded[gate_name]:
            return
        self._add_group(gate_name, gate, index)
        if not self._refuses(inner):
            self._add_group(inner_name, inner, index)
        self._add(table.rows, replace(layer, gate=gate_name))
        elements = self._elements(gate_name, inner)
        self._check_modules(layer.path, gate_name, table)
        self.attributes += [
            SizeAttribute(_join(layer.path, module), name, layer.prefix + axis.kind, axis.block or elements)
            for module, name, axis in table.attributes
            if not self._refuses(axis.kind)
        ]
        block = Block(
            gate=gate_name,
            inner=None if self._refuses(inner) else inner_name,
            exit=_placed(table.exit, layer.path),
            bypassed=tuple(_placed(each, layer.path) for each in table.bypassed),
            dropped=tuple(_join(layer.path, name) for name in table.dropped),
            shared=tuple(replace(each, module=_join(layer.path, each.module)) for each in table.shared),
            narrow=self._narrow(table, layer.path),
            pairwise=((2 if gate == "attention" else 0) + table.pairwise) * elements * layer.times,
            per_token=table.per_token * elements * layer.times,
        )
        self.blocks.append(block)

    def _narrow(self, table: BlockTable, path: str) -> Narrow | None:
        if table.narrow is None:
            return None
        readers = [found for name in table.narrow.readers if (found := _join(path, name)) in self.modules]
        return replace(table.narrow, module=_join(path, table.narrow.module), readers=tuple(readers))

    def _check_modules(self, path: str, gate: str, table: BlockTable) -> None:
        """Check that the modules which a block's table names in addition to its weights are there."""
        named = [("exit", table.exit.module), *(("shared", each.module) for each in table.shared)]
        named += [("narrow", table.narrow.module)] if table.narrow else []
        named += [("bypassed", each if isinstance(each, str) else each.module) for each in table.bypassed]
        named += [("attributes", module) for module, _, axis in table.attributes if not self._refuses(axis.kind)]
        for entry, module in named:
            found = _join(path, module)
            if found not in self.modules:
                raise AdapterError(
                    f"{entry} of {gate!r} names the module {found!r}, which the model does not have."
                    f"{suggest(found, self.modules)}"
                )

    def _elements(self, gate: str, inner: Kind) -> int:
        """Elements per inner unit that the block's last projection reads; all of them where the units are refused."""
        for parameter in self.described.values():
            if parameter.gate == gate and parameter.gated and len(parameter.shape) > 1:
                if self._refuses(inner):
                    return parameter.shape[1]
                for side in parameter.prunable.values():
                    if side.group.endswith(inner):
                        return side.block
        raise AdapterError(f"no projection(...) row of {gate!r} reads {inner!r}")

    def _refuses(self, kind: Kind) -> bool:
        return unit_of(kind) in self.refused

    def _add(self, rows: tuple[Weights, ...], scope: _Scope) -> None:
        """Describe the parameters of some entries."""
        for row in rows:
            for path in (_join(scope.path, pattern) for pattern in expand(row.modules)):
                module = self.modules.get(path)
                if module is not None:
                    self._add_module(row, path, module, scope)
                elif not row.optional:
                    near = suggest(path, self.modules)
                    raise AdapterError(
                        f"row {row.modules!r} names the module {path!r}, which the model does not have."
                        f"{near} Mark the row optional=True if some models lack it."
                    )

    def _add_module(self, row: Weights, path: str, module: nn.Module, scope: _Scope) -> None:
        if row.norm is not None and isinstance(module, nn.Identity):
            return  # some layers do without this norm
        if row.norm is not None and "hidden" not in self.refused:
            self.norms.append(Norm(path, row.norm))
        for name, axes in row.tensors.items():
            parameter = module._parameters.get(name)
            cut = any(axis is not None and not self._refuses(axis.kind) for axis in axes)
            if cut:
                refuse_computed(module, path, name)
            if parameter is not None:
                self._describe(parameter, _join(path, name), row, axes, scope)

    def _describe(
        self, parameter: nn.Parameter, name: str, row: Weights, axes: tuple[Axis | None, ...], scope: _Scope
    ) -> None:
        per_token, per_example = row.rows
        applications = (scope.times * per_token, scope.times * per_example)
        canonical = self.names[id(parameter)]
        if canonical in self.described:
            known = self.described[canonical]
            if known.described_as == name and (known.gate or scope.gate):
                owners = " and ".join(owner or "no block" for owner in dict.fromkeys((known.gate, scope.gate)))
                raise AdapterError(
                    f"row {row.modules!r} describes {name!r}, which a row before it describes already "
                    f"(as part of {owners}); a parameter takes one row, in the block that it is removed with"
                )
            # The first entry (the embedding table) owns it; it is applied as a matrix too, by a tied module or by a
            # head that reads the table itself.
            self.described[canonical] = replace(known, applications=applications)
            return
        shape = tuple(parameter.shape)
        padded = (*axes, *[None] * (len(shape) - len(axes)))
        sides = tuple(self._side(name, axis, size, scope) for axis, size in zip(padded, shape, strict=True))
        if row.read_by is not None and self._is_tied(row.read_by):
            sides = tuple(side and replace(side, role="slice") for side in sides)
        reader = None if row.read_in is None else _join(scope.path, row.read_in)
        applications = applications if len(shape) > 1 else (0, 0)
        self.described[canonical] = Parameter(
            canonical, shape, sides, scope.gate, row.gated, applications, name, reader
        )
        if row.table:
            self.tables.append(canonical)

    def _is_tied(self, path: str) -> bool:
        module, _, name = path.rpartition(".")
        parameter = self.modules[module]._parameters.get(name) if module in self.modules else None
        return parameter is not None and self.names[id(parameter)] in self.tables

    def _side(self, name: str, axis: Axis | None, length: int, scope: _Scope) -> Side | None:
        if axis is None or self._refuses(axis.kind):
            return None
        group = axis.kind if axis.kind == "hidden" else scope.prefix + axis.kind
        units = self.groups[group].size
        block = axis.block or length // (axis.copies * units)
        if axis.copies * units * block != length:
            raise AdapterError(
                f"parameter {name!r} has length {length} along {axis.kind!r}, which is not "
                f"copies {axis.copies} x units {units} x block {axis.block or 'any whole number'}"
            )
        return Side(group, units, axis.copies, block, axis.role)

    def _parameters(self) -> list[Parameter]:
        found = []
        for name, parameter in self.model.named_parameters():
            shape = tuple(parameter.shape)
            # Heads that read a pooled vector are applied once per example.
            applications = (0, 1) if len(shape) > 1 else (0, 0)
            unknown = Parameter(name, shape, (None,) * len(shape), applications=applications)
            found.append(self.described.get(name, unknown))
        return found
