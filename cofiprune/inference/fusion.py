"""A faster form of compacted models for inference, with the same outputs.

Linear layers that read the same tensor (query, key and value; the two inputs of a gated feed-forward) are computed in
one product (`siblings`). One run of the model shows which they are. Every product goes to the library that is faster on
this machine (`products`).
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cofiprune.data.checks import longest_sequence
from cofiprune.data.synthetic import synthetic_inputs
from cofiprune.hooks import reading, watching
from cofiprune.inference.products import onednn_is_faster
from cofiprune.inference.siblings import FusedLinear, Siblings

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


def _join(members: Sequence[nn.Module]) -> None:
    linears = [member for member in members if isinstance(member, FusedLinear)]
    siblings = Siblings(linears)
    if siblings.tie() is not None:
        for place, member in enumerate(linears):
            member.__dict__.update(siblings=siblings, place=place)


def _separate(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is FusedLinear:
            module.__dict__.pop("place", None)
            siblings = module.__dict__.pop("siblings", None)
            if siblings is not None:
                siblings.separate()


def _find_siblings(model: PreTrainedModel, layers: Sequence[str]) -> list[list[str]]:
    """Paths of linear layers that one pass calls once each with the same tensor, in the order of the calls."""
    calls: list[tuple[str, Tensor, int]] = []

    def note(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            calls.append((path, args[0], args[0]._version))

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
        generator = torch.Generator().manual_seed(0)
        model(**synthetic_inputs(model, batch_size=2, seq_len=length, generator=generator))


def _hooked(module: nn.Module) -> bool:
    """Return whether a module has hooks, or a forward of its own."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" in module.__dict__ or any(hooks)
