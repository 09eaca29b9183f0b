"""The rows of a block: which side of which parameter follows its inner units, and which the hidden dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from cofiprune.adapter import HIDDEN, Axis, Weights, linear, norm, projection, tensor
from cofiprune.conformance.calls import Call, inside
from cofiprune.derivation.blocks import Draft, is_matrix, is_transposed, norm_kind, weight_shape
from cofiprune.structure import Kind


@dataclass(frozen=True)
class Inner:
    """The inner units of a block."""

    kind: Kind
    units: int
    width: int
    """Elements that the last matrix reads."""
    shared: int | None = None
    """Query heads, where `units` counts the keys and values that groups of them share."""
    interleaved: bool = False
    """Where one matrix makes several things: unit by unit, instead of thing by thing."""

    def axis(self, length: int) -> Axis | None:
        """The axis of a dimension of some length; None for one that has nothing to do with the units."""
        heads = self.shared or self.units
        narrow = self.width // heads * self.units
        if length in (self.width, narrow):
            return Axis(self.kind)
        for copies in (2, 3):
            if length == copies * self.width and self.shared is None:
                return Axis(self.kind) if self.interleaved else Axis(self.kind).times(copies)
        if length in (heads, self.units):
            return Axis(self.kind)
        return None


def block_rows(
    layer: nn.Module, path: str, block: Draft, other: Draft, inner: Inner, width: int, held: Sequence[str]
) -> tuple[Weights, ...]:
    """The rows of one block, relative to its layer, in the order in which its modules ran.

    :param path: of the layer.
    :param width: hidden dimensions.
    :param held: parameters that the layer itself holds for the block.
    """
    rows: dict[str, Weights] = {}
    ordered = sorted(block.leaves, key=lambda call: (call not in block.readers, call.start))
    for call in ordered:
        name = call.path.removeprefix(f"{path}.")
        if call in block.norms:
            rows[name] = norm(name, kind=norm_kind(call))
        elif call is block.writer:
            rows[name] = _last(name, call.module, Axis(inner.kind))
        elif call in block.readers:
            rows[name] = _matrix(name, call.module, HIDDEN, _axis_of(call, inner))
        elif is_matrix(call.module):
            # Where it ran before, on the stream, this is another use of it.
            rows.setdefault(name, _inner_matrix(name, call.module, inner))
        else:
            behind = call.start > block.writer.end
            rows.update(_loose(name, call.module, inner, width, behind=behind))
    rows.update(_siblings(layer, path, block, inner, rows))
    for name, module in layer.named_modules():
        if name in ("", *rows) or not any(True for _ in module.parameters(recurse=False)):
            continue
        full = f"{path}.{name}"
        if _owner(full, block, other) is block:
            rows.update(_loose(name, module, inner, width, behind=False))
    own = tuple(tensor("", name, *_sides(layer.get_parameter(name), inner, width, behind=True)) for name in held)
    return (*rows.values(), *own)


def _axis_of(call: Call, inner: Inner) -> Axis | None:
    assert call.output is not None
    return inner.axis(call.output.shape[-1])


def _inner_matrix(name: str, module: nn.Module, inner: Inner) -> Weights:
    writes, reads = [inner.axis(length) for length in weight_shape(module)[:2]]
    return _matrix(name, module, reads, writes)


def _matrix(name: str, module: nn.Module, reads: Axis | None, writes: Axis | None) -> Weights:
    if is_transposed(module):
        return Weights(name, {"weight": (reads, writes), "bias": (writes,)}, rows=(1, 0))
    return linear(name, reads=reads, writes=writes)


def _last(name: str, module: nn.Module, reads: Axis) -> Weights:
    if is_transposed(module):
        return Weights(
            name, {"weight": (reads.scaled, HIDDEN.scaled), "bias": (HIDDEN.scaled,)}, gated=True, rows=(1, 0)
        )
    return projection(name, reads=reads)


def _loose(name: str, module: nn.Module, inner: Inner, width: int, *, behind: bool) -> dict[str, Weights]:
    """Parameters that are neither a matrix nor a norm: each dimension by its length.

    :param behind: they act on what the block has written.
    """
    tensors = {
        local: _sides(value, inner, width, behind=behind) for local, value in module.named_parameters(recurse=False)
    }
    return {name: Weights(name, tensors)}


def _sides(value: nn.Parameter, inner: Inner, width: int, *, behind: bool) -> tuple[Axis | None, ...]:
    """The axes of a parameter by its lengths."""
    if behind:
        return tuple(HIDDEN if length == width else None for length in value.shape)
    return tuple(inner.axis(length) or (HIDDEN if length == width else None) for length in value.shape)


def _siblings(
    layer: nn.Module, path: str, block: Draft, inner: Inner, rows: dict[str, Weights]
) -> Iterator[tuple[str, Weights]]:
    """Matrices beside those that read the stream, of the same shape, which did not run."""
    known = {call.path.removeprefix(f"{path}.") for call in block.readers}
    for call in block.readers:
        local = call.path.removeprefix(f"{path}.")
        parent, _, _ = local.rpartition(".")
        for name, module in layer.named_modules():
            if name.rpartition(".")[0] != parent or name in known or name in rows or not is_matrix(module):
                continue
            if type(module) is type(call.module) and weight_shape(module) == weight_shape(call.module):
                yield name, _matrix(name, module, HIDDEN, _axis_of(call, inner))


def _owner(path: str, block: Draft, other: Draft) -> Draft | None:
    """Which of two blocks a module belongs to: that of which there is more in the innermost module around it."""
    parts = path.split(".")
    for depth in range(len(parts), 0, -1):
        around = ".".join(parts[:depth])
        found = [each for each in (block, other) if any(inside(leaf.path, around) for leaf in each.leaves)]
        if len(found) == 1:
            return found[0]
        if found:
            return None
    return None


def attributes(layer: nn.Module, path: str, block: Draft, inner: Inner) -> Sequence[tuple[tuple[str, str, Axis], ...]]:
    """What integers the modules of a block may keep about its size, likeliest choice first.

    A number may be the block's inner width or the hidden size where the two agree, hence choices.
    """
    counts: list[tuple[str, str, Axis]] = []
    widths: list[tuple[str, str, Axis]] = []
    heads = inner.shared or inner.units
    for name, module in layer.named_modules():
        if not any(inside(leaf.path, f"{path}.{name}") for leaf in block.leaves) or name == "":
            continue
        if is_matrix(module):
            if inner.kind == "heads" and getattr(module, "groups", 0) == heads:
                counts.append((name, "groups", Axis(inner.kind).of(heads // inner.units)))
            continue
        if any(inside(leaf.path, f"{path}.{name}") for leaf in block.norms) and len(list(module.children())) == 0:
            continue
        for attribute, value in vars(module).items():
            if type(value) is not int or attribute.startswith("_"):
                continue
            if inner.kind == "heads" and value in (heads, inner.units):
                counts.append((name, attribute, Axis(inner.kind).of(value // inner.units)))
            elif value == inner.width:
                widths.append((name, attribute, Axis(inner.kind)))
    named = [each for each in widths if "head" in each[1] or "inner" in each[1] or "intermediate" in each[1]]
    choices = [(*counts, *widths), (*counts, *named), tuple(counts), ()]
    return list(dict.fromkeys(choices))
