"""From a family's table to the structure of one model: every row is looked up, measured and placed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from cofiprune.errors import AdapterError, suggest
from cofiprune.family import Axis, BlockTable, Family, Weights, expand
from cofiprune.structure import (
    Block,
    BlockExit,
    Group,
    Kind,
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
    """Path of the encoder in a model: its base model, or where the family says that it lies; "" for a bare encoder."""
    places = (each for each in (model.base_model_prefix, encoder) if each)
    return next((each for each in places if isinstance(getattr(model, each, None), nn.Module)), "")


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _placed(exit: str | BlockExit, path: str) -> BlockExit:
    """An exit whose module is named from the model instead of from the layer."""
    found = BlockExit(exit) if isinstance(exit, str) else exit
    return replace(found, module=_join(path, found.module))


class Resolver:
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
            for row in self.family.extra.rows:
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
            extra=tuple(_placed(each, path) for path in paths for each in self.family.extra.exits),
        )

    def _repeated(self, row: Weights, layer: int) -> Weights:
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
        setting = getattr(self.family.config, kind)
        size = self.family.sizes.get(kind, getattr(self.model.config, setting, None))
        if not isinstance(size, int):
            raise AdapterError(
                f"{self._who()}: its configuration has {size!r} for {setting!r}, where the number of {kind!r} units is "
                f"expected; name the right setting by ConfigSizes({kind}=...), or give the number in sizes"
            )
        return size

    def _head_rows(self) -> tuple[Weights, ...]:
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
            bypassed=tuple(_placed(each, path) for each in table.bypassed),
            dropped=tuple(_join(path, name) for name in table.dropped),
            shared=tuple(replace(each, module=_join(path, each.module)) for each in table.shared),
            pairwise=((2 if gate == "attention" else 0) + table.pairwise) * elements * times,
            per_token=table.per_token * elements * times,
        )
        return groups, block, attributes

    def _check_modules(self, path: str, gate: str, table: BlockTable) -> None:
        """Make sure that the modules which a block's table names beside its rows are there."""
        named = [("exit", table.exit.module), *(("shared", each.module) for each in table.shared)]
        named += [("bypassed", each if isinstance(each, str) else each.module) for each in table.bypassed]
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

    def _row(self, row: Weights, root: str, layer: str | None, gate: str | None = None) -> None:
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
        row: Weights,
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
            self.described[canonical] = replace(known, applications=row.rows)
            return
        padded = (*axes, *[None] * (parameter.dim() - len(axes)))
        sides = tuple(
            self._side(name, axis, length, layer) for axis, length in zip(padded, parameter.shape, strict=True)
        )
        if row.read_by is not None and self._tied(row.read_by):
            sides = tuple(side and replace(side, role="slice") for side in sides)
        applications = row.rows if parameter.dim() > 1 else (0, 0)
        shape = tuple(parameter.shape)
        self.described[canonical] = Parameter(canonical, shape, sides, gate, row.gated, applications, name, reader)
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
            applications = (0, 1) if len(shape) > 1 else (0, 0)
            found.append(known or Parameter(name, shape, (None,) * len(shape), applications=applications))
        return found
