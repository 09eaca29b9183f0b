"""The prunable structure of a model: pure data, no tensors.

Every prunable side of a parameter factorises as (copies, units, block), row-major: a head is `block = head_dim` rows of
the query projection, a fused q/k/v has `copies = 3`, a hidden dimension has `block = 1`. A parameter is a rectangle of
such sides, and a block of the encoder (attention or feed-forward) is a gate over the parameters it owns. Masks, gates,
slicing and counting all read this one structure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from cofiprune.drawing import counted, structure_map
from cofiprune.errors import StructureError, UnknownGroupError, suggest

Kind = Literal["hidden", "attention", "heads", "ffn", "intermediate"]
Role = Literal["slice", "zero", "scale"]
UnitKind = Literal["layer", "head", "intermediate", "hidden"]

UNIT_KINDS: tuple[UnitKind, ...] = ("layer", "head", "intermediate", "hidden")
_KIND_OF_UNIT: Mapping[Kind, UnitKind] = {
    "hidden": "hidden", "attention": "layer", "heads": "head", "ffn": "layer", "intermediate": "intermediate",
}  # fmt: skip


def unit_of(kind: Kind) -> UnitKind:
    """Return the unit kind that a kind of group belongs to: "layer" for "ffn"."""
    return _KIND_OF_UNIT[kind]


@dataclass(frozen=True)
class Group:
    """A set of units of one kind, each of which is kept or removed by itself."""

    name: str
    """`hidden`, or `layers.{i}.` followed by the kind."""
    size: int
    """Number of units, at least 1."""
    kind: Kind
    layer: int | None = None
    """Index of the encoder layer from 0; None for `hidden`."""

    @property
    def unit(self) -> UnitKind:
        """The unit kind that selects this group."""
        return unit_of(self.kind)


@dataclass(frozen=True)
class Side:
    """One dimension of a parameter, laid out as (copies, units, block) in row-major order."""

    group: str
    units: int
    copies: int = 1
    block: int = 1
    role: Role = "slice"
    """Effect of a mask on the parameter along this side: `slice` none before slicing, `zero` zeroes the units whose
    mask is 0, `scale` multiplies by the mask."""

    @property
    def length(self) -> int:
        """Length of the dimension."""
        return self.copies * self.units * self.block


@dataclass(frozen=True)
class Parameter:
    """A parameter as a rectangle of sides, owned by at most one block."""

    name: str
    """Name as in `model.named_parameters()`."""
    shape: tuple[int, ...]
    sides: tuple[Side | None, ...]
    """One entry per dimension; None where nothing can be pruned along it."""
    gate: str | None = None
    """The block group with which this parameter is removed."""
    gated: bool = False
    """True when a fractional block gate multiplies this parameter (the block's last projection)."""
    applications: tuple[int, int] = (0, 0)
    """(a, b): a matrix is applied to a * sequence_length + b vectors per example; (0, 0) for other parameters."""
    described_as: str | None = None
    """Its name in the module that the adapter describes, where masks act on it; differs from `name` when it is tied."""
    read_in: str | None = None
    """The module that reads it, if the module that holds it is not called; masks act on it there."""

    def cut(self, sizes: Mapping[str, int]) -> Parameter:
        """Return the parameter with other numbers of units along its sides."""
        sides = tuple(side and replace(side, units=sizes[side.group]) for side in self.sides)
        lengths = zip(self.shape, sides, strict=True)
        return replace(self, shape=tuple(old if side is None else side.length for old, side in lengths), sides=sides)

    @property
    def prunable(self) -> dict[int, Side]:
        """The sides along which units can be removed, by dimension."""
        return {dim: side for dim, side in enumerate(self.sides) if side is not None}

    @property
    def module(self) -> str:
        """Path of the module on which masks act."""
        return (self.described_as or self.name).rpartition(".")[0]

    @property
    def fixed(self) -> int:
        """Number of elements per kept unit of every prunable side."""
        return math.prod(
            length if side is None else side.copies * side.block
            for length, side in zip(self.shape, self.sides, strict=True)
        )


@dataclass(frozen=True)
class Norm:
    """A normalisation over the hidden dimensions; under masks, over the kept ones."""

    module: str
    kind: Literal["layer", "rms"] = "layer"


@dataclass(frozen=True)
class BlockExit:
    """The module whose output is a block's output, and where a removed block returns its input."""

    module: str
    argument: int = 0
    """Position of the block's input in the module's positional arguments."""
    keyword: str | None = None
    """Its name, if the caller passes it by name."""
    outputs: int = 1
    """1: the module returns a tensor; n > 1: a tuple of n, the tensor first and None after it."""
    residual: bool = True
    """False: the residual is added afterwards (pre-norm), so that the module of a removed block returns zeros."""
    wrapped: bool = False
    """True if its single output comes in a tuple of one."""
    carried: tuple[int, ...] = ()
    """Positions of further streams of states in the positional arguments; they are returned behind the first."""


@dataclass(frozen=True)
class Shared:
    """A tensor from outside a block's layer, with an entry for every inner unit of the dense model.

    For example a bias of the attention scores that all layers share. Masks leave it as it is; a compacted module picks
    the entries of its kept units.
    """

    module: str
    """The module that is called with it."""
    argument: int
    """Its position in the module's positional arguments."""
    keyword: str
    """Its name, if the caller passes it by name."""
    dim: int
    """The dimension of the units."""
    output: int | None = None
    """Its position in the module's outputs, if the module passes it on to the next layer."""
    method: str | None = None
    """The method by which a module without the argument makes it from the numbers of queries and keys."""
    table: str | None = None
    """The submodule that `method` reads; the layer that has it keeps it without its block."""
    repeated: bool = False
    """True if the result of `method` is repeated for every example of a batch, along its first dimension."""


@dataclass(frozen=True)
class Narrow:
    """An attention module that takes the width of its heads from the states that it is given."""

    module: str
    readers: tuple[str, ...]
    """The matrices in it that read those states."""
    argument: int = 0
    keyword: str | None = None
    """Position and name of the states among its arguments, as in `BlockExit`."""


@dataclass(frozen=True)
class Block:
    """An attention or feed-forward block: a gate over its inner units."""

    gate: str
    inner: str | None
    exit: BlockExit
    bypassed: tuple[BlockExit, ...] = ()
    """Modules in it that do not run without it; they return their first argument, or zeros (see `residual`)."""
    dropped: tuple[str, ...] = ()
    """Parameters and modules of the block that the layer itself holds; a single 0 and None replace them."""
    shared: tuple[Shared, ...] = ()
    """Tensors from outside with an entry for every inner unit of the dense model."""
    narrow: Narrow | None = None
    """Its module that takes the width of the inner units from its input, if it has one."""
    pairwise: int = 0
    """Multiply-accumulates per inner unit and pair of tokens, beyond the parameters' own."""
    per_token: int = 0
    """Multiply-accumulates per inner unit and token, beyond the parameters' own."""


@dataclass(frozen=True)
class SizeAttribute:
    """An integer attribute of a module that follows the size of a group: `units kept * per_unit`."""

    module: str
    name: str
    group: str
    per_unit: int = 1


@dataclass(frozen=True, kw_only=True)
class ConfigSizes:
    """The settings of a configuration that state the sizes of a model."""

    layers: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    heads: str = "num_attention_heads"
    intermediate: str = "intermediate_size"
    head_dim: str | None = None
    """The setting that states the width of a head; None where it is the hidden size over the number of heads."""
    by_layer: tuple[str, ...] = ()
    """Parameters of the encoder with as many columns for each layer: those of removed layers go with them."""


@dataclass(frozen=True)
class Structure(Mapping[str, Group]):
    """The prunable structure of one model: a mapping from group name to `Group`.

    They come in the order hidden, then for each layer attention, heads, ffn, intermediate.
    """

    family: str
    """The `model_type` of the configuration."""
    groups: tuple[Group, ...]
    parameters: tuple[Parameter, ...]
    """Every parameter of the model, in the order of `named_parameters()`."""
    norms: tuple[Norm, ...]
    blocks: tuple[Block, ...]
    attributes: tuple[SizeAttribute, ...]
    layers: tuple[str, ...]
    """Module paths of the encoder's layers, which `sparsity` counts."""
    applications: tuple[int, ...] = ()
    """Times that a forward pass applies each layer in a row; empty for once each."""
    embeddings: tuple[str, ...] = ()
    """Names of the parameters of the embedding tables."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Unit kinds that this model cannot prune, with the reason."""
    table: Mapping[str, Any] | None = None
    """The family's table as plain values, if a compacted model has to carry it."""
    extra: tuple[BlockExit, ...] = ()
    """Exits into the residual stream of the parts of layers that belong to no block, and always stay."""
    compacted_settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that the configuration of a compacted model has instead of the dense model's."""
    config_sizes: ConfigSizes | None = None
    """How the configuration states the sizes; None where it cannot state smaller ones, the same in every layer."""

    def __repr__(self) -> str:
        return f"Structure({self.family}: {len(self.layers)} layers, {len(self)} groups; {counted(self.sizes)})"

    def _repr_html_(self) -> str:
        return structure_map(self.sizes)._repr_html_()

    @cached_property
    def _by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}

    def __getitem__(self, name: str) -> Group:
        try:
            return self._by_name[name]
        except KeyError:
            raise UnknownGroupError(self._missing(name)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self.groups)

    def __hash__(self) -> int:
        return hash((self.family, self.groups, self.parameters))

    def _missing(self, name: str) -> str:
        kind = str(name).rpartition(".")[2]
        reason = self.refused.get(_KIND_OF_UNIT.get(kind, kind))  # type: ignore[call-overload]
        if reason:
            return f"{self.family} has no group {name!r}: {reason}"
        near = suggest(name, self._by_name)
        shown = ", ".join(list(self._by_name)[:6])
        return f"no group {name!r} in this {self.family} model.{near} Its {len(self)} groups start with {shown}."

    def present(self, units: str | Sequence[UnitKind] | None = None) -> tuple[Group, ...]:
        """Return the groups of some unit kinds, of which a smaller model may have lost some."""
        chosen = UNIT_KINDS if units is None else (units,) if isinstance(units, str) else tuple(units)
        return tuple(group for group in self.groups if group.unit in chosen)

    def select(self, units: str | Sequence[str] | None = None) -> tuple[Group, ...]:
        """Return the groups of some unit kinds; of all that the model has for None.

        :raises StructureError: for an unknown kind, an empty choice, or a kind that this model cannot prune.
        """
        if units is None:
            return self.groups
        chosen = (units,) if isinstance(units, str) else tuple(units)
        if not chosen:
            raise StructureError(f"units is empty; choose among {', '.join(UNIT_KINDS)}")
        present = {group.unit for group in self.groups}
        for unit in chosen:
            if unit not in UNIT_KINDS:
                raise StructureError(
                    f"unknown unit kind {unit!r}; choose among {', '.join(UNIT_KINDS)}.{suggest(str(unit), UNIT_KINDS)}"
                )
            if unit not in present:
                reason = self.refused.get(unit, "no such units are left in it")
                raise StructureError(f"this {self.family} model cannot prune {unit!r} units: {reason}")
        return tuple(group for group in self.groups if group.unit in chosen)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Number of units of every group."""
        return {group.name: group.size for group in self.groups}

    def without_units(self, sizes: Mapping[str, int]) -> tuple[Block, ...]:
        """Return the blocks that are gone at some sizes of the groups: their gate is closed, or they have no units."""
        return tuple(block for block in self.blocks if not (sizes[block.gate] and sizes.get(block.inner or "", 1)))

    def cut(self, sizes: Mapping[str, int]) -> Structure:
        """Return the structure of the model that is compacted to some sizes: units that are kept, by group."""
        blocks = self.without_units(sizes)
        gone = {name for block in blocks for name in (block.gate, block.inner) if name is not None}
        kept = tuple(each.cut(sizes) for each in self.parameters if each.gate not in gone)
        names = {each.name for each in kept}
        lost = {each.described_as or each.name for each in self.parameters if each.name not in names}
        return replace(
            self,
            groups=tuple(replace(each, size=sizes[each.name]) for each in self.groups if each.name not in gone),
            parameters=kept,
            norms=tuple(each for each in self.norms if f"{each.module}.weight" not in lost),
            blocks=tuple(each for each in self.blocks if each not in blocks),
            attributes=tuple(each for each in self.attributes if each.group not in gone),
        )

    def in_layers(self, parameter: Parameter) -> bool:
        """Return whether a parameter belongs to the encoder's layers, the denominator of `sparsity`."""
        return parameter.name.startswith(self._layer_prefixes)

    @cached_property
    def _layer_prefixes(self) -> tuple[str, ...]:
        return tuple(f"{path}." for path in self.layers)
