"""Laws of block exits: a layer without its blocks and extras returns its input; a gate scales all of its block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cofiprune.bypass import bypass
from cofiprune.conformance.calls import Call, calls_of, crash_site, gap, inside, record, size
from cofiprune.conformance.specimens import Subject
from cofiprune.errors import LawError
from cofiprune.hooks import replaced_forward
from cofiprune.masks import MaskRegistry
from cofiprune.structure import Block, BlockExit, Structure

_CLOSED = 1e-12
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


def run(subject: Subject, what: str) -> dict[str, Tensor]:
    """Run a model under masks.

    :raises LawError: when it fails, naming the module and the exits at or below it.
    """
    try:
        return subject.outputs()
    except Exception as error:
        crash = crash_site(subject.model, subject.batch)
        path = "" if crash is None else crash.module
        exits = {block.gate: block.exit for block in subject.structure.blocks}
        near = {gate: exit for gate, exit in exits.items() if inside(exit.module, path) or inside(path, exit.module)}
        shown = "; ".join(f"{gate!r} through {exit}" for gate, exit in list(near.items())[:2])
        hint = f" Blocks leave there: {shown}; check argument, keyword and outputs." if shown else ""
        raise LawError(f"fails under {what}, in {crash}.{hint}") from error


def check_blocks(subject: Subject) -> None:
    """A layer without its blocks returns its input, and a block's gate scales all of its output, bias included.

    Masked and compacted models agree on a wrong `BlockExit` and on a bias that no gate scales, hence a law apart.

    :raises LawError: naming the `BlockExit` or the parameter.
    """
    with subject.masked(("layer",)) as masks:
        masks.update({name: torch.tensor([_CLOSED]) for name in masks})
        _check_gates(subject)
        masks.update({name: torch.zeros(1) for name in masks})
        _check_layers(subject)
        for kind in ("attention", "ffn"):
            _check_other_blocks(subject, masks, kind)


def check_covered(structure: Structure) -> None:
    """Every parameter of a block goes with it.

    :raises LawError: naming one that does not.
    """
    for block in structure.blocks:
        roots = (*_roots(block), *block.dropped)
        for spec in structure.parameters:
            if spec.gate == block.gate and not any(inside(spec.name, root) for root in roots):
                raise LawError(
                    f"{spec.name!r} belongs to {block.gate!r} but lies outside the modules that are removed with it, "
                    f"{', '.join(map(repr, roots))}: add its module to bypassed, or move the exit up."
                )


def _roots(block: Block) -> tuple[str, ...]:
    return (block.exit.module, *(exit.module for exit in block.bypassed))


def _check_gates(subject: Subject) -> None:
    """Under closed gates, the last projection of every block writes nothing, and so does a block without a residual."""
    structure = subject.structure
    gated = {spec.name.rpartition(".")[0]: spec for spec in structure.parameters if spec.gated}
    calls = calls_of(subject.model, subject.batch, {*gated, *(block.exit.module for block in structure.blocks)})
    found = {call.path: float(call.output.abs().max()) for call in calls if call.output is not None}
    scaled = {spec.name for spec in structure.parameters if spec.gated}
    for path, spec in gated.items():
        if found.get(path, 0.0) > _NOTHING:
            own = [f"{path}.{name}" for name in subject.model.get_submodule(path)._parameters]
            names = ", ".join(repr(name) for name in own if name not in scaled) or repr(path)
            raise LawError(f"{names} is not scaled by {spec.gate!r}: describe the whole module by projection(...).")
    for block in structure.blocks:
        adds = found.get(block.exit.module, 0.0) > _NOTHING
        if block.exit.residual != adds:
            raise LawError(
                f"{block.gate!r} leaves through {block.exit}, in which the residual is {'' if adds else 'not '}added: "
                f"set residual={adds}."
            )


def _check_layers(subject: Subject) -> None:
    """Every layer returns its input under masks that remove every block."""
    structure = subject.structure
    run(subject, "masks that remove every block")
    with bypassing(subject.model, structure.extra):
        calls = {call.path: call for call in calls_of(subject.model, subject.batch)}
    for path in structure.layers:
        entry, output = calls[path].entry, calls[path].output
        assert entry is not None
        if output is None or not torch.equal(output, entry):
            raise LawError(_wrong_block(path, structure, entry, calls))


def _wrong_block(path: str, structure: Structure, entry: Tensor, calls: Mapping[str, Call]) -> str:
    blocks = [block for block in structure.blocks if inside(block.exit.module, path)]
    for block in blocks:
        value = calls[block.exit.module].output
        what, wanted = ("the layer's input", entry) if block.exit.residual else ("zeros", torch.zeros_like(entry))
        if value is None or not torch.equal(value, wanted):
            shape = "nothing" if value is None else f"a tensor of shape {tuple(value.shape)}"
            return (
                f"{block.gate!r} leaves through {block.exit}, which returns {shape} that is not {what} of shape "
                f"{tuple(entry.shape)}: check argument, keyword, residual, and which module it is."
            )
    shown = "; ".join(f"{block.gate!r} through {block.exit}" for block in blocks)
    return (
        f"Layer {path!r} does not return its input. Its blocks leave: {shown}; check residual. What the layer holds "
        "in addition to its blocks and keeps without them belongs into the family's extra."
    )


def _check_other_blocks(subject: Subject, masks: MaskRegistry, kind: str) -> None:
    """Removing blocks of a kind, "attention" or "ffn", leaves the other blocks' modules as they are.

    Where the residual is added outside of the blocks, removing a block is the same as closing its gate. (Elsewhere a
    norm goes with the block, and what follows differs.)
    """
    model, structure = subject.model, subject.structure
    removed = [block for block in structure.blocks if block.gate.endswith(kind)]
    if any(block.exit.residual for block in removed):
        return
    found = []
    for gate in (_CLOSED, 0.0):
        for block in structure.blocks:
            masks[block.gate] = [gate if block in removed else 1.0]
        found.append(record(model, subject.batch))
    closed, gone = found
    for (path, count), value in gone.items():
        other = closed.get((path, count))
        own = any(inside(path, root) for block in removed for root in _roots(block))
        # No row tells which block a module without parameters, an activation say, belongs to.
        is_described = any(True for _ in model.get_submodule(path).parameters())
        if own or not is_described or (other is not None and gap(value, other) <= _NOTHING * size({path: value})):
            continue
        layer = next((each for each in structure.layers if inside(path, each)), "")
        for block in removed:
            if inside(block.exit.module, layer):
                raise LawError(
                    f"Removing {block.gate!r} changes {path!r}, which is not part of it. Removed with it are "
                    f"{', '.join(map(repr, _roots(block)))}: check bypassed, and which block the parameters in them "
                    "belong to."
                )
