"""Layer-wise least-squares reconstruction of the dense model's outputs.

From the bottom to the top, every linear layer that is left is refitted on the inputs that reach it now, through
everything that was cut and refitted below. The last projection of a block aims at the residual stream after the block,
in the hidden dimensions that are kept (K-prune, Park et al., 2024, arXiv:2308.03449); the layers that read the stream
aim at what the same units read in the dense model; and those of the head at what the head computed. So an error
below is made up for wherever it can be. Biases take the means over (FLAP, An et al., 2024, arXiv:2312.11983).

Positions count by how much the outputs depend on them: after the last attention block of a classifier only the first
one does. A ridge pulls towards the weights as they are, not towards zero: directions that no input excites (dead units,
constant inputs) stay as they were.

Where hidden dimensions go, the statistics of the norms are those of the dimensions that stay, which scales every state
by a factor of its own. On average over the rows that is an affine map of each dimension, and so the norms' own weights
and biases can undo it.

Shapes: n inputs of a linear layer, K outputs, H hidden, N positions of a batch that are not padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from cofiprune.compaction.slicing import positions
from cofiprune.hooks import watching
from cofiprune.inference.fusion import is_linear
from cofiprune.oneshot.layerwise import Batch, Layerwise, projections, readers
from cofiprune.oneshot.regression import AffineFit, LeastSquares
from cofiprune.plan import Plan
from cofiprune.structure import Block, Parameter, Structure

RIDGE = 0.3
"""Weight of the pull towards the weights as they are on synthetic inputs, relative to the mean squared input. With 30
and 60 % of MiniLM-L6 removed, 0.3 comes nearest on synthetic inputs that the fit has not seen. Far less fits embeddings
of random tokens at the cost of those of real text: 0.001 can leave the latter worse than no fit does."""
_LARGEST = 4096
"""Outputs of a head's linear layer up to which it is refitted: beyond lie vocabularies, whose statistics would take too
much memory."""


@dataclass(frozen=True)
class Reconstruction:
    """A model that was cut, the model whose blocks it is to reproduce, and the inputs to do it on."""

    reference: nn.Module
    structure: Structure
    """Of the reference."""
    small: nn.Module
    plan: Plan
    """The cut, in terms of the reference."""
    batches: Sequence[Batch]
    weights: Mapping[str, Sequence[Tensor]] | None = None
    """Weights of the positions of real data, [N] for each batch, by the path of a last projection; without an entry all
    count alike. The linear layers that read the stream, and those of the head, are then refitted too, each with the
    ridge that held-out rows choose. None for synthetic inputs."""

    def run(self, on_progress: Callable[[float], None] | None = None) -> None:
        """Refit the small model in place, from the bottom to the top.

        :param on_progress: called with the share done, in (0, 1].
        """
        above, walk = self._walks()
        first = walk.batches[0]
        before, after = norms_outside(self.small, self._small_structure, first) if self._norms else ([], [])
        head = [] if self.weights is None else head_linears(self.small, self._small_structure, first)
        self._refit(above, walk, [[path] for path in before])
        layers = len(self.structure.layers)
        for layer in range(layers):
            self._refit(above, walk, list(self._stages(layer)), settle=True)
            above.advance()
            walk.advance()
            if on_progress is not None:
                on_progress((layer + 1) / layers)
        # From below again: layers with shared weights leave the walk with the output of the first of them.
        self._refit(*self._walks(), [[path] for path in (*after, *head)])

    def _walks(self) -> tuple[Layerwise, Layerwise]:
        return (
            Layerwise(self.reference, self.structure, self.batches),
            Layerwise(self.small, self._small_structure, self.batches),
        )

    @cached_property
    def _small_structure(self) -> Structure:
        return self.structure.cut(self.plan.kept)

    def _stages(self, layer: int) -> Iterator[list[str]]:
        """Give the paths in a layer that are refitted at the same time, one stage after the other."""
        dense = projections(self.reference, self.structure)
        small = projections(self.small, self._small_structure)
        for block in self._small_structure.blocks:
            if self._small_structure[block.gate].layer != layer:
                continue
            norms = [[path] for path in norms_of(self._small_structure, block) if path in self._norms]
            # Layers with shared weights read something else each time, and the walk sees the first of them.
            reads = self.weights is not None and not self.structure.applications
            linears = [
                readers(self.small, self._small_structure, block) if reads else [],
                small.get(block.gate, ()) if block.gate in dense else (),
            ]
            learning = [[path for path in paths if self._learns(path)] for paths in linears]
            stages = [*learning, *norms] if block.exit.residual else [*norms, *learning]
            yield from filter(None, stages)

    @cached_property
    def _norms(self) -> set[str]:
        """The norms that are refitted: all of them where hidden dimensions are gone, else none."""
        sizes = self._small_structure.sizes
        if sizes.get("hidden") == self.structure.sizes.get("hidden"):
            return set()
        return {norm.module for norm in self._small_structure.norms if norm.module in self._weights_of}

    def _learns(self, path: str) -> bool:
        return self.small.get_parameter(f"{path}.weight").requires_grad  # frozen weights stay as they are

    @cached_property
    def _weights_of(self) -> dict[str, Parameter]:
        """The weights of the reference by the path of their module."""
        found = {spec.name.removesuffix(".weight"): spec for spec in self.structure.parameters}
        return {path: spec for path, spec in found.items() if path != spec.name}

    def _refit(self, above: Layerwise, walk: Layerwise, stages: Sequence[list[str]], *, settle: bool = False) -> None:
        """Refit modules to what those of the reference put out, stage by stage.

        :param settle: run the current layer to its end, in both models, so that the walks can go up.
        """
        targets: dict[str, list[Tensor]] = {path: [] for paths in stages for path in paths}
        if not targets and not settle:
            return
        times: dict[str, int] = {}
        for index, batch in enumerate(above.batches):
            for path, seen in above.look(index, list(targets), settle=settle).items():
                side, times[path] = self._weights_of[path].sides[0], 1 + len(seen.more)
                _, rows = seen.rows(batch)
                targets[path].append(rows if side is None else rows[:, positions(side, self.plan.keep[side.group])])
        for paths in stages:
            self._fit(walk, paths, targets, {path: count for path, count in times.items() if path in paths})
        for index in range(len(walk.batches)) if settle else ():
            walk.look(index, settle=True)

    def _fit(
        self,
        walk: Layerwise,
        paths: Sequence[str],
        targets: Mapping[str, Sequence[Tensor]],
        times: Mapping[str, int],
    ) -> None:
        """Fit linear layers to what is missing in their outputs; scale and shift norms to be right on average.

        :param times: how often each is called in a pass.
        """
        modules = {path: self.small.get_submodule(path) for path in paths}
        norms = {path: AffineFit(self._small_structure.sizes["hidden"]) for path in paths if path in self._norms}
        linears = {path: LeastSquares.of(modules[path]) for path in paths if path not in norms}
        for index, batch in enumerate(walk.batches):
            for path, seen in walk.look(index, paths, times=times).items():
                inputs, found = seen.rows(batch)
                wanted = targets[path][index].to(found)
                if path in norms:
                    norms[path].add(found, wanted)
                else:
                    weights = (self.weights or {}).get(path)
                    linears[path].add(inputs, wanted - found, None if weights is None else weights[index])
        for path, norm in norms.items():
            norm.correct(modules[path])
        for path, linear in linears.items():
            linear.correct(modules[path], RIDGE if self.weights is None else None)


def norms_of(structure: Structure, block: Block) -> list[str]:
    """Return the norms over the residual stream that go with a block."""
    gates = {spec.name.rpartition(".")[0]: spec.gate for spec in structure.parameters}
    return [norm.module for norm in structure.norms if gates.get(norm.module) == block.gate]


def norms_outside(model: nn.Module, structure: Structure, batch: Batch) -> tuple[list[str], list[str]]:
    """Return the norms over the stream outside of the layers: those that run before them, and those that run after.

    :param batch: on the model's device.
    """
    inside = tuple(f"{path}." for path in structure.layers)
    paths = [norm.module for norm in structure.norms if not norm.module.startswith(inside)]
    return _around(model, structure.layers[0], paths, batch)


def head_linears(model: nn.Module, structure: Structure, batch: Batch) -> list[str]:
    """Return the paths of the linear layers that run after the last layer, poolers and classifiers, in their order.

    Only those that learn, and that share their weights with nothing else, such as the embeddings.
    """
    inside = tuple(f"{path}." for path in structure.layers)
    owners = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    paths = [
        path
        for path, module in model.named_modules()
        if is_linear(module)
        and not path.startswith(inside)
        and module.out_features <= _LARGEST
        and module.weight.requires_grad
        and owners.count(id(module.weight)) == 1
    ]
    return _around(model, structure.layers[-1], paths, batch)[1]


@torch.no_grad()
def _around(model: nn.Module, layer: str, paths: Sequence[str], batch: Batch) -> tuple[list[str], list[str]]:
    """Return which modules are called before a layer is for the first time, and which after it, in their order."""
    order: list[str] = []

    def note(path: str) -> Any:
        return lambda *_: order.append(path)

    with watching(model, after={path: note(path) for path in (*paths, layer)}):
        model(**batch)
    place = order.index(layer) if layer in order else len(order)
    before, after = dict.fromkeys(order[:place]), dict.fromkeys(order[place:])
    return list(before), [path for path in after if path != layer]
