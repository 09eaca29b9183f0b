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


def states_of(exit: BlockExit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the block's input, all streams of states after one another: [B, T, H]."""
    streams = [entry_of(exit, args, kwargs), *(args[at] for at in exit.carried if args[at] is not None)]
    return torch.cat(streams, dim=1) if len(streams) > 1 else streams[0]


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
    values = [left_of(exit, entry) for entry in (entry_of(exit, args, kwargs), *(args[at] for at in exit.carried))]
    if exit.outputs == 1:
        return (values[0],) if exit.wrapped else values[0]
    found = {each.output: shared_input(each, args, kwargs, maker) for each in shared}
    return (*values, *(found.get(place) for place in range(len(values), exit.outputs)))


def left_of(exit: BlockExit, entry: Tensor | None) -> Tensor | None:
    """Return what a module of a removed block gives for one of the block's inputs; None for one that is not there."""
    return entry if exit.residual or entry is None else torch.zeros_like(entry)


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
