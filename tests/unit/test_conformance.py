"""The public battery: what it takes, what it reports, and how it says that nothing was checked."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
import transformers
from transformers import PretrainedConfig

from cofiprune import Adapter, check_adapter
from cofiprune.adapter import Family
from cofiprune.conformance.specimens import unit_choices
from cofiprune.errors import AdapterError, StructureError
from cofiprune_adapters.bert import adapter as bert
from cofiprune_adapters.deberta import adapter as deberta
from small import build


def test_a_report_says_what_was_covered() -> None:
    report = check_adapter(bert, heads=("Model", "ForMaskedLM"))
    assert report.families == ("bert",)
    assert report.heads == ("BertForMaskedLM", "BertModel")
    assert len(report.choices) == 15
    assert report.cases >= 2 * 2 * 15
    assert 0 < report.largest_difference < 1e-10
    assert not report.refused
    assert not report.skipped
    text = str(report)
    assert "Every law holds for bert." in text
    assert "head classes        2: BertForMaskedLM, BertModel" in text
    with pytest.raises(FrozenInstanceError):
        report.cases = 0  # type: ignore[misc]


def test_a_model_is_checked_as_it_is() -> None:
    model = build("BertForQuestionAnswering", dtype=torch.float32, num_hidden_layers=1)
    report = check_adapter(model, units="head")
    assert report.heads == ("BertForQuestionAnswering",)
    assert report.choices == (("head",),)
    with pytest.raises(AdapterError, match="a model is checked as it is"):
        check_adapter(model, heads="ForMaskedLM")


def test_refused_units_and_skipped_heads_are_told() -> None:
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 40}
    talking = transformers.DebertaConfig(**sizes, intermediate_size=34, relative_attention=True, talking_head=True)
    report = check_adapter(deberta, heads="ForTokenClassification", configs=[talking])
    assert list(report.refused) == ["DebertaForTokenClassification: head"]
    assert len(report.choices) == 7
    assert "refused             DebertaForTokenClassification: head: talking_head mixes" in str(report)
    plain = transformers.DebertaConfig(**sizes, intermediate_size=34, relative_attention=True)
    both = check_adapter(deberta, heads="ForTokenClassification", units="layer", configs=[talking, plain])
    assert both.refused == report.refused
    # transformers multiplies the states with the narrower table in this combination, and fails.
    narrow = transformers.DebertaConfig(**sizes, intermediate_size=34, embedding_size=10, legacy=False)
    with pytest.raises(AdapterError, match=r"nothing could be checked\. DebertaForMaskedLM: RuntimeError"):
        check_adapter(deberta, heads="ForMaskedLM", configs=[narrow])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"heads": "ForPoetry"}, AdapterError, "no head class ends in 'ForPoetry'; there are BertForMaskedLM"),
        ({"units": "heads"}, StructureError, r"units names \['heads'\]; choose among layer, head"),
        ({"units": ()}, StructureError, "choose among layer, head"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_adapter(bert, **arguments)


def test_an_adapter_need_not_be_registered() -> None:
    class Strict(Adapter):
        model_types = ("bert",)
        seen = 0

        def describe(self, config: PretrainedConfig) -> Family:
            Strict.seen += 1
            return bert.describe(config)

    check_adapter(Strict(), heads="ForTokenClassification", units="layer")
    assert Strict.seen > 0


def test_other_inputs_can_be_given() -> None:
    ids = torch.randint(5, 40, (2, 6))
    report = check_adapter(bert, heads="ForTokenClassification", units="hidden", batch={"input_ids": ids})
    assert report.cases > 0


def test_seeds_choose_other_masks_and_models() -> None:
    reports = [check_adapter(bert, heads="ForTokenClassification", units="head", seed=seed) for seed in (0, 0, 1)]
    assert reports[0] == reports[1]
    assert reports[0].largest_difference != reports[2].largest_difference


def test_there_are_fifteen_choices_of_units() -> None:
    assert len(set(unit_choices())) == 15
