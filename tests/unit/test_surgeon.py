"""Curves of structured optimal brain surgery: what a removal costs is what the best repair cannot put back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cofiprune.oneshot.budgeting import Option, give_up, savings
from cofiprune.oneshot.loss_curves import Curve, Moments, curve
from cofiprune.oneshot.sensitivity import Passed
from cofiprune.structure import Side


@pytest.fixture(autouse=True)
def the_same_weights():
    torch.manual_seed(0)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def moments_of(inputs, gradients, batches=4):
    found = Moments(inputs.shape[1], gradients.shape[1])
    for rows, derivatives in zip(inputs.chunk(batches), gradients.chunk(batches), strict=True):
        found.add(Passed(rows, derivatives, torch.ones(len(rows))))
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
    found = curve(module, moments, Side("x", units, block=block))
    assert sorted(found.order) == list(range(units))
    for count in range(1, units + 1):
        gone = [unit * block + part for unit in found.order[:count] for part in range(block)]
        assert found.losses[count - 1] == pytest.approx(refitted_loss(module, moments, gone), rel=1e-6)


def test_units_that_lie_in_several_copies_are_put_together():
    generator = rng(2)
    inputs, gradients = torch.randn(300, 12, generator=generator), torch.randn(300, 4, generator=generator)
    module, together = nn.Linear(12, 4), nn.Linear(12, 4)
    by_unit = torch.arange(12).view(2, 3, 2).transpose(0, 1).flatten()
    with torch.no_grad():
        together.weight.copy_(module.weight[:, by_unit])
        together.bias.copy_(module.bias)
    found = curve(module, moments_of(inputs, gradients), Side("x", 3, copies=2, block=2))
    same = curve(together, moments_of(inputs[:, by_unit], gradients), Side("x", 3, block=4))
    assert found.order == same.order
    assert found.losses == pytest.approx(same.losses, rel=1e-4)  # sums of float32 in another order


def test_the_first_unit_to_go_is_the_cheapest_of_all():
    generator = rng(1)
    moments = moments_of(torch.randn(300, 8, generator=generator), torch.randn(300, 4, generator=generator))
    torch.manual_seed(0)
    module = nn.Linear(8, 4)
    found = curve(module, moments, Side("x", 8))
    alone = [refitted_loss(module, moments, [unit]) for unit in range(8)]
    assert alone[found.order[0]] == min(alone)


def test_of_two_units_that_say_the_same_only_one_goes_cheaply():
    torch.manual_seed(0)
    inputs = torch.randn(500, 4, generator=rng())
    inputs[:, 1] = inputs[:, 0]
    moments = moments_of(inputs, torch.randn(500, 3, generator=rng(1)))
    module = nn.Linear(4, 3)
    nn.init.ones_(module.weight)
    found = curve(module, moments, Side("x", 4))
    assert found.order[0] in (0, 1)
    assert found.order[1] in (2, 3)
    assert found.losses[0] < 0.01 * found.losses[1]


def test_dead_and_constant_inputs_cost_next_to_nothing():
    inputs = torch.randn(500, 5, generator=rng())
    inputs[:, 1], inputs[:, 3] = 0, 2.5
    moments = moments_of(inputs, torch.randn(500, 3, generator=rng(1)))
    module = nn.Linear(5, 3)
    nn.init.ones_(module.weight)  # the ridge costs a little by the size of the weights: the same for every input
    found = curve(module, moments, Side("x", 5))
    assert set(found.order[:2]) == {1, 3}
    assert found.losses[1] < 1e-2 * found.losses[2]
    assert all(0 <= loss < float("inf") for loss in found.losses)


def test_answers_that_do_not_depend_on_a_block_let_all_of_it_go():
    moments = moments_of(torch.randn(50, 4, generator=rng()), torch.zeros(50, 3))
    found = curve(nn.Linear(4, 3), moments, Side("x", 4))
    assert found.losses[-1] == pytest.approx(0, abs=1e-20)


def test_the_budget_goes_where_it_costs_least():
    cheap, dear = Curve((0, 1, 2), (1.0, 2.0, 9.0)), Curve((2, 0, 1), (4.0, 8.0, 12.0))
    options = {"cheap": Option(cheap, (0, 1, 2, 3)), "dear": Option(dear, (0, 1, 2, 3))}
    assert give_up(options, 2) == {"cheap": 2, "dear": 0}
    assert give_up(options, 4) == {"cheap": 2, "dear": 2}
    assert give_up(options, 5.4) == {"cheap": 2, "dear": 3}
    assert give_up(options, 100) == {"cheap": 3, "dear": 3}


def test_a_block_goes_as_a_whole_where_its_last_units_bring_less_than_they_cost():
    # The last unit takes the block's own cost with it.
    options = {
        "block": Option(Curve((0, 1), (3.0, 3.1)), (0, 1, 4)),
        "other": Option(Curve((0, 1, 2, 3), (1.5, 3.0, 4.5, 6.0)), (0, 1, 2, 3, 4)),
    }
    assert give_up(options, 4) == {"block": 2, "other": 0}


def test_what_does_not_fit_is_filled_with_smaller_units():
    options = {
        "large": Option(Curve((0, 1), (0.1, 0.2)), (0, 10, 20)),
        "small": Option(Curve(tuple(range(9)), tuple(range(1, 10))), tuple(range(10))),
    }
    assert give_up(options, 17) == {"large": 1, "small": 7}
    assert give_up(options, 19.6) == {"large": 1, "small": 9}
    assert give_up({"large": options["large"]}, 17) == {"large": 2}


def test_savings_count_the_drop_to_none():
    assert savings(lambda units: 10 + 3 * units if units else 0, 3) == [0, 3, 6, 19]
    assert savings(lambda units: 5 if units else 0, 1) == [0, 5]
