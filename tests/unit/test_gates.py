"""The hard concrete distribution, and the module that holds one of them per unit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cofiprune.errors import SettingsError, StructureError
from cofiprune.gates import (
    COFI_INITIAL,
    COFI_LIMIT,
    Gates,
    deterministic,
    fully_open_limit,
    noise_generator,
    open_probability,
    sample,
)
from cofiprune.structure import Group
from small import rng
from waiting import never_waiting

GROUPS = (
    Group("hidden", 40, "hidden"),
    Group("layers.0.attention", 1, "attention", 0),
    Group("layers.0.heads", 4, "heads", 0),
    Group("layers.0.ffn", 1, "ffn", 0),
    Group("layers.0.intermediate", 100, "intermediate", 0),
    Group("layers.1.ffn", 1, "ffn", 1),
)
UNITS = sum(group.size for group in GROUPS)
SHAPES_OF_THE_DISTRIBUTION = [{}, {"temperature": 0.4, "stretch": (-0.3, 1.2)}]


def scattered(gates: Gates, seed: int = 0) -> Gates:
    with torch.no_grad():
        gates.log_alpha.copy_(torch.randn(len(gates.log_alpha), generator=rng(seed)) * 3)
    return gates


@pytest.mark.parametrize("settings", SHAPES_OF_THE_DISTRIBUTION)
def test_open_probability_is_the_frequency_of_open_gates(settings: dict[str, object]) -> None:
    log_alpha = torch.linspace(-6, 6, 13)
    draws = 40_000
    z = sample(log_alpha, torch.rand(draws, 13, generator=rng()), **settings)
    assert ((z >= 0) & (z <= 1)).all()
    probability = open_probability(log_alpha, **settings)
    five_deviations = 5 * (probability * (1 - probability) / draws).sqrt() + 1e-4
    assert (((z > 0).float().mean(0) - probability).abs() < five_deviations).all()


def test_gates_are_exactly_zero_and_exactly_one_with_positive_probability() -> None:
    z = sample(torch.zeros(10_000), torch.rand(10_000, generator=rng()))
    assert (z == 0).any()
    assert (z == 1).any()
    assert ((z > 0) & (z < 1)).any()


def test_noise_at_the_ends_of_its_range_gives_finite_gradients() -> None:
    log_alpha = torch.zeros(3, requires_grad=True)
    sample(log_alpha, torch.tensor([0.0, 0.5, 1.0])).sum().backward()
    assert log_alpha.grad is not None
    assert log_alpha.grad.isfinite().all()
    assert log_alpha.grad[1] > 0


@pytest.mark.parametrize("size", [1, 2, 12, 768])
@pytest.mark.parametrize("seed", range(5))
def test_deterministic_zeroes_as_many_as_are_expected_and_the_smallest(size: int, seed: int) -> None:
    log_alpha = torch.randn(size, generator=rng(seed)) * 3 - 1
    z = deterministic(log_alpha)
    zeros = round(size - open_probability(log_alpha.double()).sum().item())
    assert (z == 0).sum() == zeros
    assert set(z.nonzero().flatten().tolist()) == set(log_alpha.argsort()[zeros:].tolist())
    assert torch.equal(z[z > 0], torch.sigmoid(0.8 * log_alpha / (2 / 3))[z > 0])


@pytest.mark.parametrize(("probability", "units", "closed"), [(0.49, 1, 1), (0.51, 1, 0), (0.7, 10, 3)])
def test_equal_gates_lose_exactly_the_expected_number(probability: float, units: int, closed: int) -> None:
    log_alpha = torch.full((units,), math.log(probability / (1 - probability)) + 2 / 3 * math.log(0.1 / 1.1))
    assert open_probability(log_alpha).tolist() == pytest.approx([probability] * units)
    assert (deterministic(log_alpha) == 0).sum() == closed


@pytest.mark.parametrize("size", [1, 12, 123, 124, 768, 4096, 30_000])
def test_a_group_at_its_limit_is_fully_open(size: int) -> None:
    gates = Gates([Group("hidden", size, "hidden")])
    assert (gates.deterministic()["hidden"] > 0).all()
    assert size - gates.expected_sizes().item() < 0.3
    gates.clamp_()
    assert (gates.deterministic()["hidden"] > 0).all()


def test_the_original_could_not_open_all_hidden_dimensions() -> None:
    gates = Gates([Group("hidden", 768, "hidden")], initial=COFI_INITIAL, limit=COFI_LIMIT)
    assert (gates.deterministic()["hidden"] > 0).sum() == 766


def test_the_limit_is_the_originals_where_that_is_enough() -> None:
    assert fully_open_limit(123) == COFI_LIMIT == math.log(100)
    assert COFI_LIMIT < fully_open_limit(124) < fully_open_limit(125)


def test_flat_results_are_those_of_each_group() -> None:
    gates = scattered(Gates(GROUPS))
    locations = dict(zip(gates.sample(0, 0), gates.log_alpha.split([g.size for g in GROUPS]), strict=True))
    noise = torch.rand(UNITS, generator=noise_generator(3, 7, torch.device("cpu")))
    noises = dict(zip(locations, noise.split([g.size for g in GROUPS]), strict=True))
    drawn, evaluated = gates.sample(3, 7), gates.deterministic()
    assert list(drawn) == list(evaluated) == [group.name for group in GROUPS]
    for number, (name, location) in enumerate(locations.items()):
        assert torch.equal(drawn[name], sample(location, noises[name]))
        assert torch.equal(evaluated[name], deterministic(location))
        assert torch.isclose(gates.expected_sizes()[number], open_probability(location).sum())
    assert torch.equal(gates.open_probability(), open_probability(gates.log_alpha))


def test_gradients_of_expected_sizes_are_those_of_the_probabilities() -> None:
    gates = scattered(Gates(GROUPS))
    weights = torch.arange(1.0, len(GROUPS) + 1)
    (gates.expected_sizes() * weights).sum().backward()
    p = gates.open_probability().detach()
    per_unit = weights.repeat_interleave(torch.tensor([group.size for group in GROUPS]))
    assert gates.log_alpha.grad is not None
    assert torch.allclose(gates.log_alpha.grad, per_unit * p * (1 - p))


def test_noise_depends_on_seed_and_step_alone() -> None:
    def draw(seed: int, step: int) -> Tensor:
        torch.rand(3)  # the global generator has no part in it
        return torch.cat(list(scattered(Gates(GROUPS)).sample(seed, step).values()))

    assert torch.equal(draw(5, 8), draw(5, 8))
    different = {tuple(draw(seed, step).tolist()) for seed in (0, 1, 2, 1 << 40) for step in (0, 1, 2, 1 << 33)}
    assert len(different) == 16


def test_draws_reach_every_group_with_gradients_and_leave_the_global_generator_alone() -> None:
    gates = scattered(Gates(GROUPS))
    before = torch.random.get_rng_state()
    total = torch.stack([gates.sample(0, step)["hidden"].sum() for step in range(20)]).sum()
    assert torch.equal(before, torch.random.get_rng_state())
    total.backward()
    assert gates.log_alpha.grad is not None
    assert gates.log_alpha.grad[:40].abs().sum() > 0
    assert (gates.log_alpha.grad[40:] == 0).all()


def test_clamp_brings_every_gate_within_the_limit_of_its_group() -> None:
    gates = Gates([Group("hidden", 768, "hidden"), Group("layers.0.ffn", 1, "ffn", 0)])
    for sign in (1, -1):
        with torch.no_grad():
            gates.log_alpha.fill_(sign * 50.0)
        gates.clamp_()
        expected = torch.tensor([sign * fully_open_limit(768)] * 768 + [sign * COFI_LIMIT])
        assert torch.allclose(gates.log_alpha, expected)


def test_initial_values_go_by_kind() -> None:
    gates = Gates(GROUPS, initial={"intermediate": 0.0, "heads": -1.0})
    locations = dict(zip(gates.sample(0, 0), gates.log_alpha.split([g.size for g in GROUPS]), strict=True))
    assert (locations["layers.0.intermediate"] == 0).all()
    assert (locations["layers.0.heads"] == -1).all()
    assert torch.allclose(locations["hidden"], torch.tensor(COFI_LIMIT))


@pytest.mark.parametrize("ties", [False, True])
def test_importance_orders_the_gates_and_leaves_every_group_open(ties: bool) -> None:
    groups = [Group("hidden", 768, "hidden"), Group("layers.0.intermediate", 3072, "intermediate", 0)]
    importance = {group.name: torch.rand(group.size, generator=rng()) ** 4 for group in groups}
    if ties:
        importance = {name: (scores > 0.9).float() for name, scores in importance.items()}
    gates = Gates(groups)
    top = gates.log_alpha.detach().split([768, 3072])
    for _ in range(2):  # it starts from the initial values, however often
        gates.initialise_from(importance)
    for group, location, highest in zip(groups, gates.log_alpha.detach().split([768, 3072]), top, strict=True):
        order = importance[group.name].argsort()
        assert (location[order].diff() >= 0).all()
        assert torch.equal(location[order].diff() > 0, importance[group.name][order].diff() > 0)
        assert location.max() == highest.max()
        assert location.min() >= highest.min() - 1.0001
        assert (gates.deterministic()[group.name] > 0).all()


def test_importance_ranks_blocks_across_layers_and_skips_groups_that_it_lacks() -> None:
    gates = Gates(GROUPS)
    gates.initialise_from({"layers.0.ffn": torch.tensor([2.0]), "layers.1.ffn": torch.tensor([1.0])}, spread=0.5)
    shift = gates.log_alpha.detach() - Gates(GROUPS).log_alpha.detach()
    assert torch.allclose(shift, torch.tensor([0.0] * (UNITS - 1) + [-0.5]))
    gates.initialise_from({"hidden": torch.ones(40)})
    assert torch.equal(gates.log_alpha, Gates(GROUPS).log_alpha)


def test_state_dict_is_the_parameter_alone_and_comes_back(tmp_path: Path) -> None:
    gates = scattered(Gates(GROUPS))
    assert gates.log_alpha.dtype == torch.float32
    torch.save(gates.state_dict(), tmp_path / "gates.pt")
    again = Gates(GROUPS)
    again.load_state_dict(torch.load(tmp_path / "gates.pt", weights_only=True))
    assert list(again.state_dict()) == ["log_alpha"]
    assert torch.equal(again.log_alpha, gates.log_alpha)


@pytest.mark.parametrize(
    "settings",
    [
        {"groups": ()},
        {"groups": GROUPS[:1] * 2},
        {"temperature": 0.0},
        {"stretch": (0.0, 1.1)},
        {"stretch": (-0.1, 1.0)},
        {"limit": math.inf},
        {"limit": -1.0},
        {"initial": {"hidden": math.nan}},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        Gates(**({"groups": GROUPS} | settings))


def test_importance_that_does_not_fit_is_refused() -> None:
    gates = Gates(GROUPS)
    with pytest.raises(StructureError, match="Did you mean 'hidden'"):
        gates.initialise_from({"hiden": torch.ones(40)})
    with pytest.raises(StructureError, match="it has 40 units"):
        gates.initialise_from({"hidden": torch.ones(41)})
    with pytest.raises(SettingsError, match="not finite"):
        gates.initialise_from({"hidden": torch.full((40,), math.nan)})
    with pytest.raises(SettingsError, match="spread"):
        gates.initialise_from({}, spread=-1.0)


@pytest.mark.gpu
def test_nothing_in_a_step_waits_for_the_device() -> None:
    gates = scattered(Gates(GROUPS)).cuda()
    with never_waiting():
        (gates.expected_sizes().sum() + gates.sample(0, 0)["hidden"].sum()).backward()
        gates.clamp_()
        gates.deterministic()
