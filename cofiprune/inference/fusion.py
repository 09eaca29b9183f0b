"""A faster form of compacted models for inference, with the same outputs.

Linear layers that read the same tensor (query, key and value; the two inputs of a gated feed-forward) are siblings: the
first one that is called computes one product for all, and each takes its piece. One run of the model shows which they
are. The parameters stay the modules' own, under their names: for inference they become views of one storage, the weight
of the joint product. With gradients, in a compiled or exported program, and whenever a weight has moved, a module
computes the same as `nn.Linear`. Every product goes to the library that is faster on this machine (`products`).
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofiprune.data.checks import longest_sequence
from cofiprune.data.synthetic import synthetic_inputs
from cofiprune.hooks import reading, watching
from cofiprune.inference.products import onednn_is_faster, product

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 16


def fuse(model: PreTrainedModel, layers: Sequence[str]) -> None:
    """Give a model's linear layers the faster form, in place.

    A model that does not run on synthetic inputs, or with pieces of a joint product, keeps separate products, with a
    warning.

    :param layers: paths of the encoder's layers, inside which siblings are found.
    """
    onednn_is_faster()  # measured here rather than in the first pass
    modules = dict(model.named_modules())
    for module in modules.values():
        if type(module) is nn.Linear and not _hooked(module):
            module.__class__ = FusedLinear
    try:
        groups = _find_siblings(model, layers)
        for paths in groups:
            _join([modules[path] for path in paths])
        if groups:
            _run(model)  # a model may reshape the output of a linear layer in a way that pieces do not allow
    except Exception as error:
        _separate(model)
        warnings.warn(
            f"linear layers of {type(model).__name__} that read the same tensor stay separate: running it on synthetic "
            f"inputs gave {type(error).__name__}: {error}",
            stacklevel=3,
        )


def unfuse(model: nn.Module) -> None:
    """Make every linear layer of a model an ordinary `nn.Linear` again, in place."""
    _separate(model)
    for module in model.modules():
        if type(module) is FusedLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]


def is_linear(module: nn.Module) -> bool:
    """Return whether a module computes exactly what `nn.Linear` does."""
    return type(module) in (nn.Linear, FusedLinear)


class _LikeLinear(type):
    """Makes a class equal to `nn.Linear`, for tables of layer types: torch's quantisation looks there what to do."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is nn.Linear

    def __hash__(cls) -> int:
        return hash(nn.Linear)


class FusedLinear(nn.Linear, metaclass=_LikeLinear):
    """An `nn.Linear` whose product, without gradients, may be one with those of its siblings."""

    siblings: Siblings | None = None

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

    def __getstate__(self) -> dict[str, Any]:
        if self.siblings is not None:
            self.siblings.separate()  # each view would be pickled with all of the storage
        return self.__dict__

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.siblings is not None:
            # Programs that save take weights in one storage for one tied weight, and save only the first.
            self.siblings.separate()
        super()._save_to_state_dict(destination, prefix, keep_vars)


@dataclass(eq=False, repr=False)
class Siblings:
    """Linear layers that read the same tensor, and the storage that their weights are views of.

    Shapes: n inputs, m outputs of all siblings together.
    """

    members: tuple[FusedLinear, ...]
    tied: _Tied | None = None
    pending: _Pending | None = None

    def piece(self, module: FusedLinear, states: Tensor) -> Tensor | None:
        """Return a sibling's output [..., its outputs]; None when it has to compute it itself."""
        if module not in self.members:
            return None  # a replica, with other weights
        place = self.members.index(module)
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
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    return 0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr()


def _tied(members: Sequence[nn.Linear]) -> _Tied | None:
    """Make the weights and biases of some layers views of one storage; None where they cannot be."""
    if any("weight" not in member._parameters for member in members):
        return None  # one is computed from other parameters
    parameters = [value for member in members for value in member._parameters.values() if value is not None]
    first = parameters[0]
    kinds = {(type(value), value.dtype, value.device, value.layout) for value in parameters}
    ordinary = type(first) is nn.Parameter and first.layout == torch.strided and first.device.type != "meta"
    if len(kinds) > 1 or not ordinary or any(value.is_inference() for value in parameters):
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


def _ordinary(states: Tensor) -> bool:
    """Return whether a tensor is no subclass, and not traced."""
    return type(states) is Tensor and torch._C._get_tracing_state() is None


def _join(members: Sequence[nn.Module]) -> None:
    siblings = Siblings(tuple(member for member in members if isinstance(member, FusedLinear)))
    if siblings.tie() is not None:
        for member in siblings.members:
            member.siblings = siblings


def _separate(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is FusedLinear:
            siblings = module.__dict__.pop("siblings", None)
            if siblings is not None:
                siblings.separate()


def _find_siblings(model: PreTrainedModel, layers: Sequence[str]) -> list[list[str]]:
    """Paths of linear layers that one pass calls once each with the same tensor, in the order of the calls."""
    calls: list[tuple[str, Tensor, int]] = []

    def note(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            calls.append((path, args[0], _version(args[0])))

    fused = [path for path, module in model.named_modules() if type(module) is FusedLinear]
    with watching(model, before={path: partial(note, path) for path in fused}):
        _run(model)
    times = Counter(path for path, _, _ in calls)
    readers: defaultdict[tuple[str, int, int], list[str]] = defaultdict(list)
    for path, states, version in calls:
        layer = next((each for each in layers if path.startswith(f"{each}.")), None)
        if layer is not None and times[path] == 1:
            # `calls` keeps the tensors alive, so that different ones have different ids.
            readers[layer, id(states), version].append(path)
    return [paths for paths in readers.values() if len(paths) > 1]


def _run(model: PreTrainedModel) -> None:
    """Run a model on synthetic inputs."""
    length = min(longest_sequence(model) or _TOKENS, _TOKENS)
    with reading(model), torch.no_grad():
        model(**synthetic_inputs(model, batch_size=2, seq_len=length))


def _hooked(module: nn.Module) -> bool:
    """Return whether a module has hooks, or a forward of its own."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" in module.__dict__ or any(hooks)
