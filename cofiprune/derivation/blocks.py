"""Find the layers of an encoder, and in a layer the two blocks, from the calls of one run.

A block starts with the matrices that read the residual stream, directly or through a norm, and ends with the matrix
that writes into it. The modules between them are the block's own; the last matrix reads its inner width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from cofiprune.conformance.calls import Call, calls_of, first_tensor, holds, inside, near, same
from cofiprune.conformance.specimens import Batch
from cofiprune.errors import AdapterError
from cofiprune.hooks import watching

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Draft:
    """A block as far as it is known from one run of its layer."""

    entries: list[Tensor]
    """The residual stream where the block starts, then the outputs of norms over it."""
    readers: list[Call] = field(default_factory=list)
    """The matrices that read it."""
    inner: list[Call] = field(default_factory=list)
    """Other matrices, in the order in which they ran."""
    maps: list[Call] = field(default_factory=list)
    """Matrices that make another stream of it, of which others read a norm: an image becomes a smaller one, say."""
    norms: list[Call] = field(default_factory=list)
    """Norms over the hidden dimensions."""
    others: list[Call] = field(default_factory=list)
    """Other modules without children that have parameters."""

    @property
    def writer(self) -> Call:
        """The last matrix."""
        return self.inner[-1]

    @property
    def leaves(self) -> list[Call]:
        return [*self.norms, *self.readers, *self.maps, *self.inner, *self.others]

    def starts_with(self, value: Tensor | None) -> bool:
        return any(holds(entry, value) for entry in self.entries)


def find_layers(model: nn.Module, count: int | None) -> str:
    """Return the path of the list of layers: the one with most parameters, every member of it with several matrices.

    Where its members are stages that have lists of layers themselves, all in the same place, those are meant: `*`
    stands for every stage.

    :param count: number of layers by the configuration.
    :raises AdapterError: when there is none.
    """
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = [(path, module) for path, module in lists if count in (None, len(module)) and _are_layers(module)]
    if not found:
        raise AdapterError("it has no list of layers whose members hold the matrices of attention and feed-forward")
    path, stages = max(found, key=lambda each: (_size(each[1]), each[0]))
    inner = [
        {name for name, module in stage.named_modules() if isinstance(module, nn.ModuleList) and _are_layers(module)}
        for stage in stages
    ]
    shared = sorted(set.intersection(*inner), key=lambda name: -_size(stages[0].get_submodule(name)))
    staged = bool(shared) and 2 * sum(_size(stage.get_submodule(shared[0])) for stage in stages) > _size(stages)
    return ".".join(part for part in (path, "*", shared[0]) if part) if staged else path


def _are_layers(members: nn.ModuleList) -> bool:
    matrices = [sum(is_matrix(each) for each in member.modules()) for member in members]
    return bool(matrices) and min(matrices) > 2


def _size(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def is_matrix(module: nn.Module) -> bool:
    """Tell whether a module is a projection: a linear layer, possibly written as a convolution."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() > 1 and not isinstance(module, nn.Embedding | nn.LayerNorm)


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of a module's weight; of a matrix that is stored [in, out], as GPT-2's `Conv1D` is, [out, in]."""
    weight = module._parameters["weight"]
    assert weight is not None
    shape = tuple(weight.shape)
    return shape[::-1] if is_transposed(module) else shape


def vectors(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """What a module is given and returns, vectors last: an image or a sequence in a convolution has them second."""
    if not isinstance(call.module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return call.entry, call.output
    entry, output = (None if each is None else each.movedim(1, -1) for each in (call.entry, call.output))
    return entry, output


def is_transposed(module: nn.Module) -> bool:
    """Tell whether a matrix is stored [in, out]."""
    return type(module).__name__ == "Conv1D"


def is_norm(call: Call) -> bool:
    """Tell whether a module normalises the last dimension of its input."""
    module, entry, output = call.module, call.entry, call.output
    if entry is None or output is None or entry.shape != output.shape or is_matrix(module):
        return False
    return "norm" in type(module).__name__.lower() or isinstance(module, nn.LayerNorm | nn.RMSNorm)


def norm_kind(call: Call) -> Literal["layer", "rms"]:
    """Return `layer` for a norm that subtracts the mean, `rms` for one that does not."""
    entry = call.entry
    assert entry is not None
    with torch.no_grad(), torch.random.fork_rng():
        shifted = call.module(entry + 3)
    return "layer" if near(shifted, call.output) else "rms"


def find_blocks(calls: Sequence[Call], layer: str) -> list[Draft]:
    """Split the calls under a layer into blocks.

    :raises AdapterError: when they are not two, or a block has no last matrix.
    """
    whole = next((call for call in calls if call.path == layer), None)
    if whole is None or whole.entry is None or whole.output is None:
        raise AdapterError(f"its layer {layer!r} is not called with the states of the layer before it")
    if whole.entry.shape != whole.output.shape:
        raise AdapterError(f"its layer {layer!r} changes the shape of the states, so that it cannot be left out")
    leaves = [call for call in calls if inside(call.path, layer) and _is_leaf(call)]
    entry, _ = whole.states
    assert entry is not None
    blocks = _split(sorted(leaves, key=lambda call: call.end), entry)
    if len(blocks) != 2 or not all(block.readers and block.inner for block in blocks):
        shown = "; ".join(_shown(block, layer) for block in blocks)
        raise AdapterError(
            f"two blocks, attention and feed-forward, were looked for in its layer {layer!r}, and what could be told "
            f"apart is {len(blocks)}: {shown or 'none'}"
        )
    return blocks


def _is_leaf(call: Call) -> bool:
    return not any(True for _ in call.module.children()) and any(True for _ in call.module.parameters(recurse=False))


def _split(leaves: Sequence[Call], entry: Tensor) -> list[Draft]:
    current = Draft([entry])
    blocks = [current]
    loose: list[Call] = []
    width = entry.shape[-1]
    for call in leaves:
        value, _ = vectors(call)
        if is_norm(call):
            if current.starts_with(value):
                current.norms.append(call)
                assert call.output is not None
                current.entries.append(call.output)
            else:
                loose.append(call)
        elif not is_matrix(call.module):
            current.others.append(call)
        elif value is None:
            current.inner.append(call)
        elif _is_of_a_map(current, loose, value, width) or current.starts_with(value):
            current.readers.append(call)
        else:
            following = _following(current, loose, value, width)
            if following is None:
                current.inner.append(call)
            else:
                _settle(current, [each for each in loose if each not in following.norms])
                loose.clear()
                current = following
                blocks.append(current)
                current.readers.append(call)
    _settle(current, loose)
    return blocks


def _is_of_a_map(block: Draft, loose: list[Call], value: Tensor, width: int) -> bool:
    """Tell whether a matrix reads a norm of what another one has made of the stream, and note both of these if so."""
    norm = next((each for each in loose if same(each.output, value)), None)
    if norm is None or norm.entry is None or norm.output is None:
        return False
    maps = [
        each for each in block.readers if same(vectors(each)[1], norm.entry) and weight_shape(each.module)[0] == width
    ]
    for each in maps:
        block.readers.remove(each)
        block.maps.append(each)
        block.norms.append(norm)
        block.entries += [norm.entry, norm.output]
        loose.remove(norm)
        break
    return bool(maps)


def _following(block: Draft, loose: Sequence[Call], value: Tensor, width: int) -> Draft | None:
    """The block that starts with a matrix, if one does: it reads a norm, or what a block has added to the stream."""
    if not block.readers or not any(inner.writes == width for inner in block.inner):
        return None
    before = next((norm for norm in reversed(loose) if same(norm.output, value)), None)
    if before is not None:
        assert before.entry is not None
        assert before.output is not None
        return Draft([before.entry, before.output], norms=[before])
    entry = block.entries[0]
    written = (call.output for call in (*reversed(loose), block.writer))
    if any(each is not None and each.shape == entry.shape and near(entry + each, value) for each in written):
        return Draft([value])
    return None


def _settle(block: Draft, loose: Sequence[Call]) -> None:
    """Give a block the norms that ran in it: those behind its last matrix are over the hidden dimensions."""
    for call in loose:
        behind = bool(block.inner) and call.start > block.writer.end
        (block.norms if behind else block.others).append(call)


def _shown(block: Draft, layer: str) -> str:
    names = [call.path.removeprefix(f"{layer}.") for call in (*block.readers, *block.inner)]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} others" if names[6:] else "")


def mixes(model: PreTrainedModel, batch: Batch, layer: str, path: str, *, token: int = 0) -> bool:
    """Tell whether the input of a module for one token changes with another token at the entry of its layer.

    :param token: the one that is changed, of the first example. With the first token, those that follow it are
        compared; with any other, those before it.
    """
    plain, changed = (_entry(model, batch, layer, path, token, shift) for shift in (0.0, 1.0))
    if plain is None or changed is None:
        return False
    plain, changed = (value.reshape(value.shape[0], -1, value.shape[-1])[0] for value in (plain, changed))
    others = slice(1, None) if token == 0 else slice(None, token)
    return not near(plain[others], changed[others])


def _entry(model: PreTrainedModel, batch: Batch, layer: str, path: str, token: int, shift: float) -> Tensor | None:
    """The input of a module when a token of the first example is shifted at the entry of a layer."""

    shapes: list[torch.Size] = []

    def move(module: nn.Module, args: Any, kwargs: Any) -> Any:
        moved = [value.clone() if isinstance(value, Tensor) else value for value in args]
        named = {name: value.clone() if isinstance(value, Tensor) else value for name, value in kwargs.items()}
        states = first_tensor([*moved, *named.values()])
        if states is not None:
            shapes.append(states.shape[:2])
            # Different for every dimension: a norm would remove a shift that is the same for all.
            states[0, token] += shift * torch.linspace(-1, 1, states.shape[-1], dtype=states.dtype)
        return tuple(moved), named

    with watching(model, before={layer: move}):
        calls = calls_of(model, batch, [path])
    entry = calls[0].entry if calls else None
    # Some attention has tokens first and examples second.
    return entry.transpose(0, 1) if entry is not None and entry.shape[:2] == shapes[0][::-1] else entry
