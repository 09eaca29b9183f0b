"""Curves of structured optimal brain surgery: what a removal costs is what the best repair cannot put back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cofiprune.oneshot.loss_curves import Moments, curve
from cofiprune.oneshot.sensitivity import Sensitivity
from cofiprune.structure import Side
from small import rng


@pytest.fixture(autouse=True)
def the_same_weights():
    torch.manual_seed(0)


def moments_of(inputs, gradients, batches=4):
    found = Moments(inputs.shape[1], gradients.shape[1])
    for rows, derivatives in zip(inputs.chunk(batches), gradients.chunk(batches), strict=True):
        found.add(Sensitivity(rows, derivatives, torch.ones(len(rows))))
    return found


def refitted_loss(module, moments, gone):
    """Half of min over D of tr(G D A D^T), D taking the columns `gone` to zero, by solving for the other columns."""
    inputs, outputs = moments.factors()
    weight = torch.cat([module.weight, module.bias.unsqueeze(1)], dim=1).detach().double()
    stays = torch.ones(len(inputs), dtype=torch.bool)
    stays[gone] = False
    change = torch.zeros_like(weight)
    change[:, gone] = -weight[:, gone]
    right = inputs[stays][:, gone] @ weight[:, gone].T
    change[:, stays] = torch.linalg.solve(inputs[stays][:, stays], right).T
    return float((outputs @ change @ inputs * change).sum()) / 2


@pytest.mark.parametrize("block", [1, 3])
def test_losses_are_what_the_best_refit_cannot_put_back(block):
    units = 6
    generator = rng()
    inputs = torch.randn(400, units * block, generator=generator) @ torch.randn(
        units * block, units * block, generator=generator
    )
    moments = moments_of(inputs, torch.randn(400, 5, generator=generator))
    module = nn.Linear(units * block, 5)
    found = curve({module: moments}, Side("x", units, block=block))
    assert sorted(found.order) == list(range(units))
    for count in range(1, units + 1):
        gone = [unit * block + part for unit in found.order[:count] for part in range(block)]
        assert found.loss[count - 1] == pytest.approx(refitted_loss(module, moments, gone), rel=1e-6)


def test_units_that_lie_in_several_copies_are_put_together():
    generator = rng(2)
    inputs, gradients = torch.randn(300, 12, generator=generator), torch.randn(300, 4, generator=generator)
    module, together = nn.Linear(12, 4), nn.Linear(12, 4)
    by_unit = torch.arange(12).view(2, 3, 2).transpose(0, 1).flatten()
    with torch.no_grad():
        together.weight.copy_(module.weight[:, by_unit])
        together.bias.copy_(module.bias)
    found = curve({module: moments_of(inputs, gradients)}, Side("x", 3, copies=2, block=2))
    same = curve({together: moments_of(inputs[:, by_unit], gradients)}, Side("x", 3, block=4))
    assert found.order == same.order
    assert found.loss == pytest.approx(same.loss, rel=1e-4)  # sums of float32 in another order


def test_the_first_unit_to_go_is_the_cheapest_of_all():
    generator = rng(1)
    moments = moments_of(torch.randn(300, 8, generator=generator), torch.randn(300, 4, generator=generator))
    torch.manual_seed(0)
    module = nn.Linear(8, 4)
    found = curve({module: moments}, Side("x", 8))
    alone = [refitted_loss(module, moments, [unit]) for unit in range(8)]
    assert alone[found.order[0]] == min(alone)


def test_of_two_units_that_say_the_same_only_one_goes_cheaply():
    torch.manual_seed(0)
    inputs = torch.randn(500, 4, generator=rng())
    inputs[:, 1] = inputs[:, 0]
    moments = moments_of(inputs, torch.randn(500, 3, generator=rng(1)))
    module = nn.Linear(4, 3)
    nn.init.ones_(module.weight)
    found = curve({module: moments}, Side("x", 4))
    assert found.order[0] in (0, 1)
    assert found.order[1] in (2, 3)
    assert found.loss[0] < 0.01 * found.loss[1]


def test_dead_and_constant_inputs_cost_next_to_nothing():
    inputs = torch.randn(500, 5, generator=rng())
    inputs[:, 1], inputs[:, 3] = 0, 2.5
    moments = moments_of(inputs, torch.randn(500, 3, generator=rng(1)))
    module = nn.Linear(5, 3)
    nn.init.ones_(module.weight)  # the ridge costs a little by the size of the weights: the same for every input
    found = curve({module: moments}, Side("x", 5))
    assert set(found.order[:2]) == {1, 3}
    assert found.loss[1] < 1e-2 * found.loss[2]
    assert all(0 <= loss < float("inf") for loss in found.loss)


def test_answers_that_do_not_depend_on_a_block_let_all_of_it_go():
    moments = moments_of(torch.randn(50, 4, generator=rng()), torch.zeros(50, 3))
    found = curve({nn.Linear(4, 3): moments}, Side("x", 4))
    assert found.loss[-1] == pytest.approx(0, abs=1e-20)
