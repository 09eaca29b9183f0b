"""Find where a block leaves its layer by trying: without the block, the residual stream must come out unchanged.

There are three ways. A module is given the stream and returns it (post-norm in a module of its own). The output of a
module is added to the stream outside of it, so that it has to return zeros (pre-norm). Or a norm follows that addition:
the stream leaves through the norm.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cofiprune.conformance.calls import Call, calls_of, holding, inside, near, same
from cofiprune.conformance.exits import bypassing
from cofiprune.conformance.specimens import Batch
from cofiprune.derivation.blocks import Draft
from cofiprune.structure import BlockExit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Bypass:
    """The exit of a block, and the modules that do not run without it; paths from the model."""

    exit: BlockExit
    bypassed: tuple[BlockExit, ...]
    held: tuple[str, ...] = ()
    """Parameters that the layer itself holds for the block, by their names in the layer."""


@dataclass(frozen=True)
class _Span:
    """A block in its layer, with the residual stream before and after it."""

    block: Draft
    other: Draft
    entry: Tensor
    after: Tensor
    seen_at: str
    """A module at which the stream behind the block can be seen."""
    given: bool
    """True if it is the input of that module, False if it is its output."""

    def is_unchanged(self, model: PreTrainedModel, batch: Batch, bypass: Bypass | None = None) -> bool:
        """Tell whether the stream leaves as it came, without the block or as the model is; False if it cannot run."""
        without = nullcontext() if bypass is None else bypassing(model, (bypass.exit, *bypass.bypassed))
        try:
            with without:
                calls = calls_of(model, batch, [self.seen_at])
        except Exception:  # a model without the block may fail anywhere
            return False
        return bool(calls) and near(calls[0].states[0 if self.given else 1], self.entry)


def find_bypasses(
    model: PreTrainedModel, batch: Batch, calls: Sequence[Call], layer: str, blocks: Sequence[Draft]
) -> tuple[Bypass, Bypass] | None:
    """Find how each of two blocks leaves its layer; None when that is not found for one of them.

    The stream between them is the output of the norm between them (post-norm) or its input (pre-norm), or what a block
    without a norm in front reads. Post-norm is tried first, because one of its norms could be removed too as if it
    stood before the block that follows.
    """
    first, second = blocks
    whole = next(call for call in calls if call.path == layer)
    _, output = whole.states
    assert output is not None
    reader = second.readers[0].path
    boundary = next((norm for norm in second.norms if norm.end < second.readers[0].start), None)
    ways: list[tuple[Tensor, str, list[Call], list[Call]]] = [(second.entries[0], reader, [], [])]
    if boundary is not None:
        assert boundary.entry is not None
        assert boundary.output is not None
        ways = [(boundary.output, reader, [boundary], []), (boundary.entry, boundary.path, [], [boundary])]
    rest = [norm for norm in second.norms if norm is not boundary]
    for between, seen_at, behind, before in ways:
        left = replace(first, norms=[*first.norms, *behind])
        right = replace(second, norms=[*before, *rest])
        found = []
        for span in (
            _Span(left, right, first.entries[0], between, seen_at, given=True),
            _Span(right, left, between, output, layer, given=False),
        ):
            tried = _candidates(calls, layer, span)
            bypass = next((each for each in tried if span.is_unchanged(model, batch, each)), None)
            if bypass is None:
                break
            held = []
            for name, value in model.get_submodule(layer).named_parameters(recurse=False):
                with holding(value, torch.zeros_like(value)):
                    # Where nothing is written without it, it scales all that the block writes.
                    if span.is_unchanged(model, batch):
                        held.append(name)
            found.append(replace(bypass, held=tuple(held)))
        if len(found) == 2:
            first.norms, second.norms = left.norms, right.norms
            return found[0], found[1]
    return None


def _candidates(calls: Sequence[Call], layer: str, span: _Span) -> Iterator[Bypass]:
    """Yield possible bypasses, those that skip most modules first."""
    under = [call for call in calls if inside(call.path, layer) and call.path != layer]
    apart = [call for call in under if not any(inside(leaf.path, call.path) for leaf in span.other.leaves)]
    apart.sort(key=lambda call: call.path.count("."))
    for call in apart:
        exit = _exit_with(call, span.entry)
        if exit is not None and same(call.states[1], span.after):
            yield _complete(span, apart, exit)
    last = span.block.writer
    silent = [call for call in apart if inside(last.path, call.path) or call.start > last.end]
    zeros = [exit for call in silent if (exit := _zero_exit(call, span)) is not None]
    norms = [call for call in span.block.norms if same(call.output, span.after)]
    for norm in norms:
        for exit in zeros:
            if not inside(norm.path, exit.module):
                yield _complete(span, apart, BlockExit(norm.path), exit)
    for exit in () if norms else zeros:
        yield _complete(span, apart, exit)


def _exit(call: Call, argument: int = 0, keyword: str | None = None, *, residual: bool = True) -> BlockExit:
    return BlockExit(call.path, argument, keyword, call.outputs, residual, call.wrapped)


def _exit_with(call: Call, value: Tensor) -> BlockExit | None:
    """The module as one that returns a tensor among its arguments; None when it is not given that."""
    if call.carried and same(call.states[0], value):
        return replace(_exit(call), carried=call.carried)
    names = [name for name in inspect.signature(call.module.forward).parameters if name != "self"]
    for index, given in enumerate(call.args):
        if given is not None and same(given, value):
            named = names[index] if index < len(names) and names[index] not in ("args", "kwargs", "input") else None
            return _exit(call, index, named)
    for name, given in call.kwargs.items():
        if same(given, value):
            return _exit(call, names.index(name) if name in names else 0, name)
    return None


def _zero_exit(call: Call, span: _Span) -> BlockExit | None:
    """The module as one that returns zeros."""
    if call.output is None or call.output.shape[-1] != span.entry.shape[-1]:
        return None
    for value in (*span.block.entries, *call.args, *call.kwargs.values()):
        exit = _exit_with(call, value) if value is not None and value.shape == call.output.shape else None
        if exit is not None:
            return replace(exit, residual=False)
    if call.args and call.args[0] is not None and call.output.shape == span.entry.shape:
        # The modules bypassed before it hand the states on, so that it is given them then.
        return _exit(call, residual=False)
    return None


def _complete(span: _Span, apart: Sequence[Call], exit: BlockExit, *bypassed: BlockExit) -> Bypass:
    """Skip the other modules of the block too: they would fail on parameters that are removed."""
    gone = [exit, *bypassed]
    more: list[BlockExit] = []
    for leaf in span.block.leaves:
        if any(inside(leaf.path, each.module) for each in (*gone, *more)):
            continue
        # The outermost module around it that contains nothing that stays.
        outer = next(
            call
            for call in apart
            if inside(leaf.path, call.path) and not any(inside(each.module, call.path) for each in gone)
        )
        if outer.args and outer.args[0] is not None:
            more.append(_exit(outer))
        elif outer.kwargs:
            more.append(_exit(outer, 0, next(iter(outer.kwargs))))
    return Bypass(exit, (*bypassed, *more))
