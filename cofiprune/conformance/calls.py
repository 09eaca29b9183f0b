"""The calls of a model's modules in one run: what each is given and returns, and in which module a run fails."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cofiprune.conformance.specimens import Batch, outputs
from cofiprune.hooks import watching
from cofiprune.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(eq=False)
class Call:
    """One call of a module. Its tensors are copies, because some models change them in place later."""

    path: str
    module: nn.Module
    args: tuple[Tensor | None, ...]
    kwargs: Mapping[str, Tensor]
    start: int
    """Place in the order in which modules are entered and left."""
    end: int = -1
    """The same, of when it returns; -1 until then."""
    output: Tensor | None = None
    """The first tensor that it returns."""
    more: tuple[Tensor, ...] = ()
    """The other tensors that it returns, if it returns several."""
    outputs: int = 1
    """1 for a tensor, n for a tuple of n."""
    wrapped: bool = False
    """True if it returns a tuple of one."""

    @property
    def entry(self) -> Tensor | None:
        """The first tensor that it is given."""
        return next((value for value in (*self.args, *self.kwargs.values()) if value is not None), None)

    @property
    def carried(self) -> tuple[int, ...]:
        """Positions of the arguments behind the first that are further streams of states: they come out as they are."""
        found: list[int] = []
        for value in self.more:
            places = range(found[-1] + 1 if found else 1, len(self.args))
            place = next((at for at in places if getattr(self.args[at], "shape", None) == value.shape), None)
            if place is None or value.dim() != 3 or value.shape[-1] != self.writes:
                break
            found.append(place)
        return tuple(found)

    @property
    def states(self) -> tuple[Tensor | None, Tensor | None]:
        """What it is given and what it returns, all streams of states after one another."""
        if not self.carried or self.entry is None or self.output is None:
            return self.entry, self.output
        given = [value for place in self.carried if (value := self.args[place]) is not None]
        returned = self.more[: len(self.carried)]
        return torch.cat([self.entry, *given], dim=1), torch.cat([self.output, *returned], dim=1)

    @property
    def reads(self) -> int:
        """Length of the last dimension that it is given; 0 without a tensor."""
        return 0 if self.entry is None else self.entry.shape[-1]

    @property
    def writes(self) -> int:
        """Length of the last dimension that it returns; 0 without a tensor."""
        return 0 if self.output is None else self.output.shape[-1]


@dataclass(frozen=True)
class Crash:
    """The innermost module in which a model failed, and its error."""

    module: str
    error: str

    def __str__(self) -> str:
        return f"{self.module or 'the model itself'!r} ({self.error})"


def calls_of(model: PreTrainedModel, batch: Batch, paths: Iterable[str] | None = None) -> list[Call]:
    """Run a model and return the calls of some modules, in the order in which they are entered.

    :param paths: of the modules; None for all.
    """
    with _noting(model, paths) as calls:
        outputs(model, batch)
    return calls


def crash_site(model: PreTrainedModel, batch: Batch) -> Crash | None:
    """Run a model and return where it fails; None when it does not."""
    with _noting(model) as calls:
        try:
            outputs(model, batch)
        except Exception as error:
            entered = [call.path for call in calls if call.end < 0]
            return Crash(entered[-1] if entered else "", f"{type(error).__name__}: {error}".splitlines()[0])
    return None


def record(model: PreTrainedModel, batch: Batch) -> dict[tuple[str, int], Tensor]:
    """Return what each module returns, by its path and the number of its calls before; the innermost come first."""
    seen: dict[str, int] = {}
    found = {}
    for call in sorted(calls_of(model, batch), key=lambda call: call.end):
        if call.path and call.output is not None and call.output.is_floating_point():
            seen[call.path] = seen.get(call.path, -1) + 1
            found[call.path, seen[call.path]] = call.output
    return found


@contextmanager
def _noting(model: nn.Module, paths: Iterable[str] | None = None) -> Iterator[list[Call]]:
    calls: list[Call] = []
    entered: list[Call] = []
    clock = itertools.count()

    def enter(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            named = {name: value.detach().clone() for name, value in kwargs.items() if isinstance(value, Tensor)}
            placed = tuple(value.detach().clone() if isinstance(value, Tensor) else None for value in args)
            entered.append(Call(path, module, placed, named, next(clock)))
            calls.append(entered[-1])

        return note

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = entered.pop()
        call.end = next(clock)
        first = first_tensor(list(output.values()) if isinstance(output, Mapping) else output)
        call.output = None if first is None else first.detach().clone()
        if isinstance(output, tuple) and output[0] is first:
            tensors = itertools.takewhile(lambda each: isinstance(each, Tensor), output[1:])
            call.more = tuple(each.detach().clone() for each in tensors)
        call.outputs = len(output) if isinstance(output, tuple) else 1
        call.wrapped = isinstance(output, tuple) and len(output) == 1

    chosen = [path for path, _ in model.named_modules()] if paths is None else list(paths)
    with watching(model, before={path: enter(path) for path in chosen}, after=dict.fromkeys(chosen, leave)):
        yield calls


@contextmanager
def holding(parameter: nn.Parameter, value: Tensor) -> Iterator[None]:
    """Give a parameter other numbers for the length of a `with` block."""
    before = parameter.detach().clone()
    parameter.data.copy_(value)
    try:
        yield
    finally:
        parameter.data.copy_(before)


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor of a module's arguments or output; None when it has none."""
    if isinstance(value, tuple | list):
        return next((found for found in map(first_tensor, value) if found is not None), None)
    return value if isinstance(value, Tensor) else None


def gap(left: Tensor, right: Tensor) -> float:
    """Return the largest difference of two tensors; infinite when shapes differ or something is not a number."""
    if left.shape != right.shape:
        return float("inf")
    found = (left - right).abs()
    return float("inf") if bool(found.isnan().any()) else float(found.max())


def largest(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Return the largest difference of two models' outputs."""
    return max(gap(value, right[name]) for name, value in left.items())


def size(found: Mapping[str, Tensor]) -> float:
    """Return the largest number among some outputs, at least 1."""
    return max(1.0, *(float(value.abs().max()) for value in found.values()))


def compared(full: Mapping[str, Tensor], small: Mapping[str, Tensor], plan: Plan) -> float:
    """Return the largest difference between the outputs of a masked and of a compacted model.

    Where the encoder's states come out, the removed hidden dimensions have no counterpart: the masked model must have
    zeros there.
    """
    kept = list(plan.keep.get("hidden", ()))
    narrowed = (plan.sizes.get("hidden"), len(kept))
    difference = 0.0
    for name, value in full.items():
        # The last dimension of the states, the second of an image's feature maps.
        pairs = zip(value.shape, small[name].shape, strict=False)
        dim = next((dim for dim, pair in enumerate(pairs) if pair == narrowed and pair[0] != pair[1]), None)
        if kept and dim is not None:
            wide = value.movedim(dim, -1)
            removed = sorted(set(range(wide.shape[-1])) - set(kept))
            difference = max(difference, float(wide[..., removed].abs().max()))
            value = wide[..., kept].movedim(-1, dim)
        difference = max(difference, gap(value, small[name]))
    return difference


def same(left: Tensor | None, right: Tensor | None) -> bool:
    """Tell whether two tensors hold the same vectors: in the same order, or in another one, as windows of an image do.

    In a model of random weights that is so only where one was handed on. Vectors of zeros are padding.
    """
    if left is None or right is None or left.dtype != right.dtype:
        return False
    if left.numel() == right.numel() and torch.equal(left.reshape(-1), right.reshape(-1)):
        return True
    if left.shape[-1:] != right.shape[-1:] or min(left.dim(), right.dim()) < 2:
        return False
    found, other = (rows[rows.any(dim=-1)] for rows in (each.reshape(-1, each.shape[-1]) for each in (left, right)))
    return len(found) > 0 and torch.equal(torch.unique(found, dim=0), torch.unique(other, dim=0))


def holds(whole: Tensor, part: Tensor | None) -> bool:
    """Tell whether all vectors of a tensor are among those of another one."""
    if part is None or part.dtype != whole.dtype or part.shape[-1:] != whole.shape[-1:] or part.dim() < 2:
        return False
    rows = whole.reshape(-1, whole.shape[-1])
    some = part.reshape(-1, part.shape[-1])
    some = some[some.any(dim=-1)]
    both = torch.cat([rows, some])
    return len(some) > 0 and len(torch.unique(both, dim=0)) == len(torch.unique(rows, dim=0))


def near(left: Tensor | None, right: Tensor | None) -> bool:
    """Tell whether two tensors agree as far as a model that rounds to float32 inside can tell."""
    if left is None or right is None or left.shape != right.shape:
        return False
    return bool(torch.allclose(left.double(), right.double(), rtol=1e-5, atol=1e-5))


def inside(path: str, root: str) -> bool:
    """Tell whether a module is another one or in it."""
    return not root or path == root or path.startswith(f"{root}.")
