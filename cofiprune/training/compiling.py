"""`torch.compile` for the models that are trained: whether it works here, and what it is applied to.

Gates and masks are read by the compiled forward pass as tensors from outside, so that a new sample of the gates in
every step compiles nothing anew. A new length of sequence does so once, and then holds for all lengths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cofiprune.errors import SettingsError, suggest

if TYPE_CHECKING:
    from cofiprune.training.config import PruneConfig


def check_compile(config: PruneConfig, device: torch.device) -> None:
    """Compile something small, where the settings ask for compiled training steps.

    :raises SettingsError: when the backend is unknown, or cannot work on this machine.
    """
    if not config.torch_compile:
        if config.torch_compile_backend != "inductor":
            raise SettingsError("torch_compile_backend says what compiles, and needs torch_compile=True")
        return
    known = torch.compiler.list_backends(exclude_tags=())
    if config.torch_compile_backend not in known:
        near = suggest(config.torch_compile_backend, known)
        raise SettingsError(
            f"unknown torch_compile_backend {config.torch_compile_backend!r}.{near} Choose among {', '.join(known)}"
        )
    try:
        torch.compile(_smallest, backend=config.torch_compile_backend)(torch.ones(2, device=device, requires_grad=True))
    except Exception as error:
        needed = "Triton" if device.type == "cuda" else "a C++ compiler such as g++"
        reason = " ".join(str(error).split("\n")[:2]).strip()
        raise SettingsError(
            f"torch_compile=True does not work here ({reason}); its default backend needs {needed}"
        ) from error


def compiled(model: nn.Module, config: PruneConfig) -> nn.Module:
    """Return a model whose forward pass is compiled when it is first run; the same parameters and names."""
    if not config.torch_compile:
        return model
    wrapped: nn.Module = torch.compile(model, backend=config.torch_compile_backend)  # type: ignore[assignment]
    return wrapped


def _smallest(values: Tensor) -> Tensor:
    return (values * 2).sin().sum()
