"""The Lagrangian term, its multipliers and the target's ramp."""

from __future__ import annotations

import pytest
import torch

from cofiprune.constraint import Constraint, target_at
from cofiprune.errors import SettingsError, TargetError


@pytest.mark.parametrize(("start", "target"), [(0.0, 0.95), (0.3, 0.7), (0.8, 0.5)])
@pytest.mark.parametrize("start_step", [0, 25])
def test_the_ramp_is_linear_between_its_ends_and_flat_outside(start: float, target: float, start_step: int) -> None:
    ramp = [target_at(n, target=target, warmup_steps=10, start=start, start_step=start_step) for n in range(60)]
    assert all(value == start for value in ramp[: start_step + 1])
    assert all(value == target for value in ramp[start_step + 10 :])
    on_the_way = torch.tensor(ramp[start_step : start_step + 11])
    assert torch.allclose(on_the_way.diff(), torch.tensor((target - start) / 10), atol=1e-6)


def test_without_warm_up_the_target_holds_at_once() -> None:
    assert target_at(0, target=0.9, warmup_steps=0) == 0.9
    assert target_at(4, target=0.9, warmup_steps=0, start=0.1, start_step=5) == 0.1
    assert target_at(5, target=0.9, warmup_steps=0, start=0.1, start_step=5) == 0.9


def test_ramps_that_make_no_sense_are_refused() -> None:
    with pytest.raises(TargetError):
        target_at(0, target=1.5, warmup_steps=1)
    with pytest.raises(TargetError):
        target_at(0, target=0.5, warmup_steps=1, start=-0.1)
    with pytest.raises(SettingsError):
        target_at(0, target=0.5, warmup_steps=-1)


def test_multipliers_start_at_zero_and_put_no_pressure() -> None:
    sparsity = torch.tensor(0.1, requires_grad=True)
    term = Constraint()(sparsity, 0.9)
    term.backward()
    assert term == 0
    assert sparsity.grad == 0


def test_the_term_is_its_formula() -> None:
    constraint = Constraint()
    constraint.load_state_dict({"lambda_1": torch.tensor(-2.0), "lambda_2": torch.tensor(3.0)})
    assert torch.isclose(constraint(torch.tensor(0.3), 0.5), torch.tensor(-2 * -0.2 + 3 * 0.04))
    assert torch.equal(constraint(torch.tensor(0.3), 0.5), constraint(torch.tensor(0.3), torch.tensor(0.5)))


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_multipliers_ascend_while_the_rest_descends(optimiser: type[torch.optim.Optimizer]) -> None:
    constraint = Constraint()
    weight = torch.nn.Parameter(torch.tensor(1.0))
    steps = optimiser([{"params": [weight]}, constraint.ascent_group(0.05)], lr=0.05)
    (constraint(torch.tensor(0.2), 0.6) + weight.square()).backward()
    steps.step()
    assert weight < 1
    assert constraint.lambda_1 < 0  # falls while sparsity is short of the target, so that removing lowers the loss
    assert constraint.lambda_2 > 0


def test_the_saddle_point_meets_the_target_against_a_loss_that_pulls_away() -> None:
    constraint = Constraint()
    location = torch.nn.Parameter(torch.tensor(-4.0))
    optimiser = torch.optim.Adam([{"params": [location], "lr": 0.02}, constraint.ascent_group(0.02)])
    for step in range(1500):
        sparsity = location.sigmoid()
        (0.3 * sparsity + constraint(sparsity, target_at(step, target=0.8, warmup_steps=300))).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert abs(location.sigmoid().item() - 0.8) < 0.01
