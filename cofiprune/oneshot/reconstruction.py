"""Least-squares repair: what is left of a model learns to put out, module by module, what the whole model put out.

From the bottom to the top, every linear map that is left is refitted on the inputs that reach it now, through
everything that was cut and repaired below. The last projection of a block aims at the residual stream after the block,
in the hidden dimensions that are kept (K-prune, Park et al., 2024, arXiv:2308.03449); the maps that read the stream
aim at what the same units read in the whole model; and the maps of the head at what the head computed. So an error
below is made up for wherever it can be. Biases take the means over (FLAP, An et al., 2024, arXiv:2312.11983).

Positions count by how much the answers depend on them: after the last attention block of a classifier only the first
one does. A ridge pulls towards the weights as they are, not towards zero: directions that no input excites (dead units,
constant inputs) stay as they were.

Shapes: n inputs of a map, K outputs, N positions of a batch that are not padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from cofiprune.compaction.slicing import positions
from cofiprune.oneshot.heads import repair_head
from cofiprune.oneshot.layerwise import Batch, LayerWalk, projections, readers, valid_rows
from cofiprune.oneshot.regression import LeastSquares
from cofiprune.oneshot.stream import AffineFit, norms_of, norms_outside, refit_outside
from cofiprune.plan import Plan
from cofiprune.structure import Structure

RIDGE = 0.3
"""Weight of the pull towards the weights as they are on synthetic inputs, relative to the mean squared input. With 30
and 60 % of MiniLM-L6 removed, 0.3 comes nearest on synthetic inputs that the fit has not seen. Far less fits embeddings
of random tokens at the cost of those of real text: 0.001 can leave the latter worse than no repair does."""


@dataclass(frozen=True)
class Repair:
    """A model that was cut, the model whose blocks it is to reproduce, and the inputs to do it on."""

    reference: nn.Module
    reference_structure: Structure
    small: nn.Module
    small_structure: Structure
    plan: Plan
    """What was cut, in terms of the reference."""
    batches: Sequence[Batch]
    ridge: float | None = RIDGE
    """None for the one that held-out rows choose, for each map."""
    weights: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    """How much the positions count, [N] for each batch, by gate; of blocks that are missing all count alike."""
    everything: bool = False
    """Whether the maps that read the stream, and those of the head, are refitted too."""

    def run(self, on_progress: Callable[[float], None] | None = None) -> None:
        """Refit the small model in place, from the bottom to the top.

        :param on_progress: called with the share done, in (0, 1].
        """
        above = LayerWalk(self.reference, self.reference_structure, self.batches)
        walk = LayerWalk(self.small, self.small_structure, self.batches)
        below, on_top = self._norms_outside(walk)
        refit_outside(self.reference, self.small, below, self._hidden, walk.batches)
        layers = len(self.reference_structure.layers)
        for layer in range(layers):
            wanted = self._maps(layer)
            targets = self._targets(above, [path for paths in wanted for path in paths])
            for paths in wanted:
                refit = self._refit_norm if paths[0] in self._norms else self._refit
                refit(walk, paths, targets)
            for index in range(len(walk.batches)):
                walk.look(index, settle=True)
            above.advance()
            walk.advance()
            if on_progress is not None:
                on_progress((layer + 1) / layers)
        refit_outside(self.reference, self.small, on_top, self._hidden, walk.batches)
        if self.everything:
            repair_head(self.reference, self.small, self.small_structure, walk.batches)

    def _maps(self, layer: int) -> list[list[str]]:
        """The maps of a layer that are refitted: those of each entry at once, one entry after the other."""
        whole, left = (
            projections(model, structure)
            for model, structure in ((self.reference, self.reference_structure), (self.small, self.small_structure))
        )
        found: list[list[str]] = []
        for block in self.small_structure.blocks:
            if self.small_structure[block.gate].layer != layer:
                continue
            norms = [[path] for path in norms_of(self.small_structure, block) if path in self._norms]
            if not block.exit.residual:
                found += norms
            if self.everything and not self._shares_layers:
                found.append([path for path in readers(self.small, self.small_structure, block) if self._learns(path)])
            if block.gate in left and block.gate in whole and self._learns(left[block.gate].module):
                found.append([left[block.gate].module])
            if block.exit.residual:
                found += norms
        return [paths for paths in found if paths]

    @cached_property
    def _hidden(self) -> Tensor:
        """The hidden dimensions of the reference that the small model has."""
        return torch.tensor(self.plan.keep.get("hidden", ()))

    @cached_property
    def _norms(self) -> set[str]:
        """The norms that are refitted: all of them where hidden dimensions are gone, else none."""
        whole = self.reference_structure.sizes.get("hidden", 0)
        return {norm.module for norm in self.small_structure.norms} if len(self._hidden) < whole else set()

    def _norms_outside(self, walk: LayerWalk) -> tuple[list[str], list[str]]:
        return norms_outside(self.small, self.small_structure, walk.batches[0]) if self._norms else ([], [])

    @property
    def _shares_layers(self) -> bool:
        """Whether one layer is applied many times: what it reads differs each time, and the walk sees the first."""
        layers = len(self.reference_structure.layers)
        return layers < getattr(getattr(self.reference, "config", None), "num_hidden_layers", layers)

    def _learns(self, path: str) -> bool:
        return self.small.get_parameter(f"{path}.weight").requires_grad  # frozen weights stay as they are

    def _targets(self, walk: LayerWalk, paths: Sequence[str]) -> dict[str, list[Tensor]]:
        """What the reference gives at each map of a layer, by path: a tensor [N, K] for each batch."""
        targets: dict[str, list[Tensor]] = {path: [] for path in paths}
        for index, batch in enumerate(walk.batches):
            for path, passage in walk.look(index, paths, settle=True).items():
                rows = valid_rows(passage.sum, batch)
                keep = self._kept_outputs(path)
                targets[path].append(rows if keep is None else rows[:, keep])
        return targets

    def _kept_outputs(self, path: str) -> Tensor | None:
        """Which outputs of a map the small model still has, None for all."""
        spec = next(spec for spec in self.reference_structure.parameters if spec.name == f"{path}.weight")
        side = spec.sides[0]
        return None if side is None else positions(side, self.plan.keep[side.group])

    def _refit(self, walk: LayerWalk, paths: Sequence[str], targets: Mapping[str, Sequence[Tensor]]) -> None:
        """Fit what is missing in the outputs of some maps, and add it to them."""
        modules = {path: self.small.get_submodule(path) for path in paths}
        fits = {path: LeastSquares(*reversed(module.weight.shape)) for path, module in modules.items()}  # type: ignore[arg-type]
        for index, batch in enumerate(walk.batches):
            for path, passage in walk.look(index, paths).items():
                sums = valid_rows(passage.sum, batch)
                missing = targets[path][index].to(sums) - sums
                fits[path].add(valid_rows(passage.inputs, batch), missing, self._weights(path, index))
        for path, module in modules.items():
            assert isinstance(module, nn.Linear)
            fits[path].correct(module, self.ridge)

    def _refit_norm(self, walk: LayerWalk, paths: Sequence[str], targets: Mapping[str, Sequence[Tensor]]) -> None:
        """Let a norm put out, in the dimensions that are left, what it did in the whole model, on average."""
        (path,) = paths
        fit = AffineFit(len(self._hidden))
        for index, batch in enumerate(walk.batches):
            for passage in walk.look(index, paths).values():
                fit.add(valid_rows(passage.outputs, batch), targets[path][index])
        fit.correct(self.small.get_submodule(path))

    def _weights(self, path: str, index: int) -> Tensor | None:
        """How much the positions count for a block's last projection; all alike for the maps that read."""
        spec = next(spec for spec in self.small_structure.parameters if spec.name == f"{path}.weight")
        if not spec.gated or spec.gate is None or spec.gate not in self.weights:
            return None
        return self.weights[spec.gate][index]
