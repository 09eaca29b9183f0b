"""The same shape in every layer: a plain configuration, which loads in a process that does not know cofiprune."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cofiprune
from cofiprune.conformance import specimens
from cofiprune.errors import PlanError, SettingsError, TargetError
from cofiprune.plan import Plan

BERT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
DISTILBERT = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64}
NOMIC = {**BERT, "head_dim": 8}
LOAD = """
import sys, pathlib, torch
from transformers import AutoModelForSequenceClassification
for folder in map(pathlib.Path, sys.argv[1:]):
    model = AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
    torch.save(model(**torch.load(folder / "inputs.pt")).logits, folder / "logits.pt")
assert not any(name.startswith("cofiprune") for name in sys.modules)
"""


def new(name: str, **sizes: Any) -> Any:
    import transformers

    cls = getattr(transformers, name)
    config = cls.config_class(vocab_size=50, max_position_embeddings=32, num_labels=3, **sizes)
    return specimens.specimen(cls(config), torch.Generator().manual_seed(0)).double().eval()


CASES = {
    "BertForSequenceClassification": (BERT, None),
    "DistilBertForSequenceClassification": (DISTILBERT, ("layer", "intermediate")),
    "NomicBertForSequenceClassification": (NOMIC, ("layer", "head", "intermediate")),
}


def test_the_results_load_without_cofiprune(tmp_path: Path) -> None:
    expected = {}
    for name, (sizes, units) in CASES.items():
        model, folder = new(name, **sizes), tmp_path / name
        inputs = specimens.inputs(model, torch.Generator().manual_seed(1))
        with pytest.warns(UserWarning, match="without data"):
            result = cofiprune.prune(model, target_sparsity=0.6, uniform=True, units=units)
        assert result.sparsity == pytest.approx(0.6, abs=0.005)
        small = result.compact()
        assert "quantization_config" not in json.loads(small.config.to_json_string())
        assert sum(each.numel() for each in small.parameters()) < sum(each.numel() for each in model.parameters())
        expected[folder] = cofiprune.compact(model)(**inputs).logits
        assert torch.allclose(small(**inputs).logits, expected[folder], atol=1e-10)
        small.save_pretrained(folder)
        torch.save(inputs, folder / "inputs.pt")
    subprocess.run([sys.executable, "-c", LOAD, *map(str, expected)], check=True)  # which knows nothing of it
    for folder, logits in expected.items():
        assert torch.allclose(torch.load(folder / "logits.pt"), logits, atol=1e-10), folder.name


def test_heads_go_with_hidden_dimensions_where_the_configuration_ties_them() -> None:
    with pytest.warns(UserWarning, match="without data"):
        result = cofiprune.prune(
            new("BertForTokenClassification", **BERT), target_sparsity=0.71, uniform=True,
            units=("head", "hidden", "layer"),
        )  # fmt: skip
    small = result.compact()
    assert small.config.hidden_size == 8 * small.config.num_attention_heads < 32
    inputs = specimens.inputs(small, torch.Generator().manual_seed(1))
    assert torch.allclose(small(**inputs).logits, cofiprune.compact(result.model)(**inputs).logits, atol=1e-10)


@pytest.mark.parametrize("settings", [{"teacher": "self", "epochs": 1, "finetune_epochs": 1}, {"method": "one-shot"}])
def test_a_run_on_data_ends_in_one_shape(settings: dict[str, Any]) -> None:
    model = new("BertForSequenceClassification", **BERT).float()
    rows = [{"input_ids": torch.randint(5, 50, (16,)), "labels": n % 3} for n in range(64)]
    result = cofiprune.prune(model, rows, target_sparsity=0.6, uniform=True, progress=False, **settings)
    assert result.sparsity == pytest.approx(0.6, abs=0.005)
    small, inputs = result.compact(), {"input_ids": torch.tensor([[5, 6, 7]])}
    assert torch.allclose(small.eval()(**inputs).logits, model.eval()(**inputs).logits, atol=1e-5)


def test_what_no_plain_configuration_can_say_is_an_error() -> None:
    model = new("BertForSequenceClassification", **BERT)
    structure = cofiprune.structure(model)
    for masks in ({"layers.0.intermediate": 40}, {"layers.1.attention": 0}, {f"layers.{n}.heads": 2 for n in range(4)}):
        values = {name: (torch.arange(structure[name].size) < kept).double() for name, kept in masks.items()}
        with pytest.raises(PlanError, match="differ in shape|derives the width"):
            cofiprune.compact(model, Plan.from_values(structure, values), uniform=True)
    with pytest.raises(PlanError, match=r"fewer 'head' units.*units takes layer, intermediate"):  # it has a pooler
        cofiprune.prune(model, target_sparsity=0.3, uniform=True, units=("head",))
    with pytest.raises(TargetError, match="same shape in every layer"):
        cofiprune.prune(model, target_sparsity=0.3, uniform=True, units=("layer",))
    with pytest.raises(SettingsError, match="one target"):
        cofiprune.prune(model, target_sparsity=[0.3, 0.5], uniform=True)
    albert = new("AlbertForSequenceClassification", **BERT)
    with pytest.raises(PlanError, match="albert"):
        cofiprune.prune(albert, target_sparsity=0.3, uniform=True)
