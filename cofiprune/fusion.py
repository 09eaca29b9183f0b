"""Linear maps of a compacted model in their fastest exact form for inference.

Maps that read the same tensor (query, key and value; the two readers of a gated feed-forward) are computed in one
product: the first that is called computes it for all, the others take their pieces. Which ones these are is seen by
running the model once, not known by family. The parameters stay the modules' own, under their names: they become
views of one storage, which is the weight of the joint product. Every product goes to the library that is faster
on this machine (`cofiprune.products`).

With gradients, in a compiled or exported program, and whenever a weight is not where it was put, a module computes
what `nn.Linear` does.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofiprune.adapter import structure as structure_of
from cofiprune.data_checks import longest_sequence
from cofiprune.products import onednn_is_faster, product
from cofiprune.synthetic import synthetic_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 16


class FusedLinear(nn.Linear):
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
            self.siblings.untie()  # what the weights were views of is not kept beside what they become
        return super()._apply(fn, recurse)


class Siblings:
    """Maps that read the same tensor, and the storage that their weights are views of.

    Shapes: n inputs, m outputs of all siblings together.
    """

    def __init__(self, members: Sequence[FusedLinear]) -> None:
        self.members = tuple(members)
        self.tied: _Tied | None = None
        self.pending: _Pending | None = None

    def piece(self, module: FusedLinear, states: Tensor) -> Tensor | None:
        """Return a sibling's output [..., its outputs]; None when it has to compute it by itself."""
        place = next((index for index, member in enumerate(self.members) if member is module), None)
        if place is None:
            return None  # a replica, whose weights are others
        pending = self.pending
        if pending is not None and pending.of(states):
            found = pending.pieces.pop(place, None)
            if not pending.pieces:
                self.pending = None
            if found is not None:
                return found if self.tied is not None and self.tied.holds(place, module) else None
        tied = self._tie()
        if tied is None:
            return None
        pieces = product(states, tied.weight, tied.bias).split(tied.sizes, -1)
        left = {index: piece for index, piece in enumerate(pieces) if index != place}
        self.pending = _Pending(states, left, self._forget)
        return pieces[place]

    def untie(self) -> None:
        """Let go of the storage; the weights that are views of it keep it as long as they are."""
        self.tied = self.pending = None

    def _forget(self, states: Any) -> None:
        if self.pending is not None and self.pending.states is states:
            self.pending = None

    def _tie(self) -> _Tied | None:
        """The joint weight, which the members' are views of; made anew when one has been moved or replaced."""
        if self.tied is not None and all(self.tied.holds(*each) for each in enumerate(self.members)):
            return self.tied
        new = _tied(self.members)
        if new is not None:
            self.tied = new
        return new

    def __getstate__(self) -> dict[str, Any]:
        # Copies have weights of their own, which are tied when they are first used.
        return {"members": self.members, "tied": None, "pending": None}


class _Pending:
    """Pieces that siblings have not taken yet, by their place.

    The input is held weakly: when a pass ends early, with an error, it goes, and the pieces with it.
    """

    def __init__(self, states: Tensor, pieces: dict[int, Tensor], forget: Callable[[Any], None]) -> None:
        self.states = weakref.ref(states, forget)
        self.version = _version(states)
        self.pieces = pieces

    def of(self, states: Tensor) -> bool:
        """Whether they were computed from this very tensor, unchanged."""
        return self.states() is states and self.version == _version(states)


def _version(states: Tensor) -> int:
    return 0 if states.is_inference() else states._version  # tensors of inference mode do not count changes


class _Tied:
    """The storage of some maps' weights [m, n] and biases [m], and where in it each one's are."""

    def __init__(self, weight: Tensor, bias: Tensor | None, members: Sequence[nn.Linear]) -> None:
        self.weight = weight
        self.bias = bias
        self.sizes = [member.weight.shape[0] for member in members]
        # Addresses tell whether a weight is still the view: the storage is held here, so that nothing else takes them.
        self.places = [_addresses(member) for member in members]

    def holds(self, place: int, member: nn.Linear) -> bool:
        """Whether a map's weight and bias are those that the joint product is computed with."""
        return _addresses(member) == self.places[place]


def _addresses(module: nn.Linear) -> tuple[int, int]:
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    if weight is None or weight.device.type == "meta":
        return -1, -1
    return weight.data_ptr(), 0 if bias is None else bias.data_ptr()


def _tied(members: Sequence[nn.Linear]) -> _Tied | None:
    """Make the weights and biases of some maps views of one storage; None where they cannot be."""
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
        for index, (member, rows) in enumerate(zip(members, joint.split(sizes), strict=True)):
            member.weight.data = rows
            if member.bias is not None and bias is not None:
                member.bias.data = bias.split(sizes)[index]
    return _Tied(joint, bias, members)


def fuse(model: PreTrainedModel) -> None:
    """Give a model's linear maps the faster form, in place.

    Siblings are looked for inside each layer of the encoder. A model for which no inputs can be made up, or that
    cannot be run with pieces of a joint product, keeps separate products, with a warning.
    """
    onednn_is_faster()  # measured here rather than in the first pass
    modules = dict(model.named_modules())
    for module in modules.values():
        if type(module) is nn.Linear and not _hooked(module):
            module.__class__ = FusedLinear
    try:
        groups = _find_siblings(model)
        for paths in groups:
            _join([modules[path] for path in paths])
        if groups:
            _run(model)  # a model may reshape what it takes for the output of one map in a way that pieces do not allow
    except Exception as error:
        _separate(model)
        warnings.warn(
            f"linear maps of {type(model).__name__} that read the same tensor stay separate: running it on made-up "
            f"inputs gave {type(error).__name__}: {error}",
            stacklevel=3,
        )


def unfuse(model: nn.Module) -> None:
    """Make every map of a model an ordinary `nn.Linear` again, in place; a model without any stays as it is."""
    _separate(model)
    for module in model.modules():
        if type(module) is FusedLinear:
            module.__class__ = nn.Linear


def _join(members: Sequence[nn.Module]) -> None:
    maps = [member for member in members if isinstance(member, FusedLinear)]
    siblings = Siblings(maps)
    if siblings._tie() is not None:
        for member in maps:
            member.__dict__["siblings"] = siblings


def _separate(model: nn.Module) -> None:
    for module in model.modules():
        siblings = module.__dict__.pop("siblings", None) if type(module) is FusedLinear else None
        if siblings is None or siblings.tied is None:
            continue
        siblings.untie()
        for member in siblings.members:
            for value in member.parameters():
                value.data = value.data.clone()


def _find_siblings(model: PreTrainedModel) -> list[list[str]]:
    """Paths of maps that one pass calls once each with the same tensor, in the order of the calls."""
    calls: list[tuple[str, Tensor, int]] = []
    with ExitStack() as hooks:
        for path, module in model.named_modules():
            if type(module) is FusedLinear:

                def note(module: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
                    if args:
                        calls.append((path, args[0], args[0]._version))

                hooks.callback(module.register_forward_pre_hook(note).remove)
        _run(model)
    times = Counter(path for path, _, _ in calls)
    readers: defaultdict[tuple[str, int, int], list[str]] = defaultdict(list)
    layers = structure_of(model).layers
    for path, states, version in calls:
        layer = next((each for each in layers if path.startswith(f"{each}.")), None)
        if layer is not None and times[path] == 1:
            readers[layer, id(states), version].append(path)  # alive until here, so that ids are of different tensors
    return [paths for paths in readers.values() if len(paths) > 1]


def _run(model: PreTrainedModel) -> None:
    """Run a model on made-up inputs in evaluation mode, and leave its modes and torch's random state as they were."""
    modes = [(module, module.training) for module in model.modules()]
    length = min(longest_sequence(model) or _TOKENS, _TOKENS)
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        model.eval()
        with torch.random.fork_rng(devices), torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            model(**synthetic_inputs(model, batch_size=2, seq_len=length, generator=generator))
    finally:
        for module, mode in modes:
            module.training = mode


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes what `nn.Linear` does, and no more."""
    return type(module) in (nn.Linear, FusedLinear)


def _hooked(module: nn.Module) -> bool:
    """Whether something else has taken a module's forward or parameters in hand."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" in module.__dict__ or any(hooks)


def _ordinary(states: Tensor) -> bool:
    """Whether a tensor is one of numbers: no subclass, nothing traced."""
    return type(states) is Tensor and not torch.jit.is_tracing()
