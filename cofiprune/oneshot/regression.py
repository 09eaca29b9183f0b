"""Linear regression from statistics that are gathered batch by batch, with a ridge that held-out rows choose.

Shapes: n inputs, K outputs, N rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Weights of the pull towards no change among which held-out rows choose, relative to the mean squared input."""
AFFINE_RIDGE = 1e-3
"""Pull of the factors of a norm towards 1, relative to the mean variance of a dimension."""
HELD_OUT = 5
"""One part in so many of the rows of every batch, its last, is held out while the ridge is chosen, and counts
afterwards: hardly an example is in both parts."""


class LeastSquares:
    """Statistics of a weighted linear regression with a bias, in float64, apart for two parts of the rows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Start empty; memory is 2 * (inputs + 1) * (inputs + 1 + outputs) numbers, whatever the number of rows."""
        self.gram = torch.zeros(2, inputs + 1, inputs + 1, dtype=torch.float64)
        """Of what is fitted and what is held out; the bias last."""
        self.moment = torch.zeros(2, inputs + 1, outputs, dtype=torch.float64)
        self.held_out = 0.0
        """Sum of the squared targets that are held out."""

    @classmethod
    def of(cls, module: nn.Module) -> LeastSquares:
        """Start empty, with the numbers of inputs and outputs of a linear layer."""
        assert isinstance(module, nn.Linear)
        return cls(module.in_features, module.out_features)

    def add(self, inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> None:
        """Add the rows of a batch.

        :param inputs: [N, n].
        :param targets: [N, K].
        :param weights: [N], above 0, how much each row counts; None for 1.
        """
        extended = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
        weighted = extended if weights is None else extended * weights.to(extended).unsqueeze(1)
        fitted = len(inputs) - len(inputs) // HELD_OUT
        # Products of one batch in the inputs' own precision, sums in float64: seven digits are plenty beside the ridge.
        for part, rows in enumerate((slice(fitted), slice(fitted, None))):
            self.gram[part] += (weighted[rows].T @ extended[rows]).cpu()
            self.moment[part] += (weighted[rows].T @ targets[rows]).cpu()
        squares = targets[fitted:].double().square().sum(dim=1)
        self.held_out += float((squares if weights is None else squares * weights[fitted:].to(squares)).sum())

    def solve(self, ridge: float, *, bias: bool = True) -> tuple[Tensor, Tensor] | None:
        """Return weight [K, n] and bias [K] of min ||X W^T + b - Y||^2 + ridge * mean(diag(X^T X)) * ||W||^2.

        Units that are always zero get zero weights; the bias is not penalised.

        :param bias: False fits W alone and returns a bias of zeros.
        :return: None when the statistics are not finite.
        """
        solution = _solved(self.gram.sum(dim=0), self.moment.sum(dim=0), ridge, bias=bias)
        return None if solution is None else (solution[:-1].T, solution[-1])

    def chosen_ridge(self, *, bias: bool = True) -> float:
        """The ridge whose fit to one part of the rows does best on the other; the strongest where that is empty."""
        best, chosen = float("inf"), RIDGES[-1]
        both = bool((self.gram[:, -1, -1] > 0).all())  # the sum of the rows' weights
        for ridge in RIDGES if both else ():
            solution = _solved(self.gram[0], self.moment[0], ridge, bias=bias)
            if solution is None:
                continue
            fit = float((solution * (self.gram[1] @ solution)).sum()) - 2 * float((solution * self.moment[1]).sum())
            if self.held_out + fit < best:
                best, chosen = self.held_out + fit, ridge
        return chosen

    def correct(self, module: nn.Module, ridge: float | None = None) -> None:
        """Add the solution to a linear layer whose missing output was the target; nothing where there is none.

        :param ridge: None for the one that held-out rows choose.
        """
        assert isinstance(module, nn.Linear)
        bias = module.bias is not None
        found = self.solve(self.chosen_ridge(bias=bias) if ridge is None else ridge, bias=bias)
        if found is None:
            return
        with torch.no_grad():
            for value, change in zip((module.weight, module.bias), found, strict=True):
                if value is not None:
                    value.copy_(value.cpu().double() + change)


def _solved(gram: Tensor, moment: Tensor, ridge: float, *, bias: bool) -> Tensor | None:
    """Weights and, last, biases [n + 1, K]; None when they are not finite."""
    size = len(gram) - 1
    rows = float(gram[-1, -1])
    matrix, right = (gram.clone(), moment) if bias else (gram[:-1, :-1].clone(), moment[:-1])
    # The tiny second term is for inputs that are zero throughout.
    matrix.diagonal()[:size] += ridge * gram.diagonal()[:-1].mean() + 1e-12 * max(rows, 1.0)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return None
    solution = torch.cholesky_solve(right, factor)
    if not bool(torch.isfinite(solution).all()):
        return None
    return solution if bias else torch.cat([solution, solution.new_zeros(1, solution.shape[1])])


class AffineFit:
    """A regression of each dimension on itself: a factor and a shift, from sums over batches."""

    def __init__(self, width: int) -> None:
        """Start empty, for so many dimensions."""
        self.rows = 0
        self.sums = torch.zeros(4, width, dtype=torch.float64)

    def add(self, given: Tensor, wanted: Tensor) -> None:
        """Add the rows of a batch: [N, H] as it is, and as it should be."""
        given, wanted = given.double().cpu(), wanted.double().cpu()
        self.rows += len(given)
        self.sums += torch.stack([part.sum(dim=0) for part in (given, wanted, given.square(), given * wanted)])

    def correct(self, norm: nn.Module) -> None:
        """Put the factors and shifts into a norm's weight and bias, as far as it has them and they learn."""
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        if not self.rows or weight is None or not weight.requires_grad:
            return
        given, wanted, squares, products = self.sums / self.rows
        shifts = bias is not None and bias.requires_grad
        variance, covariance = (squares - given.square(), products - given * wanted) if shifts else (squares, products)
        pull = AFFINE_RIDGE * variance.mean() + torch.finfo(torch.float64).tiny
        factor = (covariance + pull) / (variance + pull)
        if not bool(factor.isfinite().all()):
            return
        with torch.no_grad():
            weight.mul_(factor.to(weight))
            if bias is not None and shifts:
                bias.mul_(factor.to(bias)).add_((wanted - factor * given).to(bias))
