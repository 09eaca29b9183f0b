"""A compacted model's folder where cofiprune is not installed, and the same folder where it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    CLIPModel,
    PreTrainedModel,
    dynamic_module_utils,
)

import cofiprune
from cofiprune.compaction.modelling import modelling_file
from cofiprune.conformance.absent import loaded_without
from cofiprune.conformance.specimens import tiny_config, tiny_sizes
from cofiprune.errors import CheckpointError
from small import batch_of, build, logits

HARD = {
    "hidden": [0.0] * 6 + [1.0] * 18, "layers.0.heads": [1.0, 0.0, 1.0, 0.0], "layers.1.attention": [0.0],
    "layers.1.intermediate": [1.0] * 9 + [0.0] * 25, "layers.2.ffn": [0.0],
}  # fmt: skip
FILE = "modeling_bert_compacted.py"

ABSENT = """
import copy, json, pickle, sys
from pathlib import Path
sys.modules["cofiprune"] = None  # importing it is an error
import torch, transformers
from transformers import (AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification)

folder = Path(sys.argv[1])
batch, wanted = torch.load(folder.parent / "wanted.pt")

def loaded(auto, folder=folder, **more):
    return auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64, **more).eval()

def same(model):
    with torch.no_grad():
        return float((model(**batch).logits - wanted).abs().max()) <= 1e-10

model = loaded(AutoModelForSequenceClassification)
assert type(model).__name__ == "BertForSequenceClassification"
assert isinstance(model, transformers.BertForSequenceClassification)
assert same(model) and same(copy.deepcopy(model)) and same(pickle.loads(pickle.dumps(model)))
model.save_pretrained(folder.parent / "again")
assert same(loaded(AutoModelForSequenceClassification, folder.parent / "again"))

assert loaded(AutoModel)(input_ids=batch["input_ids"]).last_hidden_state.shape[-1] == 18
assert loaded(AutoModelForMaskedLM)(input_ids=batch["input_ids"]).logits.shape[-1] == 40
tokens = loaded(AutoModelForTokenClassification, num_labels=5, ignore_mismatched_sizes=True)
assert tokens(input_ids=batch["input_ids"]).logits.shape[-1] == 5
assert torch.equal(tokens.bert.encoder.layer[0].attention.self.query.weight,
                   model.bert.encoder.layer[0].attention.self.query.weight)

def error(act):
    try:
        act()
    except Exception as found:
        return f"{type(found).__name__}: {found}"
    return "none"

print("untrusted:", error(lambda: AutoModelForSequenceClassification.from_pretrained(folder)))
print("ignored:", error(lambda: loaded(AutoModel, folder.parent / "mixed", ignore_mismatched_sizes=True)))
for name in ("edited", "deleted", "mixed", "renamed"):
    print(f"{name}:", error(lambda: loaded(AutoModelForSequenceClassification, folder.parent / name)).splitlines()[-1])
"""


@pytest.fixture
def small() -> PreTrainedModel:
    return compacted()


def compacted(name: str = "BertForSequenceClassification", masks: dict[str, list[float]] = HARD) -> PreTrainedModel:
    model = build(name, num_hidden_layers=3)
    with cofiprune.attach(model) as registry:
        registry.update({key: torch.tensor(value) for key, value in masks.items()})
        return cofiprune.compact(model)


@pytest.fixture(autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers copies files to that it runs."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))


def trusting(auto: Any, folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)
    model.train(False)
    return model


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_loads_where_cofiprune_is_absent(small: PreTrainedModel, tmp_path: Path) -> None:
    """By the file that is beside the weights, if it is trusted; a file that was changed or is gone is an error."""
    batch = batch_of(small)
    for name in ("folder", "edited", "deleted", "mixed", "renamed"):
        small.save_pretrained(tmp_path / name)
    torch.save((batch, logits(small, batch)), tmp_path / "wanted.pt")
    source = (tmp_path / "folder" / FILE).read_text()
    (tmp_path / "edited" / FILE).write_text(source.replace("'argument': 0", "'argument': 1", 1))
    (tmp_path / "deleted" / FILE).unlink()
    compacted(masks={**HARD, "layers.0.heads": [1.0, 1.0, 1.0, 0.0]}).save_pretrained(tmp_path / "other")
    (tmp_path / "mixed" / FILE).write_text((tmp_path / "other" / FILE).read_text())
    (tmp_path / "renamed" / FILE).write_text(source.replace('CHECKSUM = "', 'CHECKSUM = "0'))
    ran = subprocess.run(
        [sys.executable, "-c", ABSENT, str(tmp_path / "folder")],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert ran.returncode == 0, ran.stderr
    said = dict(line.split(": ", 1) for line in ran.stdout.splitlines() if ": " in line)
    assert said["untrusted"].startswith("RuntimeError")
    assert "its tables are not those" in said["edited"]
    assert said["deleted"].startswith("OSError") or FILE in said["deleted"]
    assert "mismatch" in said["mixed"]
    assert "of another shape: encoder.layer.0.attention" in said["ignored"]
    assert "its tables are not those" in said["renamed"]
    # What was saved there opens here.
    again = BertForSequenceClassification.from_pretrained(tmp_path / "again", dtype=torch.float64).eval()
    assert torch.allclose(logits(again, batch), logits(small, batch), rtol=0, atol=1e-10)
    assert cofiprune.structure(again).sizes == cofiprune.structure(small).sizes


def test_both_doors_give_the_same_where_cofiprune_is_imported(small: PreTrainedModel, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path / "out")
    batch = batch_of(small)
    for again in (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float64).eval(),
        trusting(AutoModelForSequenceClassification, tmp_path / "out"),
    ):
        assert type(again) is BertForSequenceClassification
        assert torch.equal(logits(again, batch), logits(small, batch))
        again.save_pretrained(tmp_path / "again")
        assert files(tmp_path / "again") == {"config.json", "model.safetensors", FILE}
        assert (tmp_path / "again" / FILE).read_text() == (tmp_path / "out" / FILE).read_text()
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    built = AutoModelForSequenceClassification.from_config(config, trust_remote_code=True)
    assert {name: value.shape for name, value in built.state_dict().items()} == {
        name: value.shape for name, value in small.state_dict().items()
    }
    # A model of the file's own class is pruned further, and its folder gets a file of its new sizes.
    with cofiprune.attach(built) as masks:
        masks["layers.0.heads"] = [1.0, 0.0]
        smaller = cofiprune.compact(built)
    smaller.save_pretrained(tmp_path / "smaller")
    again = trusting(AutoModelForSequenceClassification, tmp_path / "smaller")
    assert torch.allclose(logits(again, batch), logits(smaller.double().eval(), batch), rtol=0, atol=1e-6)


def test_portable_leaves_the_file_out_or_insists_on_it(small: PreTrainedModel, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModel"] == f"{FILE[:-3]}.BertModel"
    assert not hasattr(small.config, "auto_map")
    small.save_pretrained(tmp_path, portable=False)  # also where there was one
    assert files(tmp_path) == {"config.json", "model.safetensors"}
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    (tmp_path / FILE).write_text("# my own\n")
    small.save_pretrained(tmp_path, portable=False)
    assert FILE in files(tmp_path)  # which this package did not write
    small.save_pretrained(tmp_path)
    assert "Written by cofiprune" in (tmp_path / FILE).read_text()


def test_a_class_of_ones_own_has_no_file(tmp_path: Path) -> None:
    class Own(BertForSequenceClassification):
        pass

    model = Own(build("BertForSequenceClassification").config)
    with cofiprune.attach(model) as masks:
        masks["layers.0.heads"] = [1.0, 0.0, 1.0, 0.0]
        small = cofiprune.compact(model)
    small.save_pretrained(tmp_path)
    assert files(tmp_path) == {"config.json", "model.safetensors"}
    with pytest.raises(CheckpointError, match="no class of transformers"):
        small.save_pretrained(tmp_path, portable=True)


def test_what_is_not_compacted_is_saved_as_ever(tmp_path: Path) -> None:
    model = build("BertModel")
    model.save_pretrained(tmp_path / "dense")
    cofiprune.compact(model).save_pretrained(tmp_path / "equal", portable=True)
    for name in ("dense", "equal"):
        assert files(tmp_path / name) == {"config.json", "model.safetensors"}


def test_models_inside_a_model_are_cut_by_the_file_of_the_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_config("clip")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 34}
    for part in (config.text_config, config.vision_config):
        part.update(sizes)
    whole = CLIPModel(config).double()
    whole.train(False)
    with cofiprune.attach(whole.vision_model, units=("layer", "head", "intermediate")) as masks:
        masks["layers.0.heads"] = [1.0, 0.0, 1.0, 0.0]
        masks["layers.1.ffn"] = [0.0]
        whole.vision_model = cofiprune.compact(whole.vision_model)
    cofiprune.record_parts(whole)
    whole.save_pretrained(tmp_path, portable=True)
    assert "modeling_clip_compacted.py" in files(tmp_path)
    again = loaded_without(whole)
    assert again is not None
    again.train(False)
    pixels = torch.randn(2, 3, config.vision_config.image_size, config.vision_config.image_size).double()
    with torch.no_grad():
        wanted, found = (model.get_image_features(pixels) for model in (whole, again))
    wanted, found = (getattr(value, "pooler_output", value) for value in (wanted, found))
    assert torch.allclose(wanted, found, rtol=0, atol=1e-10)


def test_a_folder_that_cannot_be_written_is_an_error(small: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    (tmp_path / FILE / "taken").touch()
    with pytest.raises(cofiprune.CofipruneError, match="cannot be written"):
        small.save_pretrained(tmp_path)


def test_a_push_has_the_file_too(small: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = []
    monkeypatch.setattr(type(small), "push_to_hub", lambda self, name, **more: pushed.append((name, more)))
    small.save_pretrained(tmp_path / "mine", push_to_hub=True, commit_message="smaller")
    assert pushed == [("mine", {"commit_message": "smaller"})]


@pytest.mark.parametrize(
    ("name", "gone", "oldest"),
    [("MPNetModel", True, (4, 57)), ("DistilBertModel", False, (4, 57)), ("DistilBertModel", True, (5, 9)),
     ("Wav2Vec2Model", True, (5, 17)), ("T5EncoderModel", False, (5, 17)), ("CLIPTextModel", False, (5, 9))],
)  # fmt: skip
def test_a_file_knows_the_oldest_release_it_works_with(name: str, gone: bool, oldest: tuple[int, int]) -> None:
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**tiny_sizes(cls.config_class())))
    with cofiprune.attach(model) as masks:
        masks["layers.0.heads"] = [0.0, *[1.0] * (len(masks["layers.0.heads"]) - 1)]
        masks["layers.0.attention"] = [float(not gone)]
        source = modelling_file(cofiprune.compact(model)).source
    assert f'RELEASE, OLDEST = "{transformers.__version__}", {oldest}' in source


def test_the_same_file_is_made_once(small: PreTrainedModel) -> None:
    assert modelling_file(small) is modelling_file(small)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_of_peft_learn_in_it(small: PreTrainedModel) -> None:
    peft = pytest.importorskip("peft")
    model = loaded_without(small)
    assert model is not None
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "dense"]))
    assert wrapped(**batch_of(small)).logits.requires_grad


def test_auto_model_reads_the_encoder(small: PreTrainedModel, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path)
    encoder = trusting(AutoModel, tmp_path)
    assert cofiprune.structure(encoder).sizes == cofiprune.structure(small).sizes
