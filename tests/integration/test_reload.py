"""A compacted model is an ordinary model: every stock way to load and train it works, and none works wrongly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import cofiprune

CONFIG = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "vocab_size": 60,
    "max_position_embeddings": 20,
}


def pruned(cls: type, **values: list[float]) -> torch.nn.Module:
    torch.manual_seed(0)
    model = cls(BertConfig(**CONFIG)).eval()
    masks = cofiprune.attach(model)
    for name, value in (values or UNEVEN).items():
        masks[name] = value
    return cofiprune.compact(model)


UNEVEN = {
    "hidden": [0.0, 1.0, 0.5] * 8,
    "layers.0.heads": [0.0, 1.0, 1.0],
    "layers.1.attention": [0.0],
    "layers.1.intermediate": [0.0, 1.0] * 10,
    "layers.2.ffn": [0.0],
}
INPUTS = {"input_ids": torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(1))}


def test_reload_and_second_reload_give_the_same_outputs(tmp_path: Path) -> None:
    small = pruned(BertForSequenceClassification)
    expected = small(**INPUTS).logits
    small.save_pretrained(tmp_path / "one")
    assert {path.suffix for path in (tmp_path / "one").iterdir()} == {".json", ".safetensors"}
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one").eval()
    assert torch.equal(again(**INPUTS).logits, expected)
    again.save_pretrained(tmp_path / "two")
    twice = AutoModelForSequenceClassification.from_pretrained(tmp_path / "two").eval()
    assert torch.equal(twice(**INPUTS).logits, expected)
    assert AutoModel.from_pretrained(tmp_path / "two")(**INPUTS).last_hidden_state.shape == (2, 7, 16)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    small = pruned(BertForMaskedLM)
    small.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(again(**INPUTS).logits, small(**INPUTS).logits)


def test_the_trainer_trains_and_saves_it(tmp_path: Path) -> None:
    pruned(BertForSequenceClassification).save_pretrained(tmp_path / "one")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one")
    rows = [{"input_ids": INPUTS["input_ids"][0], "labels": 1}] * 8
    arguments = TrainingArguments(tmp_path / "run", max_steps=3, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=rows)
    before = model.classifier.weight.detach().clone()
    trainer.train()
    assert not torch.equal(model.classifier.weight, before)
    trainer.save_model(tmp_path / "two")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "two")
    assert torch.equal(again.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize("values", [UNEVEN, {"layers.1.attention": [0.0]}, {"layers.2.ffn": [0.0]}])
def test_without_cofiprune_loading_fails(tmp_path: Path, values: dict[str, list[float]]) -> None:
    pruned(BertForSequenceClassification, **values).save_pretrained(tmp_path)
    code = f"from transformers import BertForSequenceClassification as M; M.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "mismatch" in done.stderr


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    pruned(BertForSequenceClassification).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = 99
    path.write_text(json.dumps(config))
    with pytest.raises(cofiprune.CofipruneError, match=r"format 99.*Upgrade"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
