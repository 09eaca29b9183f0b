"""One shot on data: the budget is kept, a repaired model is nearer to the whole one, and what is passed in stays."""

from __future__ import annotations

import copy

import pytest
import torch

from cofiprune import accounting, compact
from cofiprune.adapter import structure as structure_of
from cofiprune.errors import DataError
from cofiprune.oneshot import with_data
from cofiprune.oneshot.layerwise import valid_rows
from cofiprune.oneshot.with_data import RoundPruning, calibration, can_start
from cofiprune.plan import Plan
from cofiprune.selection.target import Target
from small import (
    assert_no_trace,
    build,
    cost_of,
    is_unchanged,
    padded,
    padded_batches,
    parameters_of_layers,
    snapshot,
    trace,
)

INNER = ("head", "intermediate")


def bert(name="BertForSequenceClassification", **settings):
    return build(name, **{"intermediate_size": 48, "num_labels": 3, **settings}).eval()


def pruned(model, target=0.5, *, units=None, batches=None, seed=0):
    structure, batches = structure_of(model), padded_batches(model) if batches is None else batches
    return RoundPruning(model, structure, batches, Target.of(structure, target), units=units, seed=seed).run()


def check_budget(model, plan, target):
    """What is kept is what the target leaves, to within the most expensive unit that the method cuts."""
    structure, cost = cost_of(model)
    sizes = structure.sizes
    whole = cost.exact(sizes)
    largest_unit = max(whole - cost.exact({**sizes, b.inner: sizes[b.inner] - 1}) for b in structure.blocks)
    assert abs(cost.exact(plan.kept) - (1 - target) * whole) <= largest_unit


@pytest.mark.parametrize("units", [None, INNER, ("layer", *INNER)], ids=str)
@pytest.mark.parametrize("target", [0.05, 0.3, 0.5, 0.8])
def test_what_is_kept_is_the_budget_within_a_unit(units, target):
    model = bert(num_hidden_layers=3)
    structure, cost = cost_of(model)
    plan, small = pruned(model, target, units=units)
    check_budget(model, plan, target)
    assert cost.exact(plan.kept) == parameters_of_layers(small, structure)


def test_the_small_model_has_the_plans_shapes_and_the_hidden_size_stays():
    model = bert()
    plan, small = pruned(model, 0.6)
    assert plan.kept["hidden"] == 24
    assert {name: size for name, size in plan.kept.items() if size} == structure_of(small).sizes
    shapes = {name: value.shape for name, value in compact(model, plan).state_dict().items()}
    assert {name: value.shape for name, value in small.state_dict().items()} == shapes
    assert not plan.scale


def without_effect(model, layer):
    """Let a feed-forward block put out nothing, so that none of its units matters."""
    with torch.no_grad():
        model.bert.encoder.layer[layer].output.dense.weight.zero_()
    return model


def test_a_block_goes_only_when_blocks_may_go():
    model = without_effect(bert(num_hidden_layers=3), 1)
    emptied = {units: pruned(model, 0.4, units=units)[0].keep["layers.1.ffn"] for units in (None, ("layer", *INNER))}
    assert set(emptied.values()) == {()}
    plan, small = pruned(model, 0.4, units=INNER)
    assert plan.keep["layers.1.ffn"] == (0,)
    assert plan.kept["layers.1.intermediate"] == 1
    assert structure_of(small)["layers.1.intermediate"].size == 1
    assert all(plan.keep[block.gate] for block in structure_of(model).blocks)


def test_units_without_effect_go_first():
    model = bert()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[:, :10] = 0
        model.bert.encoder.layer[1].attention.self.value.weight[6:12] = 0
        model.bert.encoder.layer[1].attention.self.value.bias[6:12] = 0
    plan, _ = pruned(model, 0.2)
    assert not set(plan.keep["layers.0.intermediate"]) & set(range(10))
    assert 1 not in plan.keep["layers.1.heads"]


@pytest.mark.parametrize(("units", "other"), [("head", "intermediate"), ("intermediate", "head")])
def test_one_kind_alone_leaves_the_other_whole(units, other):
    model = bert()
    plan, _ = pruned(model, 0.2, units=units)
    for group in structure_of(model).groups:
        if group.unit in (other, "layer", "hidden"):
            assert plan.kept[group.name] == group.size
    check_budget(model, plan, 0.2)


def test_there_is_something_to_do_where_there_are_heads_or_feed_forward_dimensions():
    structure = structure_of(bert())
    for units in (None, "head", ("intermediate",), ("layer", "head")):
        assert can_start(structure, units)
    for units in ("hidden", ("layer",), ("layer", "hidden")):
        assert not can_start(structure, units)
    gone = Plan.from_values(structure, {block.gate: torch.zeros(1) for block in structure.blocks})
    assert not can_start(structure_of(compact(bert(), gone)), None)


def residual_distances(model, small, batches):
    """Mean squared distance of the states after every layer, over tokens that are no padding."""
    found = []
    with torch.no_grad():
        for batch in batches:
            states = [each(**batch, output_hidden_states=True).hidden_states[1:] for each in (model, small)]
            rows = [(valid_rows(a, batch) - valid_rows(b, batch)).square().mean() for a, b in zip(*states, strict=True)]
            found.append(torch.stack(rows))
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", [0.3, 0.6])
def test_repair_brings_the_residual_stream_nearer_to_the_whole_models(dtype, target):
    model = bert(num_hidden_layers=3).to(dtype)
    plan, small = pruned(model, target, units=INNER, batches=padded_batches(model, 16))
    cut = compact(model, plan)
    seen, unseen = padded_batches(model, 16), padded_batches(model, 4, seed=77)
    assert {value.dtype for value in small.parameters()} == {dtype}
    for batches in (seen, unseen):
        repaired, unrepaired = (residual_distances(model, each, batches) for each in (small, cut))
        assert (repaired < unrepaired).all()
        assert repaired[-1] < 0.9 * unrepaired[-1]


def changed_modules(model, plan, small):
    before, after = snapshot(compact(model, plan)), snapshot(small)
    return {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}


def test_linear_maps_learn_and_norms_and_embeddings_stay():
    model = bert()
    plan, small = pruned(model, 0.5)
    linear = {name for name, module in small.named_modules() if isinstance(module, torch.nn.Linear)}
    changed = changed_modules(model, plan, small)
    assert changed <= linear
    assert {"bert.pooler.dense", "classifier", "bert.encoder.layer.1.attention.output.dense"} <= changed


def test_without_repair_nothing_learns():
    model = bert()
    target = Target.of(structure_of(model), 0.5)
    plan, small = RoundPruning(model, structure_of(model), padded_batches(model), target, reconstruct=False).run()
    assert not changed_modules(model, plan, small)


def test_tables_that_are_tied_to_the_embeddings_stay():
    model = bert("BertForMaskedLM")
    plan, small = pruned(model, 0.5)
    changed = changed_modules(model, plan, small)
    assert "cls.predictions.transform.dense" in changed
    assert not any(name.endswith(("word_embeddings", "decoder")) for name in changed)


def test_frozen_projections_stay_as_they_are():
    model = bert()
    frozen = "bert.encoder.layer.0.output.dense"
    model.get_submodule(frozen).requires_grad_(False)
    plan, small = pruned(model, 0.5, units=INNER)
    cut = compact(model, plan)
    for name in ("weight", "bias"):
        assert torch.equal(small.get_parameter(f"{frozen}.{name}"), cut.get_parameter(f"{frozen}.{name}"))
        assert not small.get_parameter(f"{frozen}.{name}").requires_grad
    other = "bert.encoder.layer.1.output.dense.weight"
    assert not torch.equal(small.get_parameter(other), cut.get_parameter(other))


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "ForMaskedLM", "Model"])
def test_padding_and_what_stands_there_do_not_matter(head):
    model = bert(f"Bert{head}")
    batches = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in padded_batches(model)]
    longer = [[padded(batch, 30, fill=fill) for batch in batches] for fill in (7, 11)]
    # Noise is drawn for padding too, where every token has a prediction.
    given = (batches, longer[0]) if head == "ForSequenceClassification" else longer
    (plan, small), (again, other) = (pruned(model, 0.5, batches=each) for each in given)
    assert plan == again
    after = snapshot(other)
    for name, value in snapshot(small).items():
        torch.testing.assert_close(value, after[name], rtol=1e-9, atol=1e-9)


def test_the_model_that_is_passed_in_stays_as_it_is():
    model = bert()
    model.classifier.bias.requires_grad_(False)
    before = trace(model)
    pruned(model, 0.5)
    assert_no_trace(model, before)


def test_a_compacted_model_is_pruned_further():
    whole = bert(num_hidden_layers=3)
    structure = structure_of(whole)
    values = {name: torch.ones(group.size) for name, group in structure.items()}
    values["hidden"][::4] = 0
    values["layers.0.heads"][1:3] = 0
    values["layers.1.attention"][0] = 0
    values["layers.2.ffn"][0] = 0
    model = compact(whole, Plan.from_values(structure, values))
    plan, small = pruned(model, 0.4)
    plan.check(structure_of(model))
    check_budget(model, plan, 0.4)
    assert structure_of(small)["hidden"].size == 18
    repaired, cut = (residual_distances(model, each, padded_batches(model)) for each in (small, compact(model, plan)))
    assert repaired[-1] < cut[-1]


def test_attention_goes_as_a_whole_where_layers_may_and_heads_may_not():
    model = bert(num_hidden_layers=3)
    plan, _ = pruned(model, 0.8, units=("layer", "intermediate"))
    check_budget(model, plan, 0.8)
    assert {plan.kept[f"layers.{layer}.heads"] for layer in range(3)} == {0, 4}


def test_round_sizes_are_met_in_rounds():
    model = bert(num_hidden_layers=3, intermediate_size=160)
    structure, cost = cost_of(model)
    target = Target.of(structure, 0.8, round_to=2)
    plan, small = RoundPruning(model, structure, padded_batches(model), target).run()
    assert accounting.sparsity(cost, structure, plan.kept) == pytest.approx(0.8, abs=target.tolerance)
    for layer in range(3):
        assert plan.kept[f"layers.{layer}.intermediate"] % 2 == 0
    found = structure_of(small)
    assert target.kept_share(found) == pytest.approx(0.2, abs=target.tolerance)


def test_costs_that_are_not_linear_are_met_in_rounds():
    """Each block costs by itself and units less than in proportion; every round decides by the same cost."""

    class Rooted:
        linear = False

        def __init__(self, structure):
            self.structure = structure

        def exact(self, kept):
            blocks = [block for block in self.structure.blocks if kept[block.gate]]
            return sum(round(1000 + 1000 * (kept[block.inner] / SIZE[block.inner]) ** 0.5) for block in blocks)

        def along(self, kept, name, counts):
            return [self.exact({**kept, name: count}) for count in counts]

    model = bert(num_hidden_layers=3)
    structure = structure_of(model)
    SIZE = structure.sizes
    target = Target.create("target_sparsity", 0.6, Rooted, Rooted(structure).exact(structure.sizes))
    plan, small = RoundPruning(model, structure, padded_batches(model), target).run()
    assert target.kept_share(structure_of(small)) == pytest.approx(0.4, abs=target.tolerance)
    assert Rooted(structure).exact(plan.kept) / target.total == pytest.approx(0.4, abs=target.tolerance)


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForMaskedLM", "Model"])
def test_a_model_with_one_layer_and_any_head(head):
    model = bert(f"Bert{head}", num_hidden_layers=1)
    plan, small = pruned(model, 0.5, units=INNER)
    check_budget(model, plan, 0.5)
    with torch.no_grad():
        assert all(torch.isfinite(part).all() for part in small(**padded_batches(model, 1)[0]).to_tuple())


def test_the_seed_decides():
    model = bert()
    (plan, small), (again, same) = (pruned(copy.deepcopy(model), 0.5, seed=3) for _ in range(2))
    assert plan == again
    assert is_unchanged(small, snapshot(same))


def test_statistics_that_are_not_finite_are_refused_by_name():
    model = bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.value.bias[3] = torch.inf
    with pytest.raises(DataError, match=r"encoder\.layer\.1\.attention\.output\.dense .* not finite"):
        pruned(model, 0.5)


def test_dead_units_and_constant_inputs_do_no_harm():
    model = bert()
    with torch.no_grad():
        layer = model.bert.encoder.layer[0]
        layer.intermediate.dense.weight[:12] = 0  # constant
        layer.intermediate.dense.bias[:6] = 0  # and dead: gelu(0) = 0
    plan, small = pruned(model, 0.3)
    assert all(torch.isfinite(value).all() for value in small.state_dict().values())
    assert not set(plan.keep["layers.0.intermediate"]) & set(range(12))


def test_progress_rises_to_one():
    model = bert(num_hidden_layers=3)
    told = []
    structure = structure_of(model)
    RoundPruning(model, structure, padded_batches(model), Target.of(structure, 0.8)).run(told.append)
    assert told == sorted(set(told))
    assert len(told) == 2 * 3  # sweeps and layers
    assert told[-1] == 1


def test_calibration_takes_as_much_as_is_needed_and_no_labels(monkeypatch):
    model = bert()
    rows = [{**batch, "labels": torch.zeros(8, dtype=torch.long)} for batch in padded_batches(model, 6)]
    taken = calibration(model, structure_of(model), rows)
    assert len(taken) == 6
    for batch, row in zip(taken, rows, strict=True):
        assert batch.keys() == row.keys() - {"labels"}
        assert all(torch.equal(value, row[name]) for name, value in batch.items())
    positions = [int(row["attention_mask"].sum()) for row in rows]
    monkeypatch.setattr(with_data, "FIT_PER_INPUT", 1)
    monkeypatch.setattr(with_data, "FIT_POSITIONS", sum(positions[:2]) + 1)
    assert len(calibration(model, structure_of(model), iter(rows))) == 3
