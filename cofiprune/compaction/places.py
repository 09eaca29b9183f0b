"""Attention that takes the width of its heads from its input, where the two are no longer the same.

Such a module cuts its projections by the length of the states that it was given (`reshape(batch, tokens, embed_dim)`).
In a compacted model it is given the places of the vectors instead, as wide as its heads are: what it does to states in
front of its projections (windows, gathering, padding by zeros) it does to these, and each projection looks the vectors
up. Nothing of the module's own code changes. The code here goes word for word into the file by which a folder loads
without this package, as that of `removal` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from cofiprune.bypass import entry_of


class Places:
    """Hooks of such a module and of its readers."""

    ATTRIBUTE = "_cofiprune_places"
    BASE = 256
    """A place is written in three digits: every floating-point type has the whole numbers up to 256."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.entry: Any = SimpleNamespace(argument=row["argument"], keyword=row["keyword"])
        self.width = row["width"]
        self.vectors: Tensor | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep the vectors [N, H], after one of zeros, and hand on their places [..., width]."""
        states: Tensor = entry_of(self.entry, args, kwargs)
        if states.shape[-1] == self.width:
            return args, kwargs
        rows = states.reshape(-1, states.shape[-1])
        self.vectors = torch.cat([rows.new_zeros(1, rows.shape[1]), rows])
        count = torch.arange(1, rows.shape[0] + 1, device=rows.device)  # len() would be a constant of exported graphs
        base = self.BASE
        digits = torch.stack([count // base**2, count // base % base, count % base], dim=-1)
        places = nn.functional.pad(digits, (0, self.width - 3)).to(states.dtype).view(*states.shape[:-1], self.width)
        if self.entry.keyword in kwargs:
            return args, {**kwargs, self.entry.keyword: places}
        at = self.entry.argument
        return (*args[:at], places, *args[at + 1 :]), kwargs

    def read(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Give a projection the vectors at the places that it was given."""
        if self.vectors is None:
            return args
        second = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)  # where a convolution has its channels
        digits = (args[0].movedim(1, -1) if second else args[0])[..., :3].long()
        found = self.vectors[(digits[..., 0] * self.BASE + digits[..., 1]) * self.BASE + digits[..., 2]]
        return (found.movedim(-1, 1) if second else found, *args[1:])

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forget the vectors."""
        self.vectors = None


def narrow_to(model: nn.Module, path: str, row: Mapping[str, Any]) -> None:
    """Let a module have heads of another width in all than its input.

    :param row: the width, the matrices in it that read its input, and the place of that among its arguments.
    """
    module = model.get_submodule(path)
    known: Places | None = module.__dict__.get(Places.ATTRIBUTE)
    if known is not None:
        known.width = row["width"]
        return
    places = Places(row)
    module.__dict__[Places.ATTRIBUTE] = places
    module.register_forward_pre_hook(places.enter, with_kwargs=True)
    module.register_forward_hook(places.leave)
    for reader in row["readers"]:
        module.get_submodule(reader).register_forward_pre_hook(places.read)
