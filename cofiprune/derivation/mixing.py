"""Which block of a layer lets tokens look at one another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cofiprune.conformance.specimens import Batch, outputs
from cofiprune.conformance.trace import first_tensor
from cofiprune.derivation.trace import near

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def mixes(model: PreTrainedModel, batch: Batch, layer: str, path: str, *, token: int = 0) -> bool:
    """Whether what a module is given for one token changes with another token at the entry of its layer.

    :param token: the one that is changed, of the first example. For the first one the others are looked at that
        follow, for any other those that come before it.
    """
    plain, changed = (_given(model, batch, layer, path, token, shift) for shift in (0.0, 1.0))
    if plain is None or changed is None:
        return False
    plain, changed = (value.reshape(value.shape[0], -1, value.shape[-1])[0] for value in (plain, changed))
    others = slice(1, None) if token == 0 else slice(None, token)
    return not near(plain[others], changed[others])


def _given(model: PreTrainedModel, batch: Batch, layer: str, path: str, token: int, shift: float) -> Tensor | None:
    """What a module is given when a token of the first example is shifted at the entry of a layer."""
    seen: list[Tensor | None] = []

    def move(module: nn.Module, args: Any, kwargs: Any) -> Any:
        moved = [value.clone() if isinstance(value, Tensor) else value for value in args]
        named = {name: value.clone() if isinstance(value, Tensor) else value for name, value in kwargs.items()}
        states = first_tensor([*moved, *named.values()])
        if states is not None:
            # Not the same for every dimension, which a norm would take away again.
            states[0, token] += shift * torch.linspace(-1, 1, states.shape[-1], dtype=states.dtype)
        return tuple(moved), named

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(first_tensor([*args, *kwargs.values()]))

    hooks = (
        model.get_submodule(layer).register_forward_pre_hook(move, with_kwargs=True),
        model.get_submodule(path).register_forward_pre_hook(keep, with_kwargs=True),
    )
    try:
        outputs(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return seen[0] if seen else None
