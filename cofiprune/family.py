"""The tables in which an adapter describes a family: axes, weights and blocks. All of it is data that JSON can hold."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cofiprune.errors import CheckpointError, explained
from cofiprune.structure import BlockExit, ConfigSizes, Kind, Narrow, Role, Shared


@dataclass(frozen=True)
class Axis:
    """One prunable dimension of a parameter, before its length is known."""

    kind: Kind
    copies: int = 1
    role: Role = "slice"
    block: int | None = None
    """Elements per unit; None derives it from the parameter's shape."""

    def times(self, copies: int) -> Axis:
        """Repeat the axis `copies` times, one after another (a fused projection)."""
        return replace(self, copies=copies)

    def of(self, block: int) -> Axis:
        """Set the elements per unit, which are checked against the parameter's shape."""
        return replace(self, block=block)

    @property
    def scaled(self) -> Axis:
        """The axis, multiplied by the mask."""
        return replace(self, role="scale")

    @property
    def zeroed(self) -> Axis:
        """The axis, zero where the mask is zero."""
        return replace(self, role="zero")


HIDDEN = Axis("hidden", block=1)
HEADS = Axis("heads")
INTERMEDIATE = Axis("intermediate")


@dataclass(frozen=True)
class Weights:
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
) -> Weights:
    """Describe a linear layer: weight [out, in, ...] and bias [out], if it has one.

    :param reads: the axis of the input side.
    :param writes: the axis of the output side.
    :param rows: (a, b) when the matrix is applied to a * sequence_length + b vectors per example.
    """
    return Weights(modules, {"weight": (writes, reads), "bias": (writes,)}, rows=rows, optional=optional)


def projection(modules: str, *, reads: Axis, read_in: str | None = None) -> Weights:
    """Describe the last projection of a block, from its inner units into the residual stream.

    The masks of inner units, of hidden dimensions and of the block itself scale it.

    :param read_in: path of the module that reads its weight and bias, where the projection itself is not called.
    """
    tensors = {"weight": (HIDDEN.scaled, reads.scaled), "bias": (HIDDEN.scaled,)}
    return Weights(modules, tensors, gated=True, rows=(1, 0), read_in=read_in)


def embedding(modules: str, *, writes: Axis | None = HIDDEN, optional: bool = False) -> Weights:
    """Describe a lookup table [entries, width] that is added to the residual stream."""
    axis = None if writes is None else writes.scaled
    return Weights(modules, {"weight": (None, axis)}, table=True, optional=optional)


def norm(
    modules: str,
    *,
    kind: Literal["layer", "rms"] = "layer",
    read_by: str | None = None,
    optional: bool = False,
) -> Weights:
    """Describe a normalisation over the hidden dimension, with or without a bias."""
    tensors = {"weight": (HIDDEN.scaled,), "bias": (HIDDEN.scaled,)}
    return Weights(modules, tensors, norm=kind, read_by=read_by, optional=optional)


def tensor(module: str, name: str, *axes: Axis | None, optional: bool = False) -> Weights:
    """Describe a parameter that a module holds itself."""
    return Weights(module, {name: axes}, optional=optional)


@dataclass(frozen=True, kw_only=True)
class BlockTable:
    """The weights of one kind of block, relative to a layer, and the module where its output leaves it."""

    rows: tuple[Weights, ...]
    exit: BlockExit
    bypassed: tuple[str | BlockExit, ...] = ()
    """Modules that do not run without the block: a path for one that returns its first argument then; a `BlockExit`
    with `residual=False` for one that returns zeros, because the exit above adds the residual to them."""
    dropped: tuple[str, ...] = ()
    """Members of the layer itself that belong to this block, if any: a parameter, which a single 0 replaces when
    the block is removed, or a module that the layer can do without, which None replaces."""
    shared: tuple[Shared, ...] = ()
    """Tensors from outside the layer with an entry for every inner unit of the dense model."""
    narrow: Narrow | None = None
    """A module that takes the width of the inner units from its input, so that it has to be told another one."""
    attributes: tuple[tuple[str, str, Axis], ...] = ()
    """(module, attribute, axis): integers in which a module keeps its own size. The axis's block is the number per
    unit; None means that it counts elements, derived like a parameter's."""
    pairwise: int = 0
    """Multiply-accumulates per inner element and pair of tokens, beyond attention's own two products."""
    per_token: int = 0
    """Multiply-accumulates per inner element and token, beyond the parameters' own."""


@dataclass(frozen=True, kw_only=True)
class ExtraTable:
    """Parts of a layer that belong to neither block and always stay; of the groups, only `hidden` reaches into them.
    An example are the convolution and the last norm of a conformer's layer."""

    rows: tuple[Weights, ...] = ()
    """Relative to a layer."""
    exits: tuple[str | BlockExit, ...] = ()
    """Exits into the residual stream, so that the laws can test a layer without them: a path for a module that
    the stream passes through; a `BlockExit` with `residual=False` for one whose output is added to it."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """The table of a family for one configuration."""

    layers: str
    """Path of the list of layers, relative to the encoder; `*` stands for every member of a list on the way, such as
    the stages of an encoder of images."""
    stem: tuple[Weights, ...]
    """Weights outside the layers that models of the family may have, relative to the encoder."""
    attention: BlockTable
    ffn: BlockTable
    extra: ExtraTable = ExtraTable()
    """Other parts of every layer."""
    heads: Mapping[str, tuple[Weights, ...]] = field(default_factory=dict)
    """Weights of the task heads by the ending of the class's name, relative to the model."""
    encoder: str = ""
    """Path of the encoder in models with a head, where their class does not name it as the base model."""
    applications: tuple[int, ...] | None = None
    """Times that each layer runs in a forward pass, if layers share their weights; None for once each."""
    config: ConfigSizes = field(default_factory=ConfigSizes)
    """The settings that state the units of `hidden`, and of `heads` and `intermediate` per layer."""
    sizes: Mapping[Kind, int | tuple[int, ...]] = field(default_factory=dict)
    """Units of a kind whose number no setting states as it is; of every member of the first list on the way to the
    layers, where `layers` has a `*` and they differ."""
    uniform: bool = False
    """True if smaller values of these settings build the smaller model that compaction leaves; not where layers differ
    by their position, for instance."""
    compacted_settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that the configuration of a compacted model has instead, where the family's own would not load it."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Unit kinds ("head", "intermediate" or "hidden") that cannot be pruned exactly for this configuration,
    with the reason. A block can always be removed."""


def expand(pattern: str) -> list[str]:
    """Expand braces: `a.{b,c}.d` gives `a.b.d` and `a.c.d`.

    >>> expand("attention.{query,key}")
    ['attention.query', 'attention.key']
    """
    parts = re.split(r"\{([^}]*)\}", pattern)
    choices = [part.split(",") if odd % 2 else [part] for odd, part in enumerate(parts)]
    return ["".join(pieces) for pieces in itertools.product(*choices)]


def family_entries(family: Family) -> dict[str, Any]:
    """Return a table as plain values that JSON can hold."""
    entries: dict[str, Any] = _family_schema().dump_python(family, mode="json", exclude_defaults=True)
    return entries


def family_from(entries: Mapping[str, Any]) -> Family:
    """Return the table of some entries: the inverse of `family_entries`.

    :raises CheckpointError: for entries that make no table.
    """
    with explained(CheckpointError, "the table that this model carries cannot be read", ValueError):
        family: Family = _family_schema().validate_python(entries)
    if family_entries(family) != entries:
        raise CheckpointError("the table that this model carries has entries of another version; compact it again")
    return family


@functools.cache
def _family_schema() -> Any:
    from pydantic import TypeAdapter  # imported late: loading a model of an installed family does not need it

    return TypeAdapter(Family)
