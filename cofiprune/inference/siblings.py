"""Linear layers that read the same tensor: one product for all, and a piece of it for each.

The first one that is called computes it, the others take their pieces. The parameters stay the modules' own, under
their names: for inference they become views of one storage, the weight of the joint product. With gradients, in a
compiled or exported program, and whenever a weight has moved, a module computes the same as `nn.Linear`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofiprune.inference.products import product


class FusedLinear(nn.Linear):
    """An `nn.Linear` whose product, without gradients, may be one with those of its siblings."""

    siblings: Siblings | None = None
    place: int = 0
    """Among the siblings."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _ordinary(input):
            return F.linear(input, self.weight, self.bias)
        if self.siblings is not None:
            piece = self.siblings.piece(self, input)
            if piece is not None:
                return piece
        return product(input, self.weight, self.bias)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        if self.siblings is not None:
            self.siblings.untie()  # frees the storage when the weights get another one
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.siblings is not None:
            # Programs that save take weights in one storage for one tied weight, and save only the first.
            self.siblings.separate()
        super()._save_to_state_dict(destination, prefix, keep_vars)


class Siblings:
    """Linear layers that read the same tensor, and the storage that their weights are views of.

    Shapes: n inputs, m outputs of all siblings together.
    """

    def __init__(self, members: Sequence[FusedLinear]) -> None:
        self.members = tuple(members)
        self.tied: _Tied | None = None
        self.pending: _Pending | None = None

    def piece(self, module: FusedLinear, states: Tensor) -> Tensor | None:
        """Return a sibling's output [..., its outputs]; None when it has to compute it itself."""
        place = module.place
        if self.members[place] is not module:
            return None  # a replica, with other weights
        pending = self.pending
        if pending is not None and pending.of(states):
            found = pending.pieces.pop(place, None)
            if not pending.pieces:
                self.pending = None
            if found is not None:
                return found if self.tied is not None and self.tied.holds(place, module) else None
        tied = self.tie()
        if tied is None:
            return None
        pieces = torch.split(product(states, tied.weight, tied.bias), tied.sizes, -1)
        left = {index: piece for index, piece in enumerate(pieces) if index != place}
        self.pending = _Pending(states, left, self._forget)
        return pieces[place]

    def untie(self) -> None:
        """Release the storage; weights that are views of it keep it alive."""
        self.tied = self.pending = None

    def separate(self) -> None:
        """Give every weight a storage of its own, until the next pass without gradients."""
        self.untie()
        for value in (value for member in self.members for value in member.parameters()):
            if value.untyped_storage().nbytes() > value.nbytes:
                value.data = value.data.clone()

    def _forget(self, states: Any) -> None:
        if self.pending is not None and self.pending.states is states:
            self.pending = None

    def tie(self) -> _Tied | None:
        """Return the joint weight, of which the members' are views; made anew when one was moved or replaced."""
        if self.tied is not None and [_addresses(member) for member in self.members] == self.tied.places:
            return self.tied
        new = _tied(self.members)
        if new is not None:
            self.tied = new
        return new

    def __getstate__(self) -> dict[str, Any]:
        # Copies have weights of their own, which are tied when they are first used.
        return {"members": self.members, "tied": None, "pending": None}


class _Pending:
    """Pieces of a joint output that siblings have not taken yet, by their place.

    The input is held weakly: when a pass ends early with an error, it is freed, and the pieces with it.
    """

    def __init__(self, states: Tensor, pieces: dict[int, Tensor], forget: Callable[[Any], None]) -> None:
        self.states = weakref.ref(states, forget)
        self.version = _version(states)
        self.pieces = pieces

    def of(self, states: Tensor) -> bool:
        """Return whether they were computed from this very tensor, and it is unchanged."""
        return self.states() is states and self.version == _version(states)


def _version(states: Tensor) -> int:
    return 0 if states.is_inference() else states._version  # tensors of inference mode do not count changes


@dataclass(frozen=True)
class _Tied:
    """The storage of some layers' weights [m, n] and biases [m], and their places in it."""

    weight: Tensor
    bias: Tensor | None
    sizes: list[int]
    places: list[tuple[int, int]]
    """Addresses, which tell whether a weight is still the view: the storage is held here, so that it is not reused."""

    def holds(self, place: int, member: nn.Linear) -> bool:
        """Return whether the joint product is computed with this layer's weight and bias."""
        return _addresses(member) == self.places[place]


def _addresses(module: nn.Linear) -> tuple[int, int]:
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    return 0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr()


def _tied(members: Sequence[nn.Linear]) -> _Tied | None:
    """Make the weights and biases of some layers views of one storage; None where they cannot be."""
    parameters = [value for member in members for value in member._parameters.values() if value is not None]
    first = parameters[0]
    for value in parameters:
        alike = value.dtype == first.dtype and value.device == first.device and value.layout == torch.strided
        if type(value) is not nn.Parameter or not alike or value.device.type == "meta" or value.is_inference():
            return None
    if len({id(value) for value in parameters}) < len(parameters):
        return None
    weights = [member.weight for member in members]
    if len({(value.dim(), value.shape[-1]) for value in weights}) > 1 or first.dim() != 2:
        return None
    with torch.inference_mode(False), torch.no_grad():
        joint = torch.cat([value.detach() for value in weights])
        sizes = [value.shape[0] for value in weights]
        bias = None
        if any(member.bias is not None for member in members):
            parts = [first.new_zeros(len(m.weight)) if m.bias is None else m.bias.detach() for m in members]
            bias = torch.cat(parts)
        for index, (member, rows) in enumerate(zip(members, torch.split(joint, sizes), strict=True)):
            member.weight.data = rows
            if member.bias is not None and bias is not None:
                member.bias.data = torch.split(bias, sizes)[index]
    return _Tied(joint, bias, sizes, [_addresses(member) for member in members])


def is_linear(module: nn.Module) -> bool:
    """Return whether a module computes exactly what `nn.Linear` does."""
    return type(module) in (nn.Linear, FusedLinear)


def _ordinary(states: Tensor) -> bool:
    """Return whether a tensor is no subclass, and not traced."""
    return type(states) is Tensor and torch._C._get_tracing_state() is None
