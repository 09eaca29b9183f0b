"""Least-squares repair: what is left of a block learns to put out what the whole block put out.

From the bottom to the top, the last projection of every block that is left is refitted on the activations that
reach it now, through everything that was cut and repaired below, so that the residual stream after the block
comes as near as it can to the original's in the hidden dimensions that are kept (K-prune, Park et al., 2024,
arXiv:2308.03449). A ridge pulls towards the weights as they are, not towards zero: directions that the
synthetic inputs do not excite (dead units, constant inputs) stay as they were, and inputs of another distribution,
such as real text, are not paid for with a close fit to the synthetic ones.

Shapes: n inputs of a projection, K kept hidden dimensions, N positions of a batch that are not padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cofiprune.oneshot.activations import Batch, LayerWalk, Passage, Projection, projections, valid_rows
from cofiprune.plan import Plan
from cofiprune.structure import Structure

RIDGE = 0.3
"""Weight of the pull towards the weights as they are, relative to the mean squared input. With 30 and 60 % of
MiniLM-L6 removed, 0.3 comes nearest on synthetic inputs that the fit has not seen. Far less fits embeddings of
random tokens at the cost of those of real text: 0.001 can leave the latter worse than no repair does."""


class LeastSquares:
    """Statistics of a linear regression with a bias, gathered batch by batch in float64."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Start empty; memory is (inputs + 1) * (inputs + 1 + outputs) numbers, whatever the number of rows."""
        self.gram = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
        self.moment = torch.zeros(inputs + 1, outputs, dtype=torch.float64)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add rows.

        :param inputs: [N, n].
        :param targets: [N, K].
        """
        extended = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
        # Products of one batch in the inputs' own precision, sums in float64: seven digits are plenty beside the ridge.
        self.gram += (extended.T @ extended).cpu()
        self.moment += (extended.T @ targets).cpu()

    def solve(self, ridge: float, *, bias: bool = True) -> tuple[Tensor, Tensor] | None:
        """Return weight [K, n] and bias [K] of min ||X W^T + b - Y||^2 + ridge * mean(diag(X^T X)) * ||W||^2.

        Units that are always zero get zero weights; the bias is not penalised.

        :param bias: False fits W alone and returns a bias of zeros.
        :return: None when the statistics are not finite.
        """
        size = len(self.gram) - 1
        rows = float(self.gram[-1, -1])
        matrix, moment = (self.gram.clone(), self.moment) if bias else (self.gram[:-1, :-1].clone(), self.moment[:-1])
        # The tiny second term is for inputs that are zero throughout.
        matrix.diagonal()[:size] += ridge * self.gram.diagonal()[:-1].mean() + 1e-12 * max(rows, 1.0)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        solution = torch.cholesky_solve(moment, factor)
        if int(failed) or not bool(torch.isfinite(solution).all()):
            return None
        return solution[:size].T, solution[size] if bias else solution.new_zeros(solution.shape[1])

    def correct(self, module: nn.Linear, ridge: float) -> None:
        """Add the solution to a projection whose missing output was the target; nothing where there is none."""
        found = self.solve(ridge, bias=module.bias is not None)
        if found is None:
            return
        with torch.no_grad():
            for value, change in zip((module.weight, module.bias), found, strict=True):
                if value is not None:
                    value.copy_(value.cpu().double() + change)


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
    ridge: float = RIDGE

    def run(self, on_progress: Callable[[float], None] | None = None) -> None:
        """Refit the projections of the small model in place, from the bottom to the top.

        :param on_progress: called with the share done, in (0, 1].
        """
        whole = projections(self.reference, self.reference_structure)
        left = projections(self.small, self.small_structure)
        above = LayerWalk(self.reference, self.reference_structure, self.batches)
        walk = LayerWalk(self.small, self.small_structure, self.batches)
        layers = len(self.reference_structure.layers)
        for layer in range(layers):
            gates = [gate for gate in left if gate in whole and self.small_structure[gate].layer == layer]
            targets = self._targets(above, [whole[gate] for gate in gates])
            for gate in gates:
                self._refit(walk, left[gate], targets[gate])
            for index in range(len(walk.batches)):
                walk.look(index, settle=True)
            above.advance()
            walk.advance()
            if on_progress is not None:
                on_progress((layer + 1) / layers)

    def _targets(self, walk: LayerWalk, wanted: Sequence[Projection]) -> dict[str, list[Tensor]]:
        """What the reference gives after each block of a layer, by gate: a tensor [N, K] for each batch."""
        targets: dict[str, list[Tensor]] = {projection.block.gate: [] for projection in wanted}
        for index, batch in enumerate(walk.batches):
            for gate, passage in walk.look(index, wanted, settle=True).items():
                rows = valid_rows(passage.sum, batch)
                keep = self.plan.keep.get("hidden")
                targets[gate].append(rows if keep is None else rows[:, list(keep)])
        return targets

    def _refit(self, walk: LayerWalk, projection: Projection, targets: Sequence[Tensor]) -> None:
        """Fit what is missing in a block's output, and add it to the projection."""
        module = self.small.get_submodule(projection.module)
        assert isinstance(module, nn.Linear)
        fit = LeastSquares(module.in_features, module.out_features)
        for index, (batch, target) in enumerate(zip(walk.batches, targets, strict=True)):
            passage: Passage = walk.look(index, [projection])[projection.block.gate]
            sums = valid_rows(passage.sum, batch)
            fit.add(valid_rows(passage.inputs, batch), target.to(sums) - sums)
        fit.correct(module, self.ridge)
