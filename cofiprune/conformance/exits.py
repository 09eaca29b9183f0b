"""Laws of block exits: a layer without its blocks and extras returns its input; a gate scales all of its block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cofiprune.conformance.calls import Call, Crash, calls_of, crash_site, gap, inside, record
from cofiprune.conformance.specimens import Subject
from cofiprune.hooks import replaced_forward
from cofiprune.masking import bypass
from cofiprune.masks import MaskRegistry
from cofiprune.structure import BlockExit, Structure

CLOSED = 1e-12
"""A gate that leaves nothing visible of a block's output."""
_NOTHING = 1e-6


@contextmanager
def bypassing(model: nn.Module, exits: Iterable[BlockExit]) -> Iterator[None]:
    """Let modules return their input, or zeros, in place of what they compute."""

    def bypassed(exit: BlockExit) -> Callable[..., Any]:
        return lambda *args, **kwargs: bypass(exit, args, kwargs)

    with ExitStack() as replaced:
        for exit in exits:
            replaced.enter_context(replaced_forward(model.get_submodule(exit.module), bypassed(exit)))
        yield


def wrong_exit(subject: Subject) -> str:
    """Name the exit through which a removed block does not hand its input on; "" when there is none.

    :param subject: under masks that remove every block.
    """
    model, structure, batch = subject.model, subject.structure, subject.batch
    crash = crash_site(model, batch)
    if crash is not None:
        return f"Without its blocks the model fails in {crash}. {exit_hint(structure, crash)}"
    with bypassing(model, structure.extra):
        calls = {call.path: call for call in calls_of(model, batch)}
    for path in structure.layers:
        entry, output = calls[path].entry, calls[path].output
        assert entry is not None
        if output is None or not torch.equal(output, entry):
            return _wrong_block(path, structure, entry, calls)
    return ""


def _wrong_block(path: str, structure: Structure, entry: Tensor, calls: Mapping[str, Call]) -> str:
    blocks = [block for block in structure.blocks if inside(block.exit.module, path)]
    for block in blocks:
        value = calls[block.exit.module].output
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
        "in addition to its blocks and keeps without them belongs into the family's extra."
    )


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


def ungated(subject: Subject) -> str:
    """Name a parameter of a block's last projection that its gate does not scale, or a wrong `BlockExit.residual`.

    :param subject: under masks that set every gate to `CLOSED`.
    :return: "" when there is none.
    """
    model, structure, batch = subject.model, subject.structure, subject.batch
    gated = {spec.name.rpartition(".")[0]: spec for spec in structure.parameters if spec.gated}
    calls = calls_of(model, batch, {*gated, *(block.exit.module for block in structure.blocks)})
    found = {call.path: float(call.output.abs().max()) for call in calls if call.output is not None}
    scaled = {spec.name for spec in structure.parameters if spec.gated}
    for path in gated:
        if found.get(path, 0.0) > _NOTHING:
            own = [f"{path}.{name}" for name, _ in model.get_submodule(path).named_parameters(recurse=False)]
            names = ", ".join(repr(name) for name in own if name not in scaled) or repr(path)
            return f"{names} is not scaled by {gated[path].gate!r}: describe the whole module by projection(...)."
    for block in structure.blocks:
        if block.exit.residual == (found.get(block.exit.module, 0.0) <= _NOTHING):
            adds, value = ("not added", False) if block.exit.residual else ("added", True)
            return f"{block.gate!r} leaves through {block.exit}, in which the residual is {adds}: set residual={value}."
    return ""


def overreaching(subject: Subject, masks: MaskRegistry, kind: str) -> str:
    """Name a block whose removal changes what another block reads; "" when there is none.

    Where the residual is added outside of the blocks, removing a block is the same as closing its gate. (Elsewhere a
    norm goes with the block, and what follows differs.)

    :param masks: attached to the model; they are changed.
    :param kind: "attention" or "ffn", the blocks to remove.
    """
    model, structure, batch = subject.model, subject.structure, subject.batch
    removed = [block for block in structure.blocks if block.gate.endswith(kind)]
    if any(block.exit.residual for block in removed):
        return ""
    found = []
    for gate in (CLOSED, 0.0):
        for block in structure.blocks:
            masks[block.gate] = [gate if block in removed else 1.0]
        found.append(record(model, batch))
    closed, gone = found
    for call, value in gone.items():
        path, other = call[0], closed.get(call)
        if not any(True for _ in model.get_submodule(path).parameters()):
            continue  # an activation, say: no row tells which block it belongs to
        own = [block for block in removed if any(inside(path, root.module) for root in (block.exit, *block.bypassed))]
        if own or (other is not None and other.shape == value.shape and gap(value, other) <= _NOTHING):
            continue
        layer = next((each for each in structure.layers if inside(path, each)), "")
        for block in removed:
            if inside(block.exit.module, layer):
                roots = ", ".join(repr(root.module) for root in (block.exit, *block.bypassed))
                return (
                    f"Removing {block.gate!r} changes {path!r}, which is not part of it. Removed with it are {roots}: "
                    "check bypassed, and which block the parameters in them belong to."
                )
    return ""
