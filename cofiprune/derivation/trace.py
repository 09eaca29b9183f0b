"""What every module of a model is given and returns in one run.

Tensors are told apart by their values: in a model of random weights two of them agree only where one was handed on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cofiprune.conformance.specimens import Batch, outputs
from cofiprune.conformance.trace import first_tensor, inside
from cofiprune.structure import BlockExit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(eq=False)
class Call:
    """One call of a module."""

    path: str
    module: nn.Module
    args: tuple[Tensor | None, ...]
    kwargs: Mapping[str, Tensor]
    start: int
    """Place in the order in which modules are entered."""
    end: int = -1
    """Place in the order in which they are left."""
    output: Tensor | None = None
    """The first tensor that it returns."""
    outputs: int = 1
    """1 for a tensor, n for a tuple of n."""
    wrapped: bool = False
    """Whether it returns a tuple of one."""

    @property
    def entry(self) -> Tensor | None:
        """The first tensor that it is given."""
        found = [*self.args, *self.kwargs.values()]
        return next((value for value in found if value is not None), None)

    def place(self, value: Tensor) -> BlockExit | None:
        """Where a tensor is among the arguments, as a `BlockExit` of this module; None when it is not there."""
        names = [name for name in inspect.signature(self.module.forward).parameters if name != "self"]
        for index, given in enumerate(self.args):
            if given is not None and same(given, value):
                named = names[index] if index < len(names) and names[index] not in ("args", "kwargs", "input") else None
                return BlockExit(self.path, index, named, self.outputs, wrapped=self.wrapped)
        for name, given in self.kwargs.items():
            if same(given, value):
                index = names.index(name) if name in names else 0
                return BlockExit(self.path, index, name, self.outputs, wrapped=self.wrapped)
        return None


def same(left: Tensor | None, right: Tensor | None) -> bool:
    """Whether two tensors hold the same numbers in the same order, or with the first two dimensions exchanged."""
    if left is None or right is None or left.numel() != right.numel() or left.dtype != right.dtype:
        return False
    if torch.equal(left.reshape(-1), right.reshape(-1)):
        return True
    exchanged = left.dim() == right.dim() == 3 and left.shape[:2] == right.shape[:2][::-1]
    return exchanged and bool(torch.equal(left.transpose(0, 1), right))


def near(left: Tensor | None, right: Tensor | None) -> bool:
    """Whether two tensors agree as far as a model that rounds to float32 inside can tell."""
    if left is None or right is None or left.shape != right.shape:
        return False
    return bool(torch.allclose(left.double(), right.double(), rtol=1e-5, atol=1e-5))


def watch(model: PreTrainedModel, batch: Batch, root: str = "") -> list[Call]:
    """Run a model and return the calls of the modules at and under a path, in the order in which they are entered."""
    calls: list[Call] = []
    stack: list[Call] = []
    clock = iter(range(1 << 60))

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            named = {name: _copy(value) for name, value in kwargs.items() if isinstance(value, Tensor)}
            placed = tuple(_copy(value) if isinstance(value, Tensor) else None for value in args)
            call = Call(path, module, placed, {k: v for k, v in named.items() if v is not None}, next(clock))
            calls.append(call)
            stack.append(call)

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        call = stack.pop()
        call.end = next(clock)
        call.output = _copy(first_tensor(list(output.values()) if isinstance(output, Mapping) else output))
        call.outputs = len(output) if isinstance(output, tuple) else 1
        call.wrapped = isinstance(output, tuple) and len(output) == 1

    with ExitStack() as hooks:
        for path, module in model.named_modules():
            if inside(path, root):
                hooks.callback(module.register_forward_pre_hook(enter(path), with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
        outputs(model, batch)
    return calls


def _copy(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().clone()


@dataclass
class Overrides:
    """Forwards that stand in for those of some modules."""

    forwards: dict[str, Callable[..., Any]] = field(default_factory=dict)

    @contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        """Run the model with them for the length of a `with` block."""
        modules = [model.get_submodule(path) for path in self.forwards]
        try:
            for module, forward in zip(modules, self.forwards.values(), strict=True):
                module.__dict__["forward"] = forward
            yield
        finally:
            for module in modules:
                module.__dict__.pop("forward", None)
