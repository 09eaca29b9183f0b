"""Compacted models in a faster form for inference, with the same answers.

Linear maps that read the same tensor (query, key and value; the two readers of a gated feed-forward) are computed in
one product (`siblings`). Which ones these are is seen by running the model once, not known by family. Every product
goes to the library that is faster on this machine (`products`).
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cofiprune.adapter import structure as structure_of
from cofiprune.data.checks import longest_sequence
from cofiprune.data.synthetic import synthetic_inputs
from cofiprune.hooks import reading
from cofiprune.inference.products import onednn_is_faster
from cofiprune.inference.siblings import FusedLinear, Siblings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 16


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
            module.__class__ = nn.Linear  # type: ignore[assignment]


def _join(members: Sequence[nn.Module]) -> None:
    maps = [member for member in members if isinstance(member, FusedLinear)]
    siblings = Siblings(maps)
    if siblings.tie() is not None:
        for place, member in enumerate(maps):
            member.__dict__.update(siblings=siblings, place=place)


def _separate(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is not FusedLinear:
            continue
        module.__dict__.pop("place", None)
        siblings = module.__dict__.pop("siblings", None)
        if siblings is not None:
            siblings.separate()


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
    """Run a model on synthetic inputs."""
    length = min(longest_sequence(model) or _TOKENS, _TOKENS)
    with reading(model), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        model(**synthetic_inputs(model, batch_size=2, seq_len=length, generator=generator))


def _hooked(module: nn.Module) -> bool:
    """Whether something else has taken a module's forward or parameters in hand."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" in module.__dict__ or any(hooks)
