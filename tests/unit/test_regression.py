"""Linear regression from statistics: what it recovers and leaves alone, and the ridge that held-out rows choose."""

from __future__ import annotations

import torch

from cofiprune.oneshot.regression import RIDGES, LeastSquares
from small import rng


def test_recovers_a_linear_map():
    inputs = torch.randn(200, 5, generator=rng(), dtype=torch.float64)
    weight, bias = torch.randn(3, 5, generator=rng(1), dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5])
    fit = LeastSquares(5, 3)
    for part in inputs.split(64):
        fit.add(part, part @ weight.T + bias)
    found = fit.solve(1e-12)
    torch.testing.assert_close(found[0], weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1], bias.double(), rtol=1e-6, atol=1e-6)


def test_dead_and_constant_inputs_are_harmless():
    inputs = torch.randn(50, 4, generator=rng())
    inputs[:, 1] = 0
    inputs[:, 2] = 3
    fit = LeastSquares(4, 2)
    fit.add(inputs, torch.ones(50, 2))
    weight, bias = fit.solve(0.1)
    assert torch.equal(weight[:, 1], torch.zeros(2, dtype=torch.float64))
    assert weight.abs().max() < 0.01
    torch.testing.assert_close(bias, torch.ones(2, dtype=torch.float64), rtol=0, atol=0.05)


def test_nothing_but_zeros():
    fit = LeastSquares(3, 2)
    fit.add(torch.zeros(10, 3), torch.ones(10, 2))
    weight, bias = fit.solve(0.1)
    assert not weight.any()
    torch.testing.assert_close(bias, torch.ones(2, dtype=torch.float64))


def test_without_a_bias():
    fit = LeastSquares(3, 2)
    fit.add(torch.eye(3), torch.ones(3, 2))
    weight, bias = fit.solve(1e-12, bias=False)
    torch.testing.assert_close(weight, torch.ones(2, 3, dtype=torch.float64))
    assert not bias.any()


def test_statistics_that_are_not_numbers_are_refused():
    fit = LeastSquares(3, 2)
    fit.add(torch.full((4, 3), torch.inf), torch.ones(4, 2))
    assert fit.solve(0.1) is None


def test_rows_count_by_their_weights():
    inputs = torch.randn(60, 3, generator=rng(), dtype=torch.float64)
    weight, other = (torch.randn(2, 3, generator=rng(seed), dtype=torch.float64) for seed in (1, 2))
    targets = torch.cat([inputs[:40] @ weight.T, inputs[40:] @ other.T])
    counted = torch.cat([torch.ones(40), torch.zeros(20)])
    weighted, twice, both = (LeastSquares(3, 2) for _ in range(3))
    weighted.add(inputs, targets, counted)
    torch.testing.assert_close(weighted.solve(1e-12)[0], weight, rtol=1e-6, atol=1e-6)
    twice.add(inputs, targets, 1 + counted)
    both.add(inputs, targets)
    both.add(inputs[:40], targets[:40])
    torch.testing.assert_close(twice.solve(0.1)[0], both.solve(0.1)[0])


def regression_with_noise(noise: float, rows: int) -> LeastSquares:
    generator = rng(3)
    weight = torch.randn(2, 30, generator=generator)
    fit = LeastSquares(30, 2)
    for _ in range(10):
        inputs = torch.randn(rows, 30, generator=generator)
        fit.add(inputs, inputs @ weight.T + noise * torch.randn(rows, 2, generator=generator))
    return fit


def test_held_out_rows_choose_a_weak_ridge_where_rows_are_many_and_a_strong_one_where_all_is_noise():
    assert regression_with_noise(0.01, rows=50).chosen_ridge() == RIDGES[0]
    assert regression_with_noise(100.0, rows=5).chosen_ridge() >= 1.0


def test_four_rows_leave_nothing_to_choose_by():
    fit = LeastSquares(3, 2)
    for _ in range(10):
        fit.add(torch.randn(4, 3, generator=rng()), torch.ones(4, 2))
    assert fit.chosen_ridge() == RIDGES[-1]
