"""What the modules of a removed block give: their input, or zeros, and None for the attention probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cofiprune.structure import Block, BlockExit, Shared


def entry_of(exit: BlockExit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the block's input from the arguments of its exit module."""
    if exit.keyword is not None and exit.keyword in kwargs:
        return kwargs[exit.keyword]
    return args[exit.argument]


def bypass(
    exit: BlockExit,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shared: tuple[Shared, ...] = (),
    maker: nn.Module | None = None,
    *,
    attends: bool = False,
) -> Any:
    """Return the output of a removed block's exit.

    :param shared: tensors that all layers share and this module passes on.
    :param maker: the module itself, which may have to make them.
    :param attends: the block's attention probabilities are None, where a model collects those of all layers.
    """
    if attends and (collected := collected_attentions()) is not None:
        collected.append(None)
    entry = entry_of(exit, args, kwargs)
    value = entry if exit.residual else torch.zeros_like(entry)
    if exit.outputs == 1:
        return (value,) if exit.wrapped else value
    found = {each.output: shared_input(each, args, kwargs, maker) for each in shared}
    return (value, *(found.get(place) for place in range(1, exit.outputs)))


def attends(block: Block, exit: BlockExit) -> bool:
    """Return whether a module is the exit of an attention block, which runs once wherever the attention would."""
    return exit is block.exit and block.gate.endswith(".attention")


def collected_attentions() -> list[Any] | None:
    """The attention probabilities that transformers has collected by hooks in this pass; None where it does not."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:  # an older release, where the layers hand them on
        return None
    collected: Mapping[str, list[Any]] = _active_collector.get() or {}  # type: ignore[no-untyped-call]
    return collected.get("attentions")


def shared_input(
    shared: Shared, args: tuple[Any, ...], kwargs: dict[str, Any], maker: nn.Module | None
) -> Tensor | None:
    """Return a shared tensor from the arguments of a module, or as the module makes it without one."""
    value: Tensor | None = kwargs.get(shared.keyword)
    if len(args) > shared.argument:
        value = args[shared.argument]
    if value is None and shared.method and shared.table and hasattr(maker, shared.table):
        states = args[0] if args else next(iter(kwargs.values()))
        made: Tensor = getattr(maker, shared.method)(states.shape[1], states.shape[1])
        value = made.repeat(states.shape[0], *[1] * (made.dim() - 1)) if shared.repeated else made
    return value
