"""Plans: read off masks, canonical, written and read, refused where they do not belong."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import cofiprune
from cofiprune import Plan
from cofiprune.errors import PlanError
from small import batch_of, build


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("BertModel")


@pytest.fixture(scope="module")
def plan(model: PreTrainedModel) -> Plan:
    with cofiprune.attach(model) as masks:
        masks["hidden"] = [0] * 4 + [1] * 20
        masks["layers.0.heads"] = [1, 0, 0.5, 1]
        masks["layers.0.ffn"] = [0]
        masks["layers.1.intermediate"] = [0] * 34
        return Plan.from_masks(masks)


def test_a_plan_holds_the_kept_units(plan: Plan) -> None:
    assert plan.family == "bert"
    assert plan.keep["hidden"] == tuple(range(4, 24))
    assert plan.keep["layers.0.heads"] == (0, 2, 3)
    assert plan.scale == {"layers.0.heads": (1.0, 0.5, 1.0)}
    assert plan.values("layers.0.heads") == [1.0, 0.0, 0.5, 1.0]
    assert plan.kept["hidden"] == 20


def test_a_removed_block_goes_with_its_gate_and_its_units(plan: Plan) -> None:
    for layer in (0, 1):
        assert plan.keep[f"layers.{layer}.ffn"] == ()
        assert plan.keep[f"layers.{layer}.intermediate"] == ()
    assert plan.keep["layers.1.attention"] == (0,)


def test_units_that_are_not_masked_stay(model: PreTrainedModel) -> None:
    with cofiprune.attach(model, "head") as masks:
        masks["layers.1.heads"] = [0, 1, 1, 1]
        plan = masks.plan()
    assert plan.keep["hidden"] == tuple(range(24))
    assert plan.kept == {**cofiprune.structure(model).sizes, "layers.1.heads": 3}


def test_a_plan_is_frozen(plan: Plan) -> None:
    with pytest.raises(FrozenInstanceError):
        plan.family = "roberta"  # type: ignore[misc]


def test_a_plan_survives_a_file(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["format_version"] == 1


def test_fractions_survive_a_file_exactly(model: PreTrainedModel, tmp_path: Path) -> None:
    with cofiprune.attach(model) as masks:
        masks["hidden"] = torch.rand(24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        masks.plan().save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json").values("hidden") == masks["hidden"].tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a readable plan"),
        ("{", "is not a readable plan"),
        ("[]", "it holds a list instead of an object"),
        ("{}", "it states no format_version"),
        ('{"format_version": 2}', "it is in format 2, this version of cofiprune reads formats up to 1"),
        ('{"format_version": 1, "family": "bert", "scale": {}}', "sizes: Field required"),
        ('{"format_version": 1, "family": "bert", "sizes": {}, "keep": 3, "scale": {}}', "keep: "),
        ('{"format_version": 1, "family": "b", "sizes": {"hidden": 2.5}, "keep": {}, "scale": {}}', "sizes.hidden: "),
        ('{"format_version": 1, "family": "b", "sizes": {"hidden": 2}, "keep": {}, "scale": {}}', "no kept indices"),
        ('{"format_version": 1, "family": "b", "sizes": {"hidden": 2}, "keep": {"hidden": []}, "scale": {}}', "every"),
        (
            '{"format_version": 1, "family": "b", "sizes": {"x": 2}, "keep": {"x": [0]}, "scale": {"x": [NaN]}}',
            r"by a factor in \(0, 1\]",
        ),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=message) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="No such file"):
        Plan.load(tmp_path / "none.json")


def test_a_plan_for_another_model_is_refused(plan: Plan) -> None:
    with pytest.raises(PlanError, match="is for a 'bert' model, the model is 'roberta'"):
        cofiprune.compact(build("RobertaModel"), plan)
    with pytest.raises(PlanError, match=r"group 'layers\.0\.heads' has 4 units in the plan and 2 in the model"):
        cofiprune.compact(build("BertModel", num_attention_heads=2), plan)
    with pytest.raises(PlanError, match=r"has no group 'layers.2.attention'"):
        cofiprune.compact(build("BertModel", num_hidden_layers=3), plan)
    with pytest.raises(PlanError, match=r"names the group 'layers.1.attention', which the model does not have"):
        cofiprune.compact(build("BertModel", num_hidden_layers=1), plan)


@pytest.mark.parametrize("indices", [(3, 2), (0, 0), (0, 4), (-1, 2)])
def test_indices_that_do_not_ascend_within_the_group_are_refused(
    plan: Plan, model: PreTrainedModel, indices: tuple[int, ...]
) -> None:
    broken = replace(plan, keep={**plan.keep, "layers.0.heads": indices})
    with pytest.raises(PlanError, match=r"keeps indices of 'layers.0.heads' that do not ascend within 0..3"):
        cofiprune.compact(model, broken)


def test_every_hidden_dimension_cannot_go(model: PreTrainedModel) -> None:
    with pytest.raises(PlanError, match="every hidden dimension is masked"):
        Plan.from_values(cofiprune.structure(model), {"hidden": torch.zeros(24)})


def test_a_plan_prints_its_layers(plan: Plan) -> None:
    lines = [" ".join(line.split()) for line in str(plan).splitlines()]
    assert lines[0] == "Plan for a bert model"
    assert {"hidden 20 of 24", "layers.0.heads 3 of 4", "layers.0.intermediate block removed"} < {*lines}


def test_two_plans_in_a_row_are_one(model: PreTrainedModel, plan: Plan) -> None:
    first = plan.hard
    small = cofiprune.compact(model, first)
    with cofiprune.attach(small) as masks:
        masks["hidden"] = [0, 1] * 10
        masks["layers.0.heads"] = [0.5, 0, 1]
        masks["layers.1.attention"] = [0]
        second = masks.plan()
    both = first.then(second)
    both.check(cofiprune.structure(model))
    assert both.keep["hidden"] == tuple(range(5, 24, 2))
    assert both.keep["layers.0.heads"] == (0, 3)
    assert both.values("layers.0.heads") == [0.5, 0.0, 0.0, 1.0]
    assert both.keep["layers.1.attention"] == both.keep["layers.1.heads"] == ()
    assert both.keep["layers.0.ffn"] == both.keep["layers.0.intermediate"] == ()
    assert both.sizes == first.sizes
    batch = batch_of(model)
    once, twice = (cofiprune.compact(*each)(**batch) for each in ((model, both), (small, second)))
    assert torch.equal(once.last_hidden_state, twice.last_hidden_state)


def test_scales_of_the_first_of_two_plans_are_in_the_weights_already(model: PreTrainedModel, plan: Plan) -> None:
    whole = Plan.from_values(cofiprune.structure(cofiprune.compact(model, plan)), {})
    assert plan.scale
    assert plan.then(whole) == plan.hard


def test_the_second_plan_must_be_for_what_the_first_one_leaves(model: PreTrainedModel, plan: Plan) -> None:
    with pytest.raises(PlanError, match="not for what the first one leaves"):
        plan.then(plan)
    left = Plan.from_values(cofiprune.structure(cofiprune.compact(model, plan)), {})
    with pytest.raises(PlanError, match="not for what the first one leaves"):
        plan.then(replace(left, family="roberta"))
