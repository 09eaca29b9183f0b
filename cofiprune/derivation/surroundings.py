"""What stands around the layers: tables, norms and matrices that write hidden dimensions or read them.

A module after the layers reads hidden dimensions where, when some of them are zeroed everywhere before, what it is
given has zeros there too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cofiprune.adapter import HIDDEN, Axis, Weights, embedding, linear, norm
from cofiprune.conformance.calls import Call, calls_of, inside, same
from cofiprune.conformance.specimens import Batch
from cofiprune.derivation.blocks import is_matrix, is_norm, is_transposed, norm_kind, weight_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ZEROED = (1, 4, 5)
"""Hidden dimensions that are zeroed to see who reads them."""


@dataclass
class Surroundings:
    """Rows of the stem, relative to the encoder, and of the head, relative to the model."""

    stem: list[Weights] = field(default_factory=list)
    head: list[Weights] = field(default_factory=list)


def find_surroundings(
    model: PreTrainedModel, batch: Batch, layers: Sequence[str], base: str, width: int, writers: Sequence[str]
) -> Surroundings:
    """Describe everything outside the layers.

    :param writers: paths of the last matrices of all blocks, and of the norms in the layers.
    """
    outside = _Outside(model, batch, layers, width, writers)
    found = Surroundings()
    for path, row in outside.rows():
        if base and not inside(path, base):
            found.head.append(row)
        else:
            local = path.removeprefix(base).lstrip(".")
            found.stem.append(replace(row, modules=local, optional=bool(base)))
    return found


class _Outside:
    """One look at a model from outside of its layers."""

    def __init__(
        self, model: PreTrainedModel, batch: Batch, layers: Sequence[str], width: int, writers: Sequence[str]
    ) -> None:
        self.model = model
        self.layers = layers
        self.width = width
        calls = calls_of(model, batch)
        first = next(call for call in calls if call.path == layers[0])
        self.tokens = first.entry.shape[-2] if first.entry is not None else 1
        self.batch_size = first.entry.shape[0] if first.entry is not None else 1
        self.start = first.start
        own = [call for call in calls if not any(inside(call.path, layer) for layer in layers)]
        self.calls = [call for call in own if any(True for _ in call.module.parameters(recurse=False))]
        self.tables = {id(value) for value in self._tables()}
        self.silenced = list(writers)
        while True:
            self.seen = {(call.path, call.start): call for call in calls_of(self._zeroed(), batch)}
            # Behind the layers, what a norm makes of zeros is its bias.
            after = [call for call in self.calls if call.start > self.start and call.path not in self.silenced]
            more = [call.path for call in after if is_norm(call) and self._reads(call)]
            if not more:
                break
            self.silenced += more

    def _tables(self) -> Iterator[Tensor]:
        """The tables whose entries are added into the residual stream, rather than joined and mapped into it first."""
        for call in self.calls:
            if not isinstance(call.module, nn.Embedding) or call.module.weight.shape[-1] != self.width:
                continue
            if not any(_is_part(call.output, other.entry) for other in self.calls if is_matrix(other.module)):
                yield call.module.weight

    def _zeroed(self) -> PreTrainedModel:
        """A copy of the model that writes nothing into some of the hidden dimensions."""
        zeroed = copy.deepcopy(self.model)
        before = [call.path for call in self.calls if call.start < self.start]
        with torch.no_grad():
            for path in (*self.silenced, *before):
                module = zeroed.get_submodule(path)
                for value in module.parameters(recurse=False):
                    self._zero(module, value)
            for module in zeroed.modules():
                if not isinstance(module, nn.Embedding) and not is_matrix(module):
                    for value in module.parameters(recurse=False):
                        if value.dim() > 1 and value.shape[-1] == self.width:
                            value[..., list(_ZEROED)] = 0
        return zeroed

    def _zero(self, module: nn.Module, value: nn.Parameter) -> None:
        if isinstance(module, nn.Embedding) or is_transposed(module):
            if value.shape[-1] == self.width:
                value[..., list(_ZEROED)] = 0
        elif value.shape[0] == self.width:
            value[list(_ZEROED)] = 0

    def rows(self) -> Iterator[tuple[str, Weights]]:
        """Path and row of every module that has to do with hidden dimensions."""
        described: set[str] = set()
        writes_on = self._writes_on()
        for call in self.calls:
            if call.path in described:
                continue
            row = self._row(call, writes_on)
            if row is not None:
                described.add(call.path)
                yield call.path, row
        ran = {call.path for call in self.calls}
        for path, module in self.model.named_modules():
            if path in described or any(inside(path, layer) for layer in self.layers):
                continue
            tensors = self._held(module)
            if tensors and not isinstance(module, nn.Embedding) and not is_matrix(module):
                yield path, Weights(path, tensors)
            elif isinstance(module, nn.Embedding) and module.weight.shape[-1] == self.width and path not in ran:
                yield path, embedding(path)

    def _held(self, module: nn.Module) -> Mapping[str, tuple[Axis | None, ...]]:
        """Parameters that a module which is not a leaf, or did not run, holds itself, hidden dimensions last."""
        own = dict(module.named_parameters(recurse=False))
        rows = {
            name: (*[None] * (value.dim() - 1), HIDDEN.scaled)
            for name, value in own.items()
            if value.dim() > 1 and value.shape[-1] == self.width
        }
        # A vector that a model multiplies states with itself; one of a module without others is a norm's.
        vectors = {name: (HIDDEN,) for name, value in own.items() if tuple(value.shape) == (self.width,)}
        return {**rows, **vectors} if any(True for _ in module.children()) else rows

    def _row(self, call: Call, writes_on: set[str]) -> Weights | None:
        before, module = call.start < self.start, call.module
        if isinstance(module, nn.Embedding):
            return embedding(call.path) if id(module.weight) in self.tables else None
        if is_norm(call):
            if call.entry is None or call.entry.shape[-1] != self.width:
                return None
            if call.path in writes_on:
                return norm(call.path, kind=norm_kind(call), read_by=self._reader(call))
            return norm(call.path, kind=norm_kind(call)) if before or self._reads(call) else None
        if not is_matrix(module):
            return None
        tied = id(module.weight) in self.tables
        copies = 1 if tied else self._copies(call)
        reads = HIDDEN.times(copies) if copies else None
        writes = None
        if call.path in writes_on:
            writes = HIDDEN
        elif before and self._writes(call):
            writes = HIDDEN.scaled
        if reads is None and writes is None:
            return None
        if is_transposed(module):
            return Weights(call.path, {"weight": (reads, writes), "bias": (writes,)}, rows=self._rows(call))
        return linear(call.path, reads=reads, writes=writes, rows=self._rows(call))

    def _reads(self, call: Call) -> bool:
        """Whether what a module is given has zeros in the zeroed dimensions."""
        seen = self.seen.get((call.path, call.start))
        return seen is not None and _has_zeros(seen.entry, self.width)

    def _copies(self, call: Call) -> int:
        """How many sets of hidden dimensions a matrix reads, side by side; 0 for none."""
        seen = self.seen.get((call.path, call.start))
        if seen is None or seen.entry is None or seen.entry.shape[-1] % self.width:
            return 0
        parts = torch.split(seen.entry, self.width, dim=-1)
        return len(parts) if all(_has_zeros(part, self.width) for part in parts) else 0

    def _writes(self, call: Call) -> bool:
        seen = self.seen.get((call.path, call.start))
        return seen is not None and (
            _has_zeros(seen.output, self.width)
            or (
                seen.output is not None and seen.output.dim() > 2 and _has_zeros(seen.output.movedim(1, -1), self.width)
            )
        )

    def _rows(self, call: Call) -> tuple[int, int]:
        """On how many rows per example a matrix acts, as a multiple of the tokens and a rest."""
        assert call.output is not None
        channels = weight_shape(call.module)[0]
        count = call.output.numel() // channels // self.batch_size
        if count == 1:
            return (0, 1)
        times = round(count / self.tokens)
        return (times, count - times * self.tokens) if times else (0, count)

    def _writes_on(self) -> set[str]:
        """Modules between the encoder and a matrix that shares its weight with a token table."""
        found: set[str] = set()
        after = [call for call in self.calls if call.start > self.start]
        for call in after:
            weight = call.module._parameters.get("weight")
            if weight is None or id(weight) not in self.tables or isinstance(call.module, nn.Embedding):
                continue
            wanted = call.entry
            for each in reversed([other for other in after if other.end < call.start]):
                width = None if each.output is None else each.output.shape[-1]
                if wanted is None or width != self.width:
                    break
                found.add(each.path)
                if is_matrix(each.module) or self._reads(each):
                    break
        return found

    def _reader(self, call: Call) -> str | None:
        """The matrix right behind a norm, where it is the norm's only reader."""
        for other in self.calls:
            if other.start > call.end and same(other.entry, call.output) and is_matrix(other.module):
                return f"{other.path}.weight"
        return None


def _is_part(part: Tensor | None, whole: Tensor | None) -> bool:
    """Whether a tensor [..., n] is joined with others into one [..., m > n]."""
    if part is None or whole is None or part.dim() != whole.dim() or part.shape[-1] >= whole.shape[-1]:
        return False
    offsets = range(whole.shape[-1] - part.shape[-1] + 1)
    return any(same(whole[..., start : start + part.shape[-1]], part) for start in offsets)


def _has_zeros(value: Tensor | None, width: int) -> bool:
    if value is None or value.shape[-1] != width:
        return False
    columns = value[..., list(_ZEROED)]
    return not bool(columns.any()) and bool(value.any())
