"""Watching or changing modules during a `with` block: forward hooks, replaced forwards, train and eval mode."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
"""(module, args, kwargs) -> None, or the (args, kwargs) to use instead."""
After = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
"""(module, args, kwargs, output) -> None, or the output to use instead."""
_NONE: Mapping[str, Any] = MappingProxyType({})


@contextmanager
def watching(
    model: nn.Module, *, before: Mapping[str, Before] = _NONE, after: Mapping[str, After] = _NONE
) -> Iterator[None]:
    """Call functions before and after the forward passes of some modules.

    :param before: by module path; "" is the model itself.
    :param after: likewise.
    """
    with ExitStack() as handles:
        for path, function in before.items():
            handle = model.get_submodule(path).register_forward_pre_hook(function, with_kwargs=True)
            handles.callback(handle.remove)
        for path, follow in after.items():
            handle = model.get_submodule(path).register_forward_hook(follow, with_kwargs=True)
            handles.callback(handle.remove)
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Run a function in place of a module's forward, even if one is set on the instance already."""
    previous = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if previous is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = previous


class StopForward(Exception):  # noqa: N818  # control flow, not an error
    """Raised by a hook that has seen enough of a forward pass; catch it with `contextlib.suppress(StopForward)`."""


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode, and each of their modules back into its own mode afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def same_random_state() -> Iterator[None]:
    """Put the global random generators of Python, numpy and torch back to where they were, on GPUs too."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if _gpus_are_used() else None
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        if on_gpus is not None:
            torch.cuda.set_rng_state_all(on_gpus)
        elif _gpus_are_used():
            torch.cuda.manual_seed_all(torch.initial_seed())  # as they would have been set up


def _gpus_are_used() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


@contextmanager
def reading(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode; their modes and the random state come back afterwards.

    Some models draw random numbers in eval mode too, for layers that training may leave out.
    """
    with evaluating(*models), same_random_state():
        yield


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Stop all parameters of some modules from learning inside the block."""
    learning = [value for module in modules for value in module.parameters() if value.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
