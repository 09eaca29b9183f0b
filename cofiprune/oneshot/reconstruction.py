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
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from cofiprune.compaction.slicing import positions
from cofiprune.inference.fusion import is_linear
from cofiprune.oneshot.layerwise import Batch, Layerwise, activations, calls, projections, readers, valid_rows
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
    reference_structure: Structure
    small: nn.Module
    small_structure: Structure
    plan: Plan
    """The cut, in terms of the reference."""
    batches: Sequence[Batch]
    weights: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    """Weights of the positions, [N] for each batch, by gate; without an entry all count alike."""
    everything: bool = False
    """Real data: the linear layers that read the stream, and those of the head, are refitted too, each with the ridge
    that held-out rows choose."""

    def run(self, on_progress: Callable[[float], None] | None = None) -> None:
        """Refit the small model in place, from the bottom to the top.

        :param on_progress: called with the share done, in (0, 1].
        """
        above = Layerwise(self.reference, self.reference_structure, self.batches)
        walk = Layerwise(self.small, self.small_structure, self.batches)
        below, on_top = self._norms_outside(walk.batches[0])
        self._refit_outside(below, walk.batches)
        layers = len(self.reference_structure.layers)
        for layer in range(layers):
            stages = list(self._stages(layer))
            targets = self._targets(above, [path for paths in stages for path in paths])
            for paths in stages:
                refit = self._refit_norm if paths[0] in self._norms else self._refit
                refit(walk, paths, targets)
            for index in range(len(walk.batches)):
                walk.look(index, settle=True)
            above.advance()
            walk.advance()
            if on_progress is not None:
                on_progress((layer + 1) / layers)
        self._refit_outside(on_top, walk.batches)
        if self.everything:
            self._refit_head(walk.batches)

    def _stages(self, layer: int) -> Iterator[list[str]]:
        """Give the paths in a layer that are refitted at the same time, one stage after the other."""
        dense = projections(self.reference, self.reference_structure)
        small = projections(self.small, self.small_structure)
        for block in self.small_structure.blocks:
            if self.small_structure[block.gate].layer != layer:
                continue
            norms = [[path] for path in norms_of(self.small_structure, block) if path in self._norms]
            stages = []
            # Layers with shared weights read something else each time, and the walk sees the first of them.
            if self.everything and not self.reference_structure.applications:
                stages.append([path for path in readers(self.small, self.small_structure, block) if self._learns(path)])
            if block.gate in small and block.gate in dense and self._learns(small[block.gate]):
                stages.append([small[block.gate]])
            stages = [*stages, *norms] if block.exit.residual else [*norms, *stages]
            yield from (paths for paths in stages if paths)

    @cached_property
    def _hidden(self) -> Tensor:
        """The hidden dimensions of the reference that the small model has."""
        return torch.tensor(self.plan.keep.get("hidden", ()))

    @cached_property
    def _norms(self) -> set[str]:
        """The norms that are refitted: all of them where hidden dimensions are gone, else none."""
        whole = self.reference_structure.sizes.get("hidden", 0)
        return {norm.module for norm in self.small_structure.norms} if len(self._hidden) < whole else set()

    def _norms_outside(self, batch: Batch) -> tuple[list[str], list[str]]:
        return norms_outside(self.small, self.small_structure, batch) if self._norms else ([], [])

    def _learns(self, path: str) -> bool:
        return self.small.get_parameter(f"{path}.weight").requires_grad  # frozen weights stay as they are

    @cached_property
    def _weights_of(self) -> dict[str, Parameter]:
        """The matrices of the reference by the path of their module."""
        found = {spec.name.removesuffix(".weight"): spec for spec in self.reference_structure.parameters}
        return {path: spec for path, spec in found.items() if path != spec.name}

    def _targets(self, walk: Layerwise, paths: Sequence[str]) -> dict[str, list[Tensor]]:
        """Return the outputs of the reference at each module of a layer, by path: a tensor [N, K] for each batch."""
        targets: dict[str, list[Tensor]] = {path: [] for path in paths}
        for index, batch in enumerate(walk.batches):
            for path, seen in walk.look(index, paths, settle=True).items():
                side = self._weights_of[path].sides[0]
                rows = valid_rows(seen.sum, batch)
                targets[path].append(rows if side is None else rows[:, positions(side, self.plan.keep[side.group])])
        return targets

    def _refit(self, walk: Layerwise, paths: Sequence[str], targets: Mapping[str, Sequence[Tensor]]) -> None:
        """Fit what is missing in the outputs of some linear layers, and add it to them."""
        fits = {path: LeastSquares.of(self.small.get_submodule(path)) for path in paths}
        for index, batch in enumerate(walk.batches):
            for path, seen in walk.look(index, paths).items():
                sums = valid_rows(seen.sum, batch)
                missing = targets[path][index].to(sums) - sums
                fits[path].add(valid_rows(seen.inputs, batch), missing, self._weights(path, index))
        for path, fit in fits.items():
            fit.correct(self.small.get_submodule(path), None if self.everything else RIDGE)

    def _weights(self, path: str, index: int) -> Tensor | None:
        """Return the weights of the positions for a block's last projection; None for the layers that read."""
        spec = self._weights_of[path]
        weights = self.weights.get(spec.gate) if spec.gated and spec.gate is not None else None
        return None if weights is None else weights[index]

    def _refit_norm(self, walk: Layerwise, paths: Sequence[str], targets: Mapping[str, Sequence[Tensor]]) -> None:
        """Let a norm put out, in the dimensions that are left, what it did in the dense model, on average."""
        fit = AffineFit(len(self._hidden))
        for index, batch in enumerate(walk.batches):
            for path, seen in walk.look(index, paths).items():
                fit.add(valid_rows(seen.outputs, batch), targets[path][index])
        fit.correct(self.small.get_submodule(paths[0]))

    def _refit_outside(self, norms: Sequence[str], batches: Sequence[Batch]) -> None:
        """Refit norms outside of the layers, one after the other."""
        for path in norms:
            fit = AffineFit(len(self._hidden))
            for batch in batches:
                small, dense = (activations(model, [path], batch)[0][path] for model in (self.small, self.reference))
                wanted = valid_rows(dense.outputs, batch)
                fit.add(valid_rows(small.outputs, batch), wanted[:, self._hidden.to(wanted.device)])
            fit.correct(self.small.get_submodule(path))

    def _refit_head(self, batches: Sequence[Batch]) -> None:
        """Refit the linear layers after the last layer, each on what the ones before it give now."""
        paths = head_linears(self.small, self.small_structure, batches[0])
        targets = [activations(self.reference, paths, batch)[0] for batch in batches]
        for path in paths:
            module = self.small.get_submodule(path)
            if targets[0][path].outputs.shape[-1] != module.out_features:
                continue  # it writes hidden dimensions, of which some are gone
            fit = LeastSquares.of(module)
            for batch, wanted in zip(batches, targets, strict=True):
                seen = activations(self.small, [path], batch)[0][path]
                missing = wanted[path].outputs.to(seen.outputs) - seen.outputs
                fit.add(valid_rows(seen.inputs, batch), valid_rows(missing, batch))
            fit.correct(module)


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
    return _around(calls(model, [*paths, structure.layers[0]], batch), structure.layers[0])


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
    return _around(calls(model, [*paths, structure.layers[-1]], batch), structure.layers[-1])[1]


def _around(order: Sequence[str], path: str) -> tuple[list[str], list[str]]:
    """Return what is called before the first call of a module, and what after it; the second is empty without one."""
    place = order.index(path) if path in order else len(order)
    before, after = dict.fromkeys(order[:place]), dict.fromkeys(order[place:])
    return list(before), [each for each in after if each != path]
