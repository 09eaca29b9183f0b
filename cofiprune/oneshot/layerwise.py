"""Activations of a model on a few batches, layer after layer in bounded memory.

To look at one layer of a model whose lower layers have been settled, only that layer has to be run: the layers below
are replaced by the output of the last of them, and nothing above is computed. So a walk from the bottom to the top,
which stops at every layer to change it, costs about as much as two forward passes.

Shapes: B examples, T positions (tokens, patches or frames), H hidden, n inputs of a linear layer,
N positions of a batch that are not padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofiprune.hooks import After, Before, StopForward, replaced_forward, watching
from cofiprune.inference.fusion import is_linear
from cofiprune.masking import entry_of
from cofiprune.structure import Block, BlockExit, Parameter, Structure

Batch = Mapping[str, Tensor]


def placed(batch: Batch, model: nn.Module) -> dict[str, Tensor]:
    """Return a batch on the device of a model, floating inputs in its precision."""
    weight = next(model.parameters())
    return {
        name: value.to(weight.device, weight.dtype if value.is_floating_point() else value.dtype)
        for name, value in batch.items()
    }


def valid_rows(states: Tensor, batch: Batch) -> Tensor:
    """Return the states of all positions that are not padding, in float32 or wider: [N, width].

    :param states: [B, T, width], or any other shape whose last dimension is the width; T may exceed the batch's own
        by padding at the end, which some models add. What does not line up with the attention mask is taken whole.
    """
    wide = states.to(torch.promote_types(torch.float32, states.dtype))
    rows = wide.reshape(-1, wide.shape[-1])
    mask = batch.get("attention_mask")
    if mask is None:
        return rows
    examples = mask.reshape(-1, mask.shape[-1])
    added = states.shape[-2] - examples.shape[1]
    if added > 0 and len(rows) == len(examples) * states.shape[-2]:
        examples = F.pad(examples, (0, added))
    return rows[(examples.flatten() != 0).to(rows.device)] if examples.numel() == len(rows) else rows


@torch.no_grad()
def counted(model: nn.Module, structure: Structure, batch: Batch) -> int:
    """Return the number of positions of a batch that are not padding."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return int((mask != 0).sum())
    seen: list[int] = []

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        states = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        seen.append(states.numel() // states.shape[-1])
        raise StopForward

    with suppress(StopForward), watching(model, before={structure.layers[0]: enter}):
        model(**placed(batch, model))
    return seen[0]


def first_batches(
    model: nn.Module, structure: Structure, batches: Iterable[Batch], positions: int
) -> tuple[list[Batch], int]:
    """Return the first batches with at least so many positions that are not padding, and how many they have."""
    found: list[Batch] = []
    number = 0
    for batch in batches:
        found.append(batch)
        number += counted(model, structure, batch)
        if number >= positions:
            break
    return found, number


def projections(model: nn.Module, structure: Structure) -> dict[str, str]:
    """Return the path of every block's last projection, by the name of the gate, where that is one `nn.Linear`."""
    found = {}
    for block in structure.blocks:
        paths = [
            spec.name.rpartition(".")[0]
            for spec in structure.parameters
            if spec.gated and spec.gate == block.gate and len(spec.shape) == 2
        ]
        if len(paths) == 1 and isinstance(model.get_submodule(paths[0]), nn.Linear):
            found[block.gate] = paths[0]
    return found


def linears(model: nn.Module, structure: Structure) -> Iterator[tuple[str, Parameter]]:
    """Give the path and the weight of every `nn.Linear`."""
    for spec in structure.parameters:
        path, _, name = spec.name.rpartition(".")
        if name == "weight" and len(spec.shape) == 2 and isinstance(model.get_submodule(path), nn.Linear):
            yield path, spec


def readers(model: nn.Module, structure: Structure, block: Block) -> list[str]:
    """Return the paths of the `nn.Linear`s of a block that come before its last projection."""
    inside = [
        path
        for path, spec in linears(model, structure)
        if spec.gate == block.gate and not spec.gated and spec.sides[0] is not None
    ]
    return [path for path in inside if is_linear(model.get_submodule(path))]


@dataclass
class Activations:
    """Inputs and outputs of a module in one batch."""

    inputs: Tensor
    """[B, T, n]"""
    outputs: Tensor
    """[B, T, H]"""
    entry: Tensor | None = None
    """[B, T, H]: what the block's exit adds the output to, where the module is a block's last projection; None when the
    residual is added elsewhere."""

    @property
    def sum(self) -> Tensor:
        """[B, T, H]: the residual stream after the block where that is known, the block's output elsewhere."""
        return self.outputs if self.entry is None else self.outputs + self.entry


class Layerwise:
    """Runs a model over batches one layer at a time, from the bottom to the top."""

    def __init__(self, model: nn.Module, structure: Structure, batches: Sequence[Batch]) -> None:
        """Start below the first layer."""
        self.batches = [placed(batch, model) for batch in batches]
        self.model = model
        self.layers = structure.layers
        exits = {block.gate: block.exit for block in structure.blocks if block.exit.residual}
        self._exits = {path: exits[gate] for gate, path in projections(model, structure).items() if gate in exits}
        self.depth = 0
        """Index of the current layer; the ones below are not run any more."""
        self._below: list[Any] = [None] * len(batches)
        self._above: list[Any] = [None] * len(batches)

    @torch.no_grad()
    def look(self, index: int, wanted: Sequence[str] = (), *, settle: bool = False) -> dict[str, Activations]:
        """Run the model on a batch, no further than is needed to see what passes some linear layers and norms.

        :param wanted: their paths, of the current layer or outside of the layers.
        :param settle: run the current layer to its end and keep its output, for when the walk goes up.
        :return: by path; nothing of modules that are not called.
        """
        exits = {path: self._exits[path] for path in wanted if path in self._exits}
        layers = [self.layers[self.depth]] if settle else []
        parts: dict[str, dict[str, Tensor]] = {path: {} for path in wanted}
        pending = {*wanted, *exits.values(), *layers}

        def arrived(what: str | BlockExit) -> None:
            pending.discard(what)
            if not pending:
                raise StopForward

        def called(path: str) -> After:
            def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                # Copies: what is run afterwards may add the residual in place.
                parts[path].update(inputs=args[0].clone(), outputs=output.clone())
                arrived(path)

            return note

        def entered(path: str, exit: BlockExit) -> Before:
            def note(module: nn.Module, args: Any, kwargs: Any) -> None:
                parts[path]["entry"] = entry_of(exit, args, kwargs).clone()
                arrived(exit)

            return note

        def settled(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if layers[0] in pending:  # of a layer that is applied several times in a row, the first
                self._above[index] = output
            arrived(layers[0])

        before = {exit.module: entered(path, exit) for path, exit in exits.items()}
        after = {**{path: called(path) for path in wanted}, **dict.fromkeys(layers, settled)}
        with ExitStack() as replaced:
            for path in self.layers[: self.depth]:
                layer, below = self.model.get_submodule(path), self._below[index]
                replaced.enter_context(replaced_forward(layer, lambda *args, below=below, **kwargs: below))
            with suppress(StopForward), watching(self.model, before=before, after=after):
                self.model(**self.batches[index])
        return {path: Activations(**seen) for path, seen in parts.items() if "inputs" in seen}

    def advance(self) -> None:
        """Go up to the next layer; every batch must have been settled in the current one."""
        self._below, self._above = self._above, [None] * len(self.batches)
        self.depth += 1
