"""Files of earlier versions load for ever, and their models answer as they did; `tests/data/record.py` wrote them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel, VisionTextDualEncoderModel

import cofiprune
import toy
from cofiprune.errors import CheckpointError

DATA = Path(__file__).parents[1] / "data"
LOADERS = {
    "compacted": AutoModelForSequenceClassification.from_pretrained,
    "compacted-derived": AutoModel.from_pretrained,
    "parts": VisionTextDualEncoderModel.from_pretrained,
    "cofi-masks": cofiprune.load_cofi_checkpoint,
    "cofi-cut": cofiprune.load_cofi_checkpoint,
}
FOLDERS = sorted(path for path in DATA.glob("*/*") if path.is_dir())


def loaded(folder: Path) -> PreTrainedModel:
    return LOADERS[folder.name](folder).eval()


def inputs_of(name: str) -> dict[str, Tensor]:
    ids = torch.tensor([[2, 5, 9, 11, 7, 3], [2, 8, 6, 0, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if name == "parts":
        inputs["pixel_values"] = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    return inputs


def answers(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """What a model predicts, where it is no padding."""
    with torch.no_grad():
        found = model(**inputs)
    for name in ("logits_per_image", "logits"):
        if name in found:
            return found[name].contiguous()
    return (found.last_hidden_state * inputs["attention_mask"].unsqueeze(-1)).contiguous()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: "/".join(folder.parts[-2:]))
def test_a_model_of_an_earlier_version_answers_as_it_did(folder: Path, tmp_path: Path) -> None:
    recorded = load_file(folder / "recorded.safetensors")
    expected = recorded.pop("answers")
    model = loaded(folder)
    assert torch.allclose(answers(model, recorded), expected, atol=1e-5)
    if "cofi" not in folder.name:  # written anew it is the same model
        model.save_pretrained(tmp_path / folder.name)
        assert torch.equal(answers(loaded(tmp_path / folder.name), recorded), answers(model, recorded))


@pytest.mark.parametrize("file", sorted(DATA.glob("*/plan.json")), ids=lambda file: file.parent.name)
def test_a_plan_of_an_earlier_version_says_what_it_did(file: Path) -> None:
    plan = cofiprune.Plan.load(file)
    assert plan.kept == {
        "hidden": 12, "layers.0.attention": 1, "layers.0.heads": 4, "layers.0.ffn": 1, "layers.0.intermediate": 20,
        "layers.1.attention": 1, "layers.1.heads": 3, "layers.1.ffn": 1, "layers.1.intermediate": 20,
    }  # fmt: skip
    assert plan.keep["layers.1.heads"] == (0, 1, 3)
    assert plan.to_dict()["scale"] == {"layers.1.heads": [1.0, 0.5, 1.0]}


def test_every_kind_of_file_is_there_and_they_are_small() -> None:
    for version in {folder.parent for folder in FOLDERS}:
        assert {path.name for path in version.iterdir()} >= {*LOADERS, "plan.json"}
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 200_000


@pytest.mark.parametrize(("version", "word"), [(1, "older"), (99, "newer")])
def test_a_training_checkpoint_goes_on_with_the_version_that_wrote_it(version: int, word: str, tmp_path: Path) -> None:
    settings = {"epochs": 1, "batch_size": 8, "progress": False, "output_dir": tmp_path}
    cofiprune.finetune(toy.bert(), toy.rows(16), **settings)
    meta = next(tmp_path.glob("checkpoint-*")) / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "format_version": version}))
    for other in [path for path in tmp_path.glob("checkpoint-*") if path != meta.parent]:
        shutil.rmtree(other)
    with pytest.raises(CheckpointError, match=f"format {version} by an? {word} cofiprune"):
        cofiprune.finetune(toy.bert(), toy.rows(16), resume=True, **settings)
