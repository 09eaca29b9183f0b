"""Pruning without data: an exact size, removed weights as they were, and outputs that come nearer."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import BertForSequenceClassification

from cofiprune import accounting, attach, compact
from cofiprune.adapter import structure as structure_of
from cofiprune.conformance.specimens import specimen, tiny_config
from cofiprune.errors import DataError
from cofiprune.oneshot.data_free import divergence, outputs_of, prune_data_free
from cofiprune.oneshot.importance import activation_importance, scores, weight_importance
from cofiprune.oneshot.layerwise import Layerwise, counted, projections, valid_rows
from cofiprune.oneshot.reconstruction import Reconstruction
from cofiprune.plan import Plan
from cofiprune.selection.target import Target
from small import build, cost_of, is_unchanged, padded, padded_batches, rng, snapshot, trace

SAMPLES = 600


def bert(name="BertForSequenceClassification", **settings):
    return build(name, **{"intermediate_size": 48, "num_labels": 3, **settings})


def pruned(model, share, teacher="self", *, samples=SAMPLES, **settings):
    structure = structure_of(model)
    target, teacher = Target.of(structure, share), model if teacher == "self" else teacher
    return prune_data_free(model, structure, target, teacher=teacher, samples=samples, **settings)


@pytest.mark.parametrize("target", [0.3, 0.9])
def test_the_sparsity_is_exact_with_a_teacher(target):
    model = bert()
    structure, cost = cost_of(model)
    plan = pruned(model, target)
    assert accounting.sparsity(cost, structure, plan.kept) == pytest.approx(target, abs=0.005)
    assert not plan.scale


def test_no_block_goes_while_others_have_units_to_spare():
    model = bert(num_hidden_layers=3)
    plan = pruned(model, 0.6, None)
    assert all(plan.kept[block.gate] == 1 for block in structure_of(model).blocks)
    shares = [plan.kept[name] / size for name, size in plan.sizes.items() if name.endswith("intermediate")]
    assert max(shares) - min(shares) < 0.25
    assert plan.kept["hidden"] == 24


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta", "deberta-v2"])
def test_reconstruction_brings_outputs_nearer_on_inputs_that_it_has_not_seen(family):
    from transformers import AutoModel

    config = tiny_config(family)
    config.intermediate_size = 64
    dense = specimen(AutoModel.from_config(config), rng())
    model = copy.deepcopy(dense)
    plan = pruned(model, 0.4, dense)
    unseen = padded_batches(dense, seed=77)
    theirs = outputs_of(dense, unseen)
    hidden = plan.keep["hidden"]
    cut = divergence(compact(dense, plan), theirs, unseen, hidden=hidden)
    assert divergence(compact(model, plan), theirs, unseen, hidden=hidden) < cut


def test_only_kept_weights_of_the_last_projections_change():
    model = bert()
    before = snapshot(model)
    plan = pruned(model, 0.6)
    structure = structure_of(model)
    paths = {path for paths in projections(model, structure).values() for path in paths}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert {name.rpartition(".")[0] for name in changed} <= paths
    for spec in structure.parameters:
        if spec.name in changed and len(spec.shape) == 2:
            kept = torch.zeros(spec.shape, dtype=torch.bool)
            rows, columns = (
                [unit * side.block + item for unit in plan.keep[side.group] for item in range(side.block)]
                for side in spec.sides
            )
            kept[torch.tensor(rows).unsqueeze(1), torch.tensor(columns)] = True
            difference = model.get_parameter(spec.name) != before[spec.name]
            assert not bool(difference[~kept].any())


def test_the_masked_model_and_the_compacted_one_agree_afterwards():
    model = bert()
    plan = pruned(model, 0.6)
    unseen = padded_batches(model)
    small = outputs_of(compact(model, plan), unseen)
    with attach(model) as masks:
        masks.set_plan(plan)
        for (ours,), (theirs,) in zip(outputs_of(model, unseen), small, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_without_a_teacher_no_weight_changes():
    model = bert()
    before = snapshot(model)
    pruned(model, 0.6, None)
    assert is_unchanged(model, before)


def test_the_seed_decides():
    runs = []
    for seed in (1, 1, 2):
        model = bert()
        torch.manual_seed(len(runs))
        plan = pruned(model, 0.5, seed=seed)
        runs.append((plan, snapshot(model)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())
    assert any(not torch.equal(value, runs[2][1][name]) for name, value in runs[0][1].items())


def test_all_but_the_weights_stays():
    model = bert().train()
    model.bert.encoder.layer[0].eval()
    before = trace(model)
    pruned(model, 0.5)
    after = trace(model)
    assert {name for name in before if before[name] != after[name]} == {"weights"}


def test_a_reconstruction_that_does_harm_is_rolled_back(monkeypatch):
    def harm(self, on_progress=None):
        with torch.no_grad():
            self.small.bert.encoder.layer[0].output.dense.weight.add_(1.0)
            self.small.classifier.weight.mul_(-100.0)

    monkeypatch.setattr(Reconstruction, "run", harm)
    model = bert()
    before = snapshot(model)
    pruned(model, 0.5)
    assert is_unchanged(model, before)


def test_removed_blocks_are_passed_by():
    model = bert(num_hidden_layers=3)
    structure = structure_of(model)
    values = {name: torch.ones(size) for name, size in structure.sizes.items()}
    values["layers.0.attention"][:] = 0
    values["layers.1.heads"][:] = 0
    values["layers.1.intermediate"][:] = 0
    values["layers.2.intermediate"][::2] = 0
    plan = Plan.from_values(structure, values)
    small = compact(model, plan)
    seen: list[float] = []
    theirs = outputs_of(model, padded_batches(model, seed=5))
    before = divergence(small, theirs, padded_batches(model, seed=5))
    Reconstruction(model, structure, small, plan, padded_batches(model, count=6)).run(seen.append)
    assert seen == pytest.approx([1 / 3, 2 / 3, 1])
    assert divergence(small, theirs, padded_batches(model, seed=5)) < before


def test_heads_alone_up_to_the_last_one():
    model = bert()
    structure, cost = cost_of(model)
    target = 1 - cost.exact({**structure.sizes, "layers.0.attention": 0, "layers.1.attention": 0}) / cost.exact(
        structure.sizes
    )
    plan = pruned(model, target, units="head")
    assert plan.keep["layers.0.heads"] == plan.keep["layers.1.heads"] == ()
    assert plan.kept["layers.0.intermediate"] == 48


def test_padding_does_not_enter_the_statistics():
    model = bert()
    structure = structure_of(model)
    plan = pruned(model, 0.5, None)
    batches = padded_batches(model)
    longer = [padded(batch, 30, fill=7) for batch in batches]
    assert [counted(model, structure, batch) for batch in batches] == [
        counted(model, structure, batch) for batch in longer
    ]
    found, weights = [], []
    for given in (batches, longer):
        small = compact(model, plan)
        found.append(activation_importance(model, structure, given))
        Reconstruction(model, structure, small, plan, given).run()
        weights.append(snapshot(small))
    for name, importance in found[0].items():
        torch.testing.assert_close(importance, found[1][name])
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-9, atol=1e-9)


def test_rows_line_up_with_the_mask_in_every_layout():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    states = torch.arange(12.0).view(2, 3, 2)
    wanted = states[mask == 1]
    assert torch.equal(valid_rows(states, {"attention_mask": mask}), wanted)
    assert torch.equal(valid_rows(states.view(6, 2), {"attention_mask": mask}), wanted)
    extended = torch.cat([states, torch.full((2, 2, 2), 9.0)], dim=1)
    assert torch.equal(valid_rows(extended, {"attention_mask": mask}), wanted)
    assert torch.equal(valid_rows(wanted, {"attention_mask": mask}), wanted)
    assert len(valid_rows(states, {})) == 6
    assert valid_rows(states.half(), {}).dtype == torch.float32


def test_positions_are_counted_without_a_mask():
    model = bert()
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long)}
    assert counted(model, structure_of(model), batch) == 10


def test_layer_by_layer_sees_what_a_forward_pass_computes():
    model = bert()
    structure = structure_of(model)
    batches = padded_batches(model)
    inputs = {}
    wanted = {gate: path for gate, (path,) in projections(model, structure).items()}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda module, args, output, gate=gate: inputs.setdefault(gate, []).append(args[0])
        )
        for gate, path in wanted.items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    walk = Layerwise(model, structure, batches)
    for layer in range(2):
        here = {path: gate for gate, path in wanted.items() if structure[gate].layer == layer}
        for index in range(len(batches)):
            for path, passage in walk.look(index, list(here), settle=True).items():
                torch.testing.assert_close(passage.inputs, inputs[here[path]][index], rtol=0, atol=0)
        walk.advance()


def test_dead_units_go_first():
    model = bert(num_hidden_layers=1)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[:, :10] = 0
        model.bert.encoder.layer[0].attention.self.value.weight[6:12] = 0
        model.bert.encoder.layer[0].attention.self.value.bias[6:12] = 0
    structure = structure_of(model)
    found = activation_importance(model, structure, padded_batches(model))
    assert found["layers.0.heads"].argmin() == 1
    for importance in (found, weight_importance(model, structure)):
        assert set(importance["layers.0.intermediate"].argsort()[:10].tolist()) == set(range(10))
        for group in structure.groups:
            if group.size > 1:
                assert float(importance[group.name].sum()) == pytest.approx(1)


def test_scores_compare_across_groups():
    structure = structure_of(bert(num_hidden_layers=3))
    importance = weight_importance(bert(num_hidden_layers=3), structure)
    found = scores(structure, importance)
    assert list(found) != []
    assert set(found) == set(structure)
    for name, values in found.items():
        assert values.shape == (structure[name].size,)
        assert 0 < float(values.min()) <= float(values.max()) == 1
    # Whole blocks rank only where their units cannot go one by one.
    assert all(float(found[block.gate]) == 1 for block in structure.blocks)
    alone = scores(structure, importance, "layer")
    assert len({float(alone[f"layers.{layer}.ffn"]) for layer in range(3)}) == 3


def test_a_teacher_of_another_structure_is_asked_for_its_outputs_only():
    teacher = bert(hidden_size=32, num_attention_heads=2, seed=4)
    model = bert()
    assert pruned(model, 0.4, teacher).sizes == structure_of(model).sizes
    encoder = bert("BertModel")
    before = snapshot(encoder)
    pruned(encoder, 0.4, bert("BertModel", hidden_size=32))
    assert not is_unchanged(encoder, before), "its own states take the place of the teacher's"


def test_a_compacted_model_is_pruned_again():
    model = bert()
    first = pruned(model, 0.3)
    small = compact(model, first)
    structure, cost = cost_of(small)
    second = pruned(small, 0.5)
    assert accounting.sparsity(cost, structure, second.kept) == pytest.approx(0.5, abs=0.005)


def test_a_model_in_half_precision():
    model = bert("BertForMaskedLM").bfloat16()
    dense, unseen = copy.deepcopy(model), padded_batches(model, seed=77)
    plan, theirs = pruned(model, 0.5), outputs_of(dense, unseen)
    assert divergence(compact(model, plan), theirs, unseen) < divergence(compact(dense, plan), theirs, unseen)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_inputs_that_cannot_be_made_up_are_refused_before_anything_changes():
    class ByteModel(BertForSequenceClassification):
        main_input_name = "bytes"

        def forward(self, bytes, attention_mask=None):
            raise AssertionError("it is not called")

    model = bert()
    model.__class__ = ByteModel
    before = snapshot(model)
    with pytest.raises(DataError, match="'bytes'"):
        pruned(model, 0.5)
    assert is_unchanged(model, before)
