"""Activations of a model on a few batches, layer after layer in bounded memory.

To look at one layer of a model whose lower layers have been settled, only that layer has to be run: the layers below
are replaced by the output of the last of them, and nothing above is computed. So a walk from the bottom to the top,
which stops at every layer to change it, costs about as much as two forward passes.

Shapes: B examples, T positions (tokens, patches or frames), H hidden, n inputs of a linear layer,
N positions of a batch that are not padding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofiprune.bypass import states_of
from cofiprune.data.batches import to_model
from cofiprune.hooks import After, Before, StopForward, replaced_forward, watching
from cofiprune.inference.fusion import is_linear
from cofiprune.structure import Block, BlockExit, Parameter, Structure

Batch = Mapping[str, Tensor]


def valid_rows(states: Tensor, batch: Batch) -> Tensor:
    """Return the states of all positions that are not padding, in float32 or wider: [N, width].

    :param states: [B, T, width], or any other shape whose last dimension is the width; T may exceed the batch's own
        by padding at the end, which some models add, or by what other inputs than the text become, such as an image.
        What does not line up with the attention mask is taken whole.
    """
    wide = states.to(torch.promote_types(torch.float32, states.dtype))
    rows = wide.reshape(-1, wide.shape[-1])
    mask = batch.get("attention_mask")
    if mask is None:
        return rows
    examples = mask.reshape(-1, mask.shape[-1])
    added = states.shape[-2] - examples.shape[1]
    if added > 0 and len(rows) == len(examples) * states.shape[-2]:
        others = any(value.dim() > 1 and value.shape[:2] != mask.shape[:2] for value in batch.values())
        examples = F.pad(examples, (0, added), value=int(others))
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
        model(**to_model(batch, model))
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


def projections(model: nn.Module, structure: Structure) -> dict[str, tuple[str, ...]]:
    """Return the paths of every block's last projections, by the name of the gate, where they are `nn.Linear`s.

    There are several where one block stands for two networks of a layer, as in a conformer.
    """
    found = {}
    for block in structure.blocks:
        paths = [
            spec.name.rpartition(".")[0]
            for spec in structure.parameters
            if spec.gated and spec.gate == block.gate and len(spec.shape) == 2
        ]
        if paths and all(isinstance(model.get_submodule(path), nn.Linear) for path in paths):
            found[block.gate] = tuple(paths)
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
    more: list[Activations] = field(default_factory=list)
    """Of further calls in the same pass: DeBERTa-v3 maps its relative positions by the maps of its tokens."""

    @property
    def sum(self) -> Tensor:
        """[B, T, H]: the residual stream after the block where that is known, the block's output elsewhere."""
        return self.outputs if self.entry is None else self.outputs + self.entry

    def rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the inputs [N, n] and sums [N, H] of all calls, without padding."""
        every = (self, *self.more)
        return (
            torch.cat([valid_rows(each.inputs, batch) for each in every]),
            torch.cat([valid_rows(each.sum, batch) for each in every]),
        )


class _Record:
    """What passes some modules in one forward pass, which is stopped when all of it has been seen."""

    def __init__(self, paths: Sequence[str], exits: Mapping[str, BlockExit], times: Mapping[str, int]) -> None:
        self.exits = exits
        self.pending = Counter[str | BlockExit]([*paths, *exits.values()])
        self.pending.update({path: count - 1 for path, count in times.items()})
        self._calls: dict[str, list[Activations]] = {}
        self._entries: dict[str, Tensor] = {}

    def arrived(self, what: str | BlockExit) -> None:
        """Note a call."""
        self.pending.subtract([what])
        if all(left <= 0 for left in self.pending.values()):
            raise StopForward

    def called(self, path: str) -> After:
        """Return what records the calls of a module."""

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # Copies: what is run afterwards may add the residual in place.
            self._calls.setdefault(path, []).append(Activations(args[0].clone(), output.clone()))
            self.arrived(path)

        return note

    def entered(self, path: str, exit: BlockExit) -> Before:
        """Return what records the entry into a block's exit."""

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._entries[path] = states_of(exit, args, kwargs).clone()
            self.arrived(exit)

        return note

    def activations(self) -> dict[str, Activations]:
        """Return what was seen, by path."""
        return {
            path: replace(first, entry=self._entries.get(path), more=more)
            for path, (first, *more) in self._calls.items()
        }


class Layerwise:
    """Runs a model over batches one layer at a time, from the bottom to the top."""

    def __init__(self, model: nn.Module, structure: Structure, batches: Sequence[Batch]) -> None:
        """Start below the first layer."""
        self.batches = [to_model(batch, model) for batch in batches]
        self.model = model
        self.layers = structure.layers
        exits = {block.gate: block.exit for block in structure.blocks if block.exit.residual}
        alone = {gate: paths[0] for gate, paths in projections(model, structure).items() if len(paths) == 1}
        self._exits = {path: exits[gate] for gate, path in alone.items() if gate in exits}
        self.depth = 0
        """Index of the current layer; the ones below are not run any more."""
        self._below: list[list[Any]] = [[] for _ in batches]
        """What the layers below gave, by batch: one for each stage, where the states change their shape between two."""
        self._stages: list[int] = []
        """The stage of each layer below."""
        self._above: list[Any] = [None] * len(batches)

    @torch.no_grad()
    def look(
        self,
        index: int,
        wanted: Sequence[str] = (),
        *,
        settle: bool = False,
        times: Mapping[str, int] = MappingProxyType({}),
    ) -> dict[str, Activations]:
        """Run the model on a batch, no further than is needed to see what passes some linear layers and norms.

        :param wanted: their paths, of the current layer or outside of the layers.
        :param settle: run the current layer to its end and keep its output, for when the walk goes up.
        :param times: calls to wait for, by path, where that is not one.
        :return: by path; nothing of modules that are not called.
        """
        layers = [self.layers[self.depth]] if settle else []
        record = _Record([*wanted, *layers], {path: self._exits[path] for path in wanted if path in self._exits}, times)

        def settled(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if record.pending[layers[0]] > 0:  # of a layer that is applied several times in a row, the first
                self._above[index] = output
            record.arrived(layers[0])

        before = {exit.module: record.entered(path, exit) for path, exit in record.exits.items()}
        after = {**{path: record.called(path) for path in wanted}, **dict.fromkeys(layers, settled)}
        with ExitStack() as replaced:
            for path, stage in zip(self.layers, self._stages, strict=False):
                layer, below = self.model.get_submodule(path), self._below[index][stage]
                replaced.enter_context(replaced_forward(layer, lambda *args, below=below, **kwargs: below))
            with suppress(StopForward), watching(self.model, before=before, after=after):
                self.model(**self.batches[index])
        return record.activations()

    def advance(self) -> None:
        """Go up to the next layer; every batch must have been settled in the current one."""
        same = all(
            below and _shape(below[-1]) == _shape(above) for below, above in zip(self._below, self._above, strict=True)
        )
        for below, above in zip(self._below, self._above, strict=True):
            below[len(below) - same :] = [above]
        self._stages.append(len(self._below[0]) - 1 if self._below else 0)
        self._above = [None] * len(self.batches)
        self.depth += 1


def _shape(output: Any) -> tuple[int, ...]:
    """The shape of the states that a layer returns."""
    first = output if isinstance(output, Tensor) else next(iter(output))
    return tuple(first.shape)
