"""Watching a model run: what every module returns, and in which module it fails."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cofiprune.conformance.specimens import Batch, outputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Call = tuple[str, int]
"""A module's path and how often it was called before."""


@dataclass(frozen=True)
class Crash:
    """The innermost module in which a model failed, and its error."""

    module: str
    error: str

    def __str__(self) -> str:
        return f"{self.module or 'the model itself'!r} ({self.error})"


def crash_site(model: PreTrainedModel, batch: Batch) -> Crash | None:
    """Run a model and return where it fails; None when it does not."""
    stack: list[str] = []

    def enter(path: str) -> Callable[..., None]:
        return lambda *_: stack.append(path)

    def leave(*_: Any) -> None:
        stack.pop()

    with ExitStack() as hooks:
        for path, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(enter(path)).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        try:
            outputs(model, batch)
        except Exception as error:  # of whatever kind: it comes from inside the model
            return Crash(stack[-1] if stack else "", f"{type(error).__name__}: {error}".splitlines()[0])
    return None


def record(model: PreTrainedModel, batch: Batch) -> dict[Call, Tensor]:
    """Return the outputs of every call of a module, in the order in which they finish: the innermost come first."""
    found: dict[Call, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = first_tensor(output)
            if value is not None and value.is_floating_point():
                # A copy, because some models go on to change it in place.
                found[path, sum(name == path for name, _ in found)] = value.detach().clone()

        return hook

    with ExitStack() as hooks:
        for path, module in model.named_modules():
            hooks.callback(module.register_forward_hook(keep(path)).remove)
        outputs(model, batch)
    return found


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor of a module's arguments or output; None when it has none."""
    if isinstance(value, tuple | list):
        return next((found for found in map(first_tensor, value) if found is not None), None)
    return value if isinstance(value, Tensor) else None


def gap(left: Tensor, right: Tensor) -> float:
    """Return the largest difference of two tensors of one shape; infinite when one is not a number."""
    found = (left - right).abs()
    return float("inf") if bool(found.isnan().any()) else float(found.max())


def inside(path: str, root: str) -> bool:
    """Whether a module is another one or in it."""
    return not root or path == root or path.startswith(f"{root}.")
