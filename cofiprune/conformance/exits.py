"""Checking where blocks leave: without its blocks and its rest a layer returns its input, a gate scales a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cofiprune.conformance.specimens import Batch, outputs
from cofiprune.conformance.trace import Crash, crash_site, first_tensor, gap, inside, record
from cofiprune.masking import bypass, masks_of
from cofiprune.structure import Block, BlockExit, Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHUT = 1e-12
"""A gate at which nothing of a block's output is left to see."""
_NOTHING = 1e-6


def wrong_exit(model: PreTrainedModel, structure: Structure, batch: Batch) -> str:
    """Name the exit through which a removed block does not hand its input on; "" when there is none.

    :param model: under masks that remove every block.
    """
    crash = crash_site(model, batch)
    if crash is not None:
        return f"Without its blocks the model fails in {crash}. {exit_hint(structure, crash)}"
    entries: dict[str, Tensor] = {}
    exits: dict[str, Tensor | None] = {}

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            found = first_tensor([*args, *kwargs.values()])
            if found is not None:
                entries[path] = found

        return hook

    def leave(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            exits[path] = first_tensor(output)

        return hook

    with ExitStack() as hooks:
        for path in structure.layers:
            hook = model.get_submodule(path).register_forward_pre_hook(enter(path), with_kwargs=True)
            hooks.callback(hook.remove)
        for path in (*structure.layers, *(block.exit.module for block in structure.blocks)):
            hooks.callback(model.get_submodule(path).register_forward_hook(leave(path)).remove)
        hooks.enter_context(_without(model, structure.extra))
        outputs(model, batch)
    for path in structure.layers:
        found = exits[path]
        if found is None or not torch.equal(found, entries[path]):
            blocks = [block for block in structure.blocks if inside(block.exit.module, path)]
            return _wrong_block(path, blocks, entries[path], exits)
    return ""


def _wrong_block(path: str, blocks: list[Block], entry: Tensor, exits: Mapping[str, Tensor | None]) -> str:
    for block in blocks:
        value = exits[block.exit.module]
        wanted = entry if block.exit.residual else torch.zeros_like(entry)
        if value is None or not torch.equal(value, wanted):
            shape = "nothing" if value is None else f"a tensor of shape {tuple(value.shape)}"
            what = "the layer's input" if block.exit.residual else "zeros"
            return (
                f"{block.gate!r} leaves through {block.exit}, which returns {shape} that is not {what} of shape "
                f"{tuple(entry.shape)}: check argument, keyword, residual, and which module it is."
            )
    shown = "; ".join(f"{block.gate!r} through {block.exit}" for block in blocks)
    return (
        f"Layer {path!r} does not return its input. Its blocks leave: {shown}; check residual. What the layer holds "
        "beside its blocks and keeps without them belongs into the family's rest."
    )


@contextmanager
def _without(model: PreTrainedModel, rest: tuple[BlockExit, ...]) -> Iterator[None]:
    """A model whose layers hold nothing beside their blocks."""

    def silent(exit: BlockExit) -> Callable[..., Any]:
        return lambda *args, **kwargs: bypass(exit, args, kwargs)

    modules = [(model.get_submodule(exit.module), exit) for exit in rest]
    before = [(module, module.__dict__.get("forward")) for module, _ in modules]
    for module, exit in modules:
        module.__dict__["forward"] = silent(exit)
    try:
        yield
    finally:
        for module, forward in before:
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


def exit_hint(structure: Structure, crash: Crash | None) -> str:
    """Name the exits at or below the module in which a model under masks failed."""
    path = "" if crash is None else crash.module
    near = [block for block in structure.blocks if inside(block.exit.module, path) or inside(path, block.exit.module)]
    shown = "; ".join(f"{block.gate!r} through {block.exit}" for block in near[:2])
    return f"Blocks leave there: {shown}; check argument, keyword and outputs." if shown else ""


def uncovered(structure: Structure) -> str:
    """Name a parameter of a block that would outlive its block; "" when there is none."""
    for block in structure.blocks:
        roots = (block.exit.module, *(exit.module for exit in block.bypassed), *block.dropped)
        for spec in structure.parameters:
            if spec.gate == block.gate and not any(inside(spec.name, root) for root in roots):
                return (
                    f"{spec.name!r} belongs to {block.gate!r} but lies outside the modules that are removed with it, "
                    f"{', '.join(map(repr, roots))}: add its module to bypassed, or move the exit up."
                )
    return ""


def ungated(model: PreTrainedModel, structure: Structure, batch: Batch) -> str:
    """Name a parameter of a block's last projection that its gate does not scale, or a wrong `BlockExit.residual`.

    :param model: under masks that set every gate to `SHUT`.
    :return: "" when there is none.
    """
    gated = {spec.name.rpartition(".")[0]: spec for spec in structure.parameters if spec.gated}
    found: dict[str, float] = {}

    def leave(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = first_tensor(output)
            found[path] = 0.0 if value is None else float(value.abs().max())

        return hook

    with ExitStack() as hooks:
        for path in (*gated, *(block.exit.module for block in structure.blocks)):
            hooks.callback(model.get_submodule(path).register_forward_hook(leave(path)).remove)
        outputs(model, batch)
    scaled = {spec.name for spec in structure.parameters if spec.gated}
    for path in gated:
        if found.get(path, 0.0) > _NOTHING:
            own = [f"{path}.{name}" for name, _ in model.get_submodule(path).named_parameters(recurse=False)]
            names = ", ".join(repr(name) for name in own if name not in scaled) or repr(path)
            return f"{names} is not scaled by {gated[path].gate!r}: describe the whole module by projection(...)."
    for block in structure.blocks:
        if block.exit.residual == (found[block.exit.module] <= _NOTHING):
            adds = "not added" if block.exit.residual else "added"
            return f"{block.gate!r} leaves through {block.exit}, in which the residual is {adds}: turn residual around."
    return ""


def overreaching(model: PreTrainedModel, structure: Structure, batch: Batch, kind: str) -> str:
    """Name a block that takes with it what another block reads; "" when none does.

    Where a residual is added outside of the blocks, one without it is one whose gate is all but shut. (Where it is not,
    a norm goes too, and what comes behind it differs.)

    :param model: under masks, which are changed.
    :param kind: "attention" or "ffn", the blocks to remove.
    """
    masks = masks_of(model)
    assert masks is not None
    removed = [block for block in structure.blocks if block.gate.endswith(kind)]
    if any(block.exit.residual for block in removed):
        return ""
    found = []
    for gate in (SHUT, 0.0):
        for block in structure.blocks:
            masks[block.gate] = [gate if block in removed else 1.0]
        found.append(record(model, batch))
    shut, gone = found
    for call, value in gone.items():
        if not any(True for _ in model.get_submodule(call[0]).parameters()):
            continue  # an activation, say: nothing describes which block it is of
        own = [
            block for block in removed if any(inside(call[0], root.module) for root in (block.exit, *block.bypassed))
        ]
        other = shut.get(call)
        if own or (other is not None and other.shape == value.shape and gap(value, other) <= _NOTHING):
            continue
        layer = next((path for path in structure.layers if inside(call[0], path)), "")
        for block in removed:
            if inside(block.exit.module, layer):
                roots = ", ".join(repr(root.module) for root in (block.exit, *block.bypassed))
                return (
                    f"Removing {block.gate!r} changes {call[0]!r}, which is not part of it. Removed with it are "
                    f"{roots}: check bypassed, and which block the parameters in them belong to."
                )
    return ""
