"""Describe the modules around the layers: tables, norms and matrices that write hidden dimensions or read them.

Some hidden dimensions are zeroed everywhere before and in the layers. A module behind the layers whose input has zeros
there reads hidden dimensions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cofiprune.adapter import HIDDEN, Axis, Weights, embedding, linear, norm
from cofiprune.conformance.calls import Call, calls_of, inside, same
from cofiprune.conformance.specimens import Batch
from cofiprune.derivation.blocks import is_matrix, is_norm, is_transposed, norm_kind, weight_shape
from cofiprune.derivation.rows import stored_as

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ZEROED = [1, 4, 5]
"""Hidden dimensions that are zeroed to see which modules read them."""


def find_surroundings(
    model: PreTrainedModel, batch: Batch, layers: Sequence[str], base: str, width: int, writers: Sequence[str]
) -> tuple[tuple[Weights, ...], tuple[Weights, ...]]:
    """Describe everything outside the layers: the stem, relative to the encoder, and the head, relative to the model.

    :param base: path of the encoder.
    :param width: hidden dimensions.
    :param writers: paths of the last matrices of all blocks, and of the norms in the layers.
    """
    rows = list(_Outside(model, batch, layers, width, writers).rows())
    head = tuple(row for row in rows if base and not inside(row.modules, base))
    stem = (row for row in rows if row not in head)
    local = (replace(row, modules=row.modules.removeprefix(base).lstrip("."), optional=bool(base)) for row in stem)
    return tuple(local), head


class _Outside:
    """The calls of the modules outside the layers, of a model as it is and with zeroed dimensions."""

    def __init__(
        self, model: PreTrainedModel, batch: Batch, layers: Sequence[str], width: int, writers: Sequence[str]
    ) -> None:
        self.model = model
        self.layers = layers
        self.width = width
        calls = calls_of(model, batch)
        first = next(call for call in calls if call.path == layers[0])
        self.examples, self.tokens = (1, 1) if first.entry is None else (first.entry.shape[0], first.entry.shape[-2])
        self.start = first.start
        own = [call for call in calls if not any(inside(call.path, layer) for layer in layers)]
        self.calls = [call for call in own if any(True for _ in call.module.parameters(recurse=False))]
        self.tables = {id(value) for value in self._tables()}
        silenced = list(writers)
        while True:
            self.zeroed = {(call.path, call.start): call for call in calls_of(self._zeroed(silenced), batch)}
            # Behind the layers, the output of a norm over zeros is its bias.
            after = [call for call in self.calls if call.start > self.start and call.path not in silenced]
            more = [call.path for call in after if is_norm(call) and self._reads(call)]
            if not more:
                break
            silenced += more

    def _tables(self) -> Iterator[Tensor]:
        """The tables whose entries are added into the residual stream, rather than joined and projected into it."""
        for call in self.calls:
            if isinstance(call.module, nn.Embedding) and call.module.weight.shape[-1] == self.width:
                matrices = (other for other in self.calls if is_matrix(other.module))
                if not any(_is_part(call.output, matrix.entry) for matrix in matrices):
                    yield call.module.weight

    def _zeroed(self, silenced: Sequence[str]) -> PreTrainedModel:
        """A copy of the model that writes nothing into some of the hidden dimensions."""
        zeroed = copy.deepcopy(self.model)
        before = [call.path for call in self.calls if call.start < self.start]
        with torch.no_grad():
            for module in map(zeroed.get_submodule, (*silenced, *before)):
                last = isinstance(module, nn.Embedding) or is_transposed(module)
                for value in module.parameters(recurse=False):
                    dimension = -1 if last else 0
                    if value.shape[dimension] == self.width:
                        value.index_fill_(dimension, torch.tensor(_ZEROED), 0)
            for module in zeroed.modules():
                if not isinstance(module, nn.Embedding) and not is_matrix(module):
                    for value in module.parameters(recurse=False):
                        if value.dim() > 1 and value.shape[-1] == self.width:
                            value[..., _ZEROED] = 0
        return zeroed

    def rows(self) -> Iterator[Weights]:
        """The row of every module that has to do with hidden dimensions."""
        described: set[str] = set()
        written_on = self._written_on()
        for call in self.calls:
            row = None if call.path in described else self._row(call, written_on)
            if row is not None:
                described.add(call.path)
                yield row
        ran = {call.path for call in self.calls}
        for path, module in self.model.named_modules():
            if path in described or any(inside(path, layer) for layer in self.layers):
                continue
            if isinstance(module, nn.Embedding):
                if module.weight.shape[-1] == self.width and path not in ran:
                    yield embedding(path)
            elif not is_matrix(module) and (tensors := self._held(module)):
                yield Weights(path, tensors)

    def _held(self, module: nn.Module) -> Mapping[str, tuple[Axis | None, ...]]:
        """Parameters that a module which is no leaf, or did not run, holds itself, hidden dimensions last."""
        own = dict(module.named_parameters(recurse=False))
        rows = {
            name: (*[None] * (value.dim() - 1), HIDDEN.scaled)
            for name, value in own.items()
            if value.dim() > 1 and value.shape[-1] == self.width
        }
        # A vector that a model multiplies states with itself; one of a module without others is a norm's.
        vectors = {name: (HIDDEN,) for name, value in own.items() if tuple(value.shape) == (self.width,)}
        return {**rows, **vectors} if any(True for _ in module.children()) else rows

    def _row(self, call: Call, written_on: set[str]) -> Weights | None:
        before, module = call.start < self.start, call.module
        if isinstance(module, nn.Embedding):
            return embedding(call.path) if id(module.weight) in self.tables else None
        if is_norm(call):
            if call.reads != self.width:
                return None
            if call.path in written_on:
                return norm(call.path, kind=norm_kind(call), read_by=self._reader(call))
            return norm(call.path, kind=norm_kind(call)) if before or self._reads(call) else None
        if not is_matrix(module):
            return None
        copies = 1 if id(module.weight) in self.tables else self._copies(call)
        reads = HIDDEN.times(copies) if copies else None
        writes = None
        if call.path in written_on:
            writes = HIDDEN
        elif before and self._writes(call):
            writes = HIDDEN.scaled
        if reads is None and writes is None:
            return None
        return stored_as(module, linear(call.path, reads=reads, writes=writes, rows=self._vectors(call)))

    def _zeroed_run(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """Input and output of the same call in the model with zeroed dimensions."""
        found = self.zeroed.get((call.path, call.start))
        return (None, None) if found is None else (found.entry, found.output)

    def _reads(self, call: Call) -> bool:
        """Tell whether the input of a module has zeros in the zeroed dimensions."""
        return _has_zeros(self._zeroed_run(call)[0], self.width)

    def _copies(self, call: Call) -> int:
        """The number of sets of hidden dimensions that a matrix reads, side by side."""
        entry, _ = self._zeroed_run(call)
        if entry is not None and isinstance(call.module, nn.Conv1d | nn.Conv2d):
            entry = entry.movedim(1, -1)
        if entry is None or entry.shape[-1] % self.width:
            return 0
        parts = torch.split(entry, self.width, dim=-1)
        return len(parts) if all(_has_zeros(part, self.width) for part in parts) else 0

    def _writes(self, call: Call) -> bool:
        _, output = self._zeroed_run(call)
        # A convolution over an image has its channels second.
        moved = output.movedim(1, -1) if output is not None and output.dim() > 2 else None
        return _has_zeros(output, self.width) or _has_zeros(moved, self.width)

    def _vectors(self, call: Call) -> tuple[int, int]:
        """On how many vectors per example a matrix acts, as a multiple of the tokens and a remainder."""
        assert call.output is not None
        count = call.output.numel() // weight_shape(call.module)[0] // self.examples
        if count == 1:
            return (0, 1)
        times = round(count / self.tokens)
        return (times, count - times * self.tokens) if times else (0, count)

    def _written_on(self) -> set[str]:
        """Modules between the encoder and a matrix that shares its weight with a token table."""
        found: set[str] = set()
        after = [call for call in self.calls if call.start > self.start]
        for call in after:
            weight = call.module._parameters.get("weight")
            if weight is None or id(weight) not in self.tables or isinstance(call.module, nn.Embedding):
                continue
            for each in reversed([other for other in after if other.end < call.start]):
                if each.writes != self.width:
                    break
                found.add(each.path)
                if is_matrix(each.module) or self._reads(each):
                    break
        return found

    def _reader(self, call: Call) -> str | None:
        """The matrix right behind a norm, where it is the norm's only reader."""
        after = (other for other in self.calls if other.start > call.end and is_matrix(other.module))
        return next((f"{other.path}.weight" for other in after if same(other.entry, call.output)), None)


def _is_part(part: Tensor | None, whole: Tensor | None) -> bool:
    """Tell whether a tensor [..., n] is joined with others into one [..., m > n]."""
    if part is None or whole is None or part.dim() != whole.dim() or part.shape[-1] >= whole.shape[-1]:
        return False
    offsets = range(whole.shape[-1] - part.shape[-1] + 1)
    return any(same(whole[..., start : start + part.shape[-1]], part) for start in offsets)


def _has_zeros(value: Tensor | None, width: int) -> bool:
    if value is None or value.shape[-1] != width:
        return False
    return not bool(value[..., _ZEROED].any()) and bool(value.any())
