"""What flows through a model's blocks on a few batches, layer after layer in bounded memory.

To look at one layer of a model whose lower layers have been settled, only that layer has to be run: the
layers below are replaced by what the last of them gave, and nothing above is computed. So a walk from
the bottom to the top, which stops at every layer to change it, costs about as much as two forward passes.

Shapes: B examples, T positions (tokens, patches or frames), H hidden, n inputs of a projection,
N positions of a batch that are not padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cofiprune.inference.siblings import is_linear
from cofiprune.masking import entry_of
from cofiprune.structure import Block, Structure

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

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        states = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        seen.append(states.numel() // states.shape[-1])
        raise Enough

    handle = model.get_submodule(structure.layers[0]).register_forward_pre_hook(note, with_kwargs=True)
    try:
        model(**placed(batch, model))
    except Enough:
        pass
    finally:
        handle.remove()
    return seen[0]


@dataclass(frozen=True)
class Projection:
    """The last projection of a block: from its inner units into the residual stream."""

    block: Block
    module: str
    """Path of an `nn.Linear`."""


def projections(model: nn.Module, structure: Structure) -> dict[str, Projection]:
    """Return the last projection of every block, by the name of its gate, where that is one `nn.Linear`."""
    found = {}
    for block in structure.blocks:
        paths = [
            spec.name.rpartition(".")[0]
            for spec in structure.parameters
            if spec.gated and spec.gate == block.gate and len(spec.shape) == 2
        ]
        if len(paths) == 1 and isinstance(model.get_submodule(paths[0]), nn.Linear):
            found[block.gate] = Projection(block, paths[0])
    return found


def readers(model: nn.Module, structure: Structure, block: Block) -> list[str]:
    """Return the paths of the `nn.Linear`s of a block that come before its last projection."""
    last = {spec.name for spec in structure.parameters if spec.gated}
    found = []
    for spec in structure.parameters:
        path, _, name = spec.name.rpartition(".")
        inside = spec.gate == block.gate and spec.name not in last and name == "weight" and len(spec.shape) == 2
        if inside and spec.sides[0] is not None and is_linear(model.get_submodule(path)):
            found.append(path)
    return found


@dataclass
class Passage:
    """What passed a map in one batch."""

    inputs: Tensor
    """[B, T, n]"""
    outputs: Tensor
    """[B, T, H]"""
    entry: Tensor | None = None
    """[B, T, H]: what the block's exit adds the output to, where the map is a block's last projection; None when the
    residual is added elsewhere."""

    @property
    def sum(self) -> Tensor:
        """[B, T, H]: the residual stream after the block where that is known, the block's output elsewhere."""
        return self.outputs if self.entry is None else self.outputs + self.entry


class Enough(Exception):  # noqa: N818 -- it is no error
    """Raised to leave a forward pass when all that was asked for has passed."""


class LayerWalk:
    """Runs a model over batches one layer at a time, from the bottom to the top."""

    def __init__(self, model: nn.Module, structure: Structure, batches: Sequence[Batch]) -> None:
        """Start below the first layer."""
        self.batches = [placed(batch, model) for batch in batches]
        self.model = model
        self.layers = [model.get_submodule(path) for path in structure.layers]
        self._last = {projection.module: projection.block for projection in projections(model, structure).values()}
        self.depth = 0
        """Index of the current layer; the ones below are not run any more."""
        self._below: list[Any] = [None] * len(batches)
        self._above: list[Any] = [None] * len(batches)

    def look(self, index: int, wanted: Sequence[str] = (), *, settle: bool = False) -> dict[str, Passage]:
        """Run the current layer on a batch, no further than is needed.

        :param wanted: paths of linear maps of this layer to watch.
        :param settle: run the layer to its end and store what it gives, for when the walk goes up.
        :return: what passed, by path; nothing of maps that are not called as modules.
        """
        passing = _Passing()
        with ExitStack() as hooks:
            for path in wanted:
                for handle in passing.watch(self.model, path, self._last.get(path)):
                    hooks.callback(handle.remove)
            if settle:
                hooks.callback(passing.watch_end(self.layers[self.depth]).remove)
            self._run(index)
        if settle:
            self._above[index] = passing.end
        return {path: Passage(**parts) for path, parts in passing.parts.items() if "inputs" in parts}

    def advance(self) -> None:
        """Go up to the next layer; every batch must have been settled in the current one."""
        self._below, self._above = self._above, [None] * len(self.batches)
        self.depth += 1

    def _run(self, index: int) -> None:
        with torch.no_grad(), _replaced(self.layers[: self.depth], self._below[index]):
            try:
                self.model(**self.batches[index])
            except Enough:
                return


class _Passing:
    """Hooks that note what passes, and end the forward pass when all of it has."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, Tensor]] = {}
        self.end: Any = None
        self._pending: set[tuple[str, str]] = set()

    def _arrived(self, *what: str) -> None:
        self._pending.discard((what[0], what[1]))
        if not self._pending:
            raise Enough

    def watch(self, model: nn.Module, path: str, block: Block | None) -> Iterator[RemovableHandle]:
        """Watch a map, and the exit of the block whose last projection it is, where that adds the residual."""
        parts = self.parts.setdefault(path, {})

        def passed(module: nn.Module, args: Any, output: Tensor) -> None:
            # Copies: what is run afterwards may add the residual in place.
            parts["inputs"], parts["outputs"] = args[0].clone(), output.clone()
            self._arrived(path, "map")

        self._pending.add((path, "map"))
        yield model.get_submodule(path).register_forward_hook(passed)
        if block is None or not block.exit.residual:
            return
        exit = block.exit

        def entered(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            parts["entry"] = entry_of(exit, args, kwargs).clone()
            self._arrived(path, "exit")

        self._pending.add((path, "exit"))
        yield model.get_submodule(exit.module).register_forward_pre_hook(entered, with_kwargs=True)

    def watch_end(self, layer: nn.Module) -> RemovableHandle:
        """Watch what a layer gives."""

        def ended(module: nn.Module, args: Any, output: Any) -> None:
            self.end = output
            self._arrived("", "end")

        self._pending.add(("", "end"))
        return layer.register_forward_hook(ended)


@contextmanager
def _replaced(layers: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Let layers return what is given instead of running."""
    stock: list[Callable[..., Any] | None] = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.__dict__["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        for layer, forward in zip(layers, stock, strict=True):
            if forward is None:
                layer.__dict__.pop("forward")
            else:
                layer.__dict__["forward"] = forward
