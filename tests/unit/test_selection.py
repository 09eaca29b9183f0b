"""From scores to a plan: the sparsity asked for, the highest scores kept, or an error that says what is possible."""

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

import cofiprune
from cofiprune import accounting
from cofiprune.errors import TargetError
from cofiprune.selection.by_score import select
from cofiprune.selection.reachable import check_target, reachable
from cofiprune.selection.target import TOLERANCE, Target, check_fraction
from cofiprune.structure import UNIT_KINDS

CHOICES = [choice for size in range(1, 5) for choice in itertools.combinations(UNIT_KINDS, size)]
TARGETS = (0.01, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.95, 0.99)
SIZES = {
    "pico": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
    "small": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64},
    "wide": {"hidden_size": 120, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 480},
}


def parts(size, cls=BertModel):
    """Structure and cost of a model without weights."""
    with torch.device("meta"):
        model = cls(BertConfig(**SIZES[size], vocab_size=20, max_position_embeddings=8))
    structure = cofiprune.structure(model)
    return structure, accounting.layer_parameters(structure)


def scores_of(structure, units=None, seed=0, clamp=None):
    generator = torch.Generator().manual_seed(seed)
    found = {group.name: torch.randn(group.size, generator=generator) * 3 for group in structure.select(units)}
    return found if clamp is None else {name: value.clamp(-clamp, clamp) for name, value in found.items()}


def sparsity_of(structure, cost, plan):
    return accounting.sparsity(cost, structure, plan.kept)


@pytest.mark.parametrize("units", CHOICES, ids=" ".join)
@pytest.mark.parametrize("size", SIZES)
def test_every_target_is_met_or_refused_beforehand(units, size):
    structure, cost = parts(size)
    met = 0
    for number, target in enumerate(TARGETS):
        try:
            check_target(structure, Target.of(structure, target), units)
        except TargetError:
            continue
        met += 1
        # Saturated gates tie; a tie must not keep a target from being met.
        scores = scores_of(structure, units, seed=number, clamp=(None, 1.0, 0.0)[number % 3])
        plan = select(structure, scores, Target.of(structure, target))
        assert abs(sparsity_of(structure, cost, plan) - target) <= TOLERANCE
        for name, indices in plan.keep.items():
            gone = name not in scores and not indices  # with its block
            assert gone or name in scores or len(indices) == structure[name].size
    found = reachable(structure, cost, units)
    if found.fine:
        assert met == sum(target <= found.highest + TOLERANCE for target in TARGETS)


@pytest.mark.parametrize("units", CHOICES, ids=" ".join)
@pytest.mark.parametrize("size", ["pico", "small"])
def test_what_is_called_reachable_is(units, size):
    structure, cost = parts(size)
    found = reachable(structure, cost, units)
    everything = {group.name: torch.zeros(group.size) for group in structure.select(units)}
    if "hidden" in everything:
        everything["hidden"][0] = 1
    least = cofiprune.Plan.from_values(structure, everything)
    assert found.highest == pytest.approx(sparsity_of(structure, cost, least))
    levels = (
        [found.highest / 3, found.highest]
        if found.fine
        else [*found.levels[1 :: 1 + len(found.levels) // 5], found.levels[-1]]
    )
    for level in levels:
        check_target(structure, Target.of(structure, level), units)
        plan = select(structure, scores_of(structure, units), Target.of(structure, level))
        assert abs(sparsity_of(structure, cost, plan) - level) <= TOLERANCE


def test_levels_of_layers_are_those_counted_by_hand():
    structure, cost = parts("pico")
    attention = 4 * (8 * 8 + 8) + 2 * 8
    feed_forward = 2 * 8 * 8 + 8 + 8 + 2 * 8
    total = attention + feed_forward
    found = reachable(structure, cost, "layer")
    assert not found.fine
    wanted = sorted([0, attention / total, feed_forward / total, 1])
    assert found.levels == pytest.approx(wanted, abs=1e-4)
    assert found.nearest(0.5) == pytest.approx((feed_forward / total, attention / total), abs=1e-4)


def test_a_whole_model_is_fine_whatever_its_size():
    for size in ("small", "wide"):
        structure, cost = parts(size)
        found = reachable(structure, cost)
        assert found.fine
        assert found.highest == 1
        assert found.nearest(0.5) == (1.0,)


@pytest.mark.parametrize(
    ("units", "target", "words"),
    [
        ("head", 0.9, ["0.9", "units head", "bert", "removing all that can go gives"]),
        (("intermediate",), 0.9, ["units intermediate", "removing all"]),
        ("layer", 0.42, ["units layer", "large steps", "reachable next to it", " and ", "head, intermediate, hidden"]),
        ("hidden", 0.047, ["units hidden", "reachable next to it", "layer, head, intermediate"]),
    ],
)
def test_an_unreachable_target_says_what_is_reachable(units, target, words):
    structure, _ = parts("small")
    with pytest.raises(TargetError) as caught:
        check_target(structure, Target.of(structure, target), units)
    for word in words:
        assert word in str(caught.value)


def test_nothing_left_to_remove_is_an_error():
    model = BertModel(BertConfig(**SIZES["pico"], vocab_size=20, max_position_embeddings=8))
    structure = cofiprune.structure(model)
    gone = {name: torch.zeros(1) for name in structure if name.endswith((".attention", ".ffn"))}
    empty = cofiprune.structure(cofiprune.compact(model, cofiprune.Plan.from_values(structure, gone)))
    with pytest.raises(TargetError, match="nothing is left"):
        check_target(empty, Target.create("target_sparsity", 0.5, accounting.layer_parameters, 100))


@pytest.mark.parametrize("target", [0.5, 1e-9, 1 - 1e-9, np.float32(0.5), np.float64(0.25)])
def test_fractions(target):
    found = check_fraction(target)
    assert type(found) is float
    assert found == pytest.approx(float(target))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (95, ["95 % is target_sparsity=0.95"]),
        (99.5, ["99.5 % is target_sparsity=0.995"]),
        (100, ["(0, 1)", "got 100"]),
        (0, ["got 0"]),
        (1, ["got 1"]),
        (-0.1, ["got -0.1"]),
        (math.nan, ["got nan"]),
        (math.inf, ["got inf"]),
        (True, ["a number in (0, 1)", "True"]),
        ("0.9", ["a number in (0, 1)", "'0.9'"]),
        (None, ["a number in (0, 1)", "None"]),
        ([0.5], ["a number in (0, 1)"]),
        (torch.tensor(0.5), ["a number in (0, 1)"]),
    ],
)
def test_other_things_than_fractions(target, words):
    with pytest.raises(TargetError) as caught:
        check_fraction(target)
    for word in words:
        assert word in str(caught.value)


def test_a_higher_score_is_not_worse_within_a_group():
    structure, _ = parts("small")
    for seed in range(8):
        scores = scores_of(structure, seed=seed)
        plan = select(structure, scores, Target.of(structure, (0.3, 0.6, 0.8, 0.95)[seed % 4]))
        for name, kept in plan.keep.items():
            if kept and len(kept) < structure[name].size:
                inside = torch.zeros(structure[name].size, dtype=torch.bool)
                inside[list(kept)] = True
                assert scores[name][inside].min() >= scores[name][~inside].max(), name


def test_a_kept_unit_stays_when_its_score_rises_and_a_removed_one_when_it_falls():
    structure, _ = parts("small")
    scores = scores_of(structure, seed=5)
    plan = select(structure, scores, Target.of(structure, 0.6))
    generator = torch.Generator().manual_seed(1)
    for name, group in structure.items():
        unit = int(torch.randint(group.size, (), generator=generator))
        kept = unit in plan.keep[name]
        moved = {key: value.clone() for key, value in scores.items()}
        moved[name][unit] += 20 if kept else -20
        assert (unit in select(structure, moved, Target.of(structure, 0.6)).keep[name]) == kept, name


def test_a_higher_target_keeps_no_more():
    structure, cost = parts("wide")
    scores = scores_of(structure, seed=3)
    plans = [select(structure, scores, Target.of(structure, target)) for target in (0.2, 0.4, 0.6, 0.8)]
    kept = [cost.exact(plan.kept) for plan in plans]
    assert kept == sorted(kept, reverse=True)
    for low, high in itertools.pairwise(plans):
        for name in structure:
            assert len(set(high.keep[name]) - set(low.keep[name])) <= 0.05 * structure[name].size


def test_scores_that_speak_clearly_are_followed():
    structure, cost = parts("small")
    scores = {name: torch.full((group.size,), 3.0) for name, group in structure.items()}
    doomed = [name for name in structure if name.startswith("layers.1.")]
    for name in doomed:
        scores[name] -= 6
    share = 1 / 3
    plan = select(structure, scores, Target.of(structure, share))
    assert sparsity_of(structure, cost, plan) == pytest.approx(share)
    assert [name for name in structure if not plan.keep[name]] == doomed


def test_groups_without_scores_stay_whole():
    structure, _ = parts("small")
    scores = {"layers.0.intermediate": torch.arange(64.0)}
    plan = select(structure, scores, Target.of(structure, 0.1))
    assert [name for name in structure if len(plan.keep[name]) < structure[name].size] == ["layers.0.intermediate"]
    kept = plan.keep["layers.0.intermediate"]
    assert kept == tuple(range(64 - len(kept), 64))
    with pytest.raises(TargetError, match="nearest plan"):
        select(structure, scores, Target.of(structure, 0.9))


def test_values_are_folded_into_what_is_kept():
    structure, _ = parts("small")
    scores = scores_of(structure, seed=2)
    values = {name: torch.sigmoid(score) for name, score in scores.items()}
    plan = select(structure, scores, Target.of(structure, 0.6), values=values)
    assert plan.keep == select(structure, scores, Target.of(structure, 0.6)).keep
    for name, kept in plan.keep.items():
        assert plan.scale.get(name, ()) == pytest.approx(values[name].double()[list(kept)].tolist())
    # A kept unit whose value is 0 stays, unscaled: the plan decides, not the value.
    nothing = {name: torch.zeros_like(score) for name, score in scores.items()}
    assert select(structure, scores, Target.of(structure, 0.6), values=nothing).keep == plan.keep


def test_the_head_of_the_model_does_not_matter():
    plans = [select(s, scores_of(s), Target.of(s, 0.7)) for s, c in (parts("small"), parts("small", BertForMaskedLM))]
    assert plans[0].keep == plans[1].keep


def test_one_hidden_dimension_always_stays():
    structure, cost = parts("small")
    scores = scores_of(structure)
    scores["hidden"] -= 100
    plan = select(structure, scores, Target.of(structure, 0.97))
    assert len(plan.keep["hidden"]) >= 1
    assert abs(sparsity_of(structure, cost, plan) - 0.97) <= TOLERANCE
