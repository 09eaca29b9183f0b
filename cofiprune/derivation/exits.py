"""Where a block leaves its layer, found by trying: without the block, the residual stream must come out unchanged.

There are three ways. A module returns the stream itself and is given it (post-norm in a module of its own). A module's
output is added to the stream outside of it, so that it has to return zeros (pre-norm). Or that holds, and a norm stands
behind the addition: the stream leaves through the norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cofiprune.conformance.specimens import Batch, outputs
from cofiprune.conformance.trace import first_tensor, inside
from cofiprune.derivation.blocks import Draft
from cofiprune.derivation.trace import Call, Overrides, near, same
from cofiprune.masking import bypass
from cofiprune.structure import BlockExit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Way:
    """Where a block leaves, and what does not run without it; paths from the model."""

    exit: BlockExit
    bypassed: tuple[BlockExit, ...]
    held: tuple[str, ...] = ()
    """Parameters that the layer itself holds for the block, by their names in the layer."""

    @property
    def overrides(self) -> Overrides:
        def stand_in(exit: BlockExit) -> Any:
            return lambda *args, **kwargs: bypass(exit, args, kwargs)

        return Overrides({each.module: stand_in(each) for each in (self.exit, *self.bypassed)})


@dataclass(frozen=True)
class Lookout:
    """A place where the residual stream behind a block can be seen."""

    path: str
    given: bool
    """What the module is given, rather than what it returns."""

    def see(self, model: PreTrainedModel, batch: Batch, way: Way | None) -> Tensor | None:
        """The stream there when a block has left, in the way given; None when the model does not run like that."""
        seen: list[Tensor | None] = []
        module = model.get_submodule(self.path)

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append(first_tensor([*args, *kwargs.values()]))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(first_tensor(output))

        if self.given:
            hook = module.register_forward_pre_hook(before, with_kwargs=True)
        else:
            hook = module.register_forward_hook(after)
        try:
            with (Overrides() if way is None else way.overrides).installed(model):
                outputs(model, batch)
        except Exception:  # of whatever kind: such a way is none
            return None
        finally:
            hook.remove()
        return seen[0] if seen else None


@dataclass(frozen=True)
class Span:
    """A block in its layer: the residual stream in front of it and behind it."""

    block: Draft
    other: Draft
    entry: Tensor
    after: Tensor
    lookout: Lookout


def find_ways(
    model: PreTrainedModel, batch: Batch, calls: Sequence[Call], layer: str, blocks: Sequence[Draft]
) -> tuple[Way, Way] | None:
    """How each of two blocks leaves its layer; None when no way is found for one of them.

    The stream between them is what the norm between them returns (post-norm) or reads (pre-norm). Post-norm comes
    first, because one of its norms, taken as standing in front of what follows, could be taken out too.
    """
    first, second = blocks
    whole = next(call for call in calls if call.path == layer)
    boundary = second.norms[0]
    assert whole.output is not None
    assert boundary.entry is not None
    assert boundary.output is not None
    post = (boundary.output, Lookout(second.readers[0].path, given=True), False)
    pre = (boundary.entry, Lookout(boundary.path, given=True), True)
    for between, lookout, in_front in (post, pre):
        left, right = _with_boundary(first, second, boundary, in_front=in_front)
        found = []
        for span in (
            Span(left, right, first.entries[0], between, lookout),
            Span(right, left, between, whole.output, Lookout(layer, given=False)),
        ):
            way = next((each for each in _ways(calls, layer, span) if _works(model, batch, span, each)), None)
            if way is None:
                break
            held = [
                name
                for name, value in model.get_submodule(layer).named_parameters(recurse=False)
                if _silences(model, batch, span, value)
            ]
            found.append(replace(way, held=tuple(held)))
        if len(found) == 2:
            first.norms, second.norms = left.norms, right.norms
            return found[0], found[1]
    return None


def _with_boundary(first: Draft, second: Draft, norm: Call, *, in_front: bool) -> tuple[Draft, Draft]:
    """The two blocks, the norm between them belonging to the second or to the first one."""
    others = [call for call in second.norms if call is not norm]
    if in_front:
        return first, replace(second, norms=[norm, *others])
    return replace(first, norms=[*first.norms, norm]), replace(second, norms=others)


def _silences(model: PreTrainedModel, batch: Batch, span: Span, value: nn.Parameter) -> bool:
    """Whether nothing is left of a block when one parameter is zero: a scale of all that it writes."""
    kept = value.detach().clone()
    with torch.no_grad():
        value.zero_()
        try:
            return near(span.lookout.see(model, batch, None), span.entry)
        finally:
            value.copy_(kept)


def _works(model: PreTrainedModel, batch: Batch, span: Span, way: Way) -> bool:
    return near(span.lookout.see(model, batch, way), span.entry)


def _ways(calls: Sequence[Call], layer: str, span: Span) -> Iterator[Way]:
    """Candidates, those that leave most modules out first."""
    under = [call for call in calls if inside(call.path, layer) and call.path != layer]
    apart = [call for call in under if not any(inside(leaf.path, call.path) for leaf in span.other.leaves)]
    apart.sort(key=lambda call: call.path.count("."))
    for call in apart:
        place = call.place(span.entry)
        if place is not None and same(call.output, span.after):
            yield from _complete(calls, span, apart, place)
    last = span.block.writer
    silent = [call for call in apart if inside(last.path, call.path) or call.start > last.end]
    zeros = [exit for call in silent for exit in _zero(call, span)]
    norms = [call for call in span.block.norms if same(call.output, span.after)]
    for norm in norms:
        for exit in zeros:
            if not inside(norm.path, exit.module):
                yield from _complete(calls, span, apart, BlockExit(norm.path), exit)
    for exit in () if norms else zeros:
        yield from _complete(calls, span, apart, exit)


def _zero(call: Call, span: Span) -> Iterator[BlockExit]:
    """The module as one that returns zeros."""
    if call.output is None or call.output.shape != span.entry.shape:
        return
    for value in (*span.block.entries, *call.args, *call.kwargs.values()):
        if value is not None and value.shape == call.output.shape:
            place = call.place(value)
            if place is not None:
                yield replace(place, residual=False)
                return
    if call.args and call.args[0] is not None:
        # What is bypassed in front of it hands the states on, so that it is given them then.
        yield BlockExit(call.path, outputs=call.outputs, wrapped=call.wrapped, residual=False)


def _complete(
    calls: Sequence[Call], span: Span, apart: Sequence[Call], exit: BlockExit, *bypassed: BlockExit
) -> Iterator[Way]:
    """Add what else of the block is not to run: modules that would fail on parameters which are gone."""
    gone = [exit, *bypassed]
    more: list[BlockExit] = []
    left = [leaf for leaf in span.block.leaves if not any(inside(leaf.path, each.module) for each in gone)]
    for leaf in left:
        if any(inside(leaf.path, each.module) for each in more):
            continue
        # The outermost module around it that holds nothing of what is to stay.
        outer = next(
            call
            for call in apart
            if inside(leaf.path, call.path) and not any(inside(each.module, call.path) for each in gone)
        )
        first = next((index for index, value in enumerate(outer.args) if value is not None), None)
        if first == 0:
            more.append(BlockExit(outer.path, outputs=outer.outputs, wrapped=outer.wrapped))
        elif outer.kwargs:
            more.append(BlockExit(outer.path, 0, next(iter(outer.kwargs)), outer.outputs, wrapped=outer.wrapped))
    yield Way(exit, (*bypassed, *more))
