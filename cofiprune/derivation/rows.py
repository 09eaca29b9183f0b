"""The sizes of a model's groups, and the rows of a block: which side of which parameter follows which group."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from cofiprune.adapter import HIDDEN, Axis, Weights, linear, norm, projection, tensor
from cofiprune.conformance.calls import Call, holds, inside, same
from cofiprune.derivation.blocks import Draft, is_matrix, is_transposed, norm_kind, vectors, weight_shape
from cofiprune.errors import AdapterError
from cofiprune.structure import Kind, Narrow, Shared

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_PREFERRED = ("hidden_size", "num_attention_heads", "intermediate_size", "num_key_value_heads")


@dataclass(frozen=True)
class Settings:
    """Python expressions in `config` that give the units of a model of its kind, or of each of its stages."""

    expressions: Mapping[Kind, str]
    query_heads: str | None = None
    """The number of query heads, if groups of them share the keys and values that `heads` counts."""

    def units(self, config: PretrainedConfig) -> dict[Kind, int | tuple[int, ...]]:
        """Return the units by kind."""
        return {kind: _units(config, text) for kind, text in self.expressions.items()}

    def queries(self, config: PretrainedConfig) -> int:
        """Return the number of query heads for each unit of `heads`."""
        if self.query_heads is None:
            return 1
        return _value(config, self.query_heads) // _value(config, self.expressions["heads"])


def find_settings(
    config: PretrainedConfig, hidden: int, widths: Sequence[int], inner: Sequence[int], narrow: int
) -> Settings:
    """Find which settings of a configuration give the sizes that were seen.

    :param widths: elements of all query heads, in every stage.
    :param inner: feed-forward dimensions, in every stage.
    :param narrow: elements of all key heads.
    :raises AdapterError: when no setting gives the number of heads.
    """

    width, intermediate = widths[0], inner[0]

    def named(
        words: Collection[str], without: Collection[str], fits: Callable[[Any], bool], kind: tuple[type, ...] = (int,)
    ) -> str | None:
        """`config.NAME` for the setting whose name has one of some words and whose value fits."""
        found = [
            name
            for name in dict.fromkeys([*config.attribute_map, *vars(config)])
            if any(word in name for word in words)
            and not any(word in name for word in without)
            and not name.startswith("_")
            and type(getattr(config, name, None)) in kind
            and fits(getattr(config, name))
        ]
        found.sort(key=lambda name: (name not in _PREFERRED, len(name)))
        return f"config.{found[0]}" if found else None

    others = ["key_value", "kv", "dim", "size", "decoder"]
    if len(widths) > 1:
        heads = named(["head"], others, lambda found: _divide(found, widths), (list, tuple))
    else:
        heads = named(["head"], others, lambda n: n > 0 and width % n == 0)
    if heads is None:
        shown = " and ".join(map(str, widths))
        raise AdapterError(f"its configuration does not say how many heads its {shown} attention dimensions make up")
    if len(widths) > 1:
        return Settings({"hidden": str(hidden), "heads": heads, "intermediate": repr(tuple(inner))})
    count = _value(config, heads)
    keys = None
    if narrow < width and narrow * count % width == 0:
        keys = named(["key_value", "kv"], ["dim", "size"], lambda n: n == narrow * count // width)
    expressions: dict[Kind, str] = {
        "hidden": named(["hidden", "d_model", "dim", "embed"], [], lambda n: n == hidden) or str(hidden),
        "heads": keys or heads,
        "intermediate": named([""], ["vocab"], lambda n: n == intermediate) or _ratio(config, intermediate),
    }
    return Settings(expressions, heads if keys else None)


def _ratio(config: PretrainedConfig, size: int) -> str:
    for name, value in vars(config).items():
        if "ratio" in name and isinstance(value, int | float) and int(config.hidden_size * value) == size:
            return f"int(config.hidden_size * config.{name})"
    return str(size)


def _divide(counts: Sequence[int], widths: Sequence[int]) -> bool:
    pairs = list(zip(widths, counts, strict=False))
    return len(counts) == len(widths) and all(count > 0 and width % count == 0 for width, count in pairs)


def _units(config: PretrainedConfig, text: str) -> int | tuple[int, ...]:
    """The value of an expression, which may be one for each stage."""
    if text.startswith("("):
        return tuple(ast.literal_eval(text))
    found = getattr(config, text.removeprefix("config."), None)
    return tuple(found) if isinstance(found, list | tuple) else _value(config, text)


def _value(config: PretrainedConfig, text: str) -> int:
    """The value of an expression that `find_settings` made."""
    if text.isdigit():
        return int(text)
    names = text.replace("int(", "").rstrip(")").split(" * ")
    return int(math.prod(getattr(config, name.removeprefix("config.")) for name in names))


@dataclass(frozen=True)
class Inner:
    """The inner units of a block."""

    kind: Kind
    units: int
    heads: int
    """Query heads, if groups of them share the keys and values that `units` counts; else the same as `units`."""
    width: int
    """Elements that the last matrix reads."""
    interleaved: bool = False
    """The order in a fused matrix: unit by unit, instead of queries, keys and values after one another."""

    def axis(self, length: int) -> Axis | None:
        """The axis of a dimension of some length; None for one that has nothing to do with the units."""
        narrow = self.width // self.heads * self.units
        if length in (self.width, narrow):
            return Axis(self.kind)
        for copies in (2, 3):
            if length == copies * self.width and self.heads == self.units:
                return Axis(self.kind) if self.interleaved else Axis(self.kind).times(copies)
        if length in (self.heads, self.units):
            return Axis(self.kind)
        return None


def block_rows(
    layer: nn.Module, path: str, block: Draft, other: Draft, inner: Inner, width: int, held: Sequence[str]
) -> tuple[Weights, ...]:
    """Return the rows of one block, relative to its layer, in the order in which its modules ran.

    :param path: of the layer.
    :param width: hidden dimensions.
    :param held: parameters that the layer itself holds for the block.
    """

    def loose(name: str, module: nn.Module, *, behind: bool = False) -> Weights:
        """Parameters that are neither a matrix nor a norm, read by their lengths."""
        own = module.named_parameters(recurse=False)
        return Weights(name, {local: _sides(value, inner, width, behind=behind) for local, value in own})

    rows: dict[str, Weights] = {}
    for call in sorted(block.leaves, key=lambda call: (call not in block.readers, call.start)):
        name = call.path.removeprefix(f"{path}.")
        if call in block.norms:
            rows[name] = norm(name, kind=norm_kind(call))
        elif call is block.writer:
            rows[name] = stored_as(call.module, projection(name, reads=Axis(inner.kind)))
        elif call in block.maps:
            rows[name] = linear(name, reads=HIDDEN, writes=HIDDEN)
        elif call in block.readers:
            length, read = weight_shape(call.module)[:2]
            reads = HIDDEN if read == width else None
            rows[name] = stored_as(call.module, linear(name, reads=reads, writes=inner.axis(length)))
        elif is_matrix(call.module):
            # Where it ran before, on the stream, this is another use of it.
            writes, reads = [inner.axis(length) for length in weight_shape(call.module)[:2]]
            rows.setdefault(name, stored_as(call.module, linear(name, reads=reads, writes=writes)))
        else:
            rows[name] = loose(name, call.module, behind=call.start > block.writer.end)
    for name, module in layer.named_modules():
        if name in ("", *rows) or not any(True for _ in module.parameters(recurse=False)):
            continue
        if _owner(f"{path}.{name}", block, other) is block:
            rows[name] = loose(name, module)
    own = tuple(tensor("", name, *_sides(layer.get_parameter(name), inner, width, behind=True)) for name in held)
    return (*rows.values(), *own)


def find_shared(calls: Sequence[Call], layers: Sequence[str], block: Draft, units: int) -> Shared | None:
    """Return the tensor with an entry for every head that each attention module is given, a bias of positions say."""
    last = {call.path: call for call in calls if inside(call.path, layers[-1])}
    for call in reversed([each for each in calls if inside(block.readers[0].path, each.path)]):
        other = last.get(layers[-1] + call.path.removeprefix(layers[0]))
        if other is None or not inside(call.path, layers[0]) or call.path == layers[0]:
            continue
        names = [name for name in inspect.signature(call.module.forward).parameters if name != "self"]
        given = [(names[place], value) for place, value in enumerate(call.args) if place < len(names)]
        for name, value in (*given, *call.kwargs.items()):
            place = names.index(name) if name in names else len(names)
            again = other.kwargs[name] if name in other.kwargs else (*other.args, *[None] * (place + 1))[place]
            if value is not None and value.dim() > 2 and units in value.shape[:-2] and same(value, again):
                path = call.path.removeprefix(f"{layers[0]}.")
                return Shared(path, place, name, value.shape.index(units))
    return None


def find_narrow(calls: Sequence[Call], layer: str, block: Draft) -> Narrow | None:
    """Return the innermost module around the matrices that read the stream, and which of them read what it is given."""
    around = [call for call in calls if inside(call.path, layer) and call.path != layer]
    around = [call for call in around if call not in block.readers and inside(block.readers[0].path, call.path)]
    if not around or around[-1].entry is None:
        return None
    inner, entry = around[-1], around[-1].entry
    reading = (*block.readers, *block.maps)
    readers = [each.path for each in reading if inside(each.path, inner.path) and holds(entry, vectors(each)[0])]
    keyword = None if inner.args and inner.args[0] is not None else next(iter(inner.kwargs))
    local = [path.removeprefix(f"{layer}.") for path in (inner.path, *readers)]
    return Narrow(local[0], tuple(local[1:]), 0, keyword)


def stored_as(module: nn.Module, row: Weights) -> Weights:
    """Return a row of a matrix with its axes in the order in which a module stores them."""
    if not is_transposed(module):
        return row
    return replace(row, tensors={**row.tensors, "weight": row.tensors["weight"][::-1]})


def _sides(value: nn.Parameter, inner: Inner, width: int, *, behind: bool) -> tuple[Axis | None, ...]:
    """The axes of a parameter by its lengths.

    :param behind: it acts on the block's output, so that no axis is of inner units.
    """
    hidden = (HIDDEN if length == width else None for length in value.shape)
    if behind:
        return tuple(hidden)
    return tuple(inner.axis(length) or other for length, other in zip(value.shape, hidden, strict=True))


def _owner(path: str, block: Draft, other: Draft) -> Draft | None:
    """The one of two blocks that alone has leaves in the innermost module around a path; None where both have."""
    parts = path.split(".")
    for depth in range(len(parts), 0, -1):
        around = ".".join(parts[:depth])
        found = [each for each in (block, other) if any(inside(leaf.path, around) for leaf in each.leaves)]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def attributes(layer: nn.Module, path: str, block: Draft, inner: Inner) -> Sequence[tuple[tuple[str, str, Axis], ...]]:
    """Return the integers that the modules of a block may keep about its size, likeliest choice first.

    A number may be the block's inner width or the hidden size where the two agree, hence choices.
    """
    counts: list[tuple[str, str, Axis]] = []
    widths: list[tuple[str, str, Axis]] = []
    for name, module in layer.named_modules():
        if name == "" or not any(inside(leaf.path, f"{path}.{name}") for leaf in block.leaves):
            continue
        if is_matrix(module):
            if getattr(module, "groups", 0) == inner.heads:
                counts.append((name, "groups", Axis(inner.kind).of(inner.heads // inner.units)))
            continue
        if any(inside(leaf.path, f"{path}.{name}") for leaf in block.norms) and len(list(module.children())) == 0:
            continue
        for attribute, value in vars(module).items():
            if type(value) is not int or attribute.startswith("_"):
                continue
            of_one = "size" in attribute or "dim" in attribute  # the width of a head may agree with their number
            if inner.kind == "heads" and value in (inner.heads, inner.units) and not of_one:
                counts.append((name, attribute, Axis(inner.kind).of(value // inner.units)))
            elif value == inner.width:
                widths.append((name, attribute, Axis(inner.kind)))
    named = [each for each in widths if "head" in each[1] or "inner" in each[1] or "intermediate" in each[1]]
    choices = [(*counts, *widths), (*counts, *named), tuple(counts), ()]
    return list(dict.fromkeys(choices))
