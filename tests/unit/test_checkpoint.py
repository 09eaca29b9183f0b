"""A compacted model in a directory: what is written, every way to read it, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Trainer, TrainingArguments, pipeline
from transformers.quantizers import auto as auto_quantizers
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import cofiprune
from cofiprune.conformance.specimens import outputs, tiny_config
from cofiprune.errors import AdapterError, CheckpointError, CofipruneError, PlanError
from small import batch_of, build

RELATIVE = {"relative_attention": True, "pos_att_type": "c2p|p2c"}

HARD = {
    "hidden": [0.0] * 6 + [1.0] * 18, "layers.0.heads": [1.0, 0.0, 1.0, 0.0], "layers.1.attention": [0.0],
    "layers.1.intermediate": [1.0] * 9 + [0.0] * 25, "layers.2.ffn": [0.0],
}  # fmt: skip


@pytest.fixture
def pruned() -> Callable[..., PreTrainedModel]:
    """Build a float32 model of three layers and compact it under some masks."""

    def new(name: str, masks: Mapping[str, list[float]] = HARD, **settings: Any) -> PreTrainedModel:
        model = build(name, dtype=torch.float32, num_hidden_layers=3, **settings)
        with cofiprune.attach(model) as registry:
            registry.update({key: torch.tensor(value) for key, value in masks.items()})
            return cofiprune.compact(model)

    return new


def test_a_directory_holds_a_configuration_and_safetensors(
    pruned: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    small = pruned("BertForSequenceClassification")
    small.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "modeling_bert_compacted.py",
    }
    config = json.loads((tmp_path / "config.json").read_text())
    # The configuration of the original, which says how long a head is, and beside it the sizes that are there.
    assert (config["hidden_size"], config["num_attention_heads"], config["architectures"]) == (
        24,
        4,
        ["BertForSequenceClassification"],
    )
    assert config["quantization_config"] == {
        "quant_method": "cofiprune",
        "format_version": 1,
        "sizes": {
            "hidden": 18,
            "attention": [1, 0, 1],
            "heads": [2, 0, 4],
            "ffn": [1, 1, 0],
            "intermediate": [34, 9, 0],
        },
    }
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        assert stored.get_tensor("bert.encoder.layer.0.attention.self.query.weight").shape == (12, 18)


@pytest.mark.parametrize(
    ("name", "auto", "settings"),
    [
        ("BertModel", "AutoModel", {}),
        ("BertForMaskedLM", "AutoModelForMaskedLM", {}),
        ("BertForSequenceClassification", "AutoModelForSequenceClassification", {}),
        ("BertForTokenClassification", "AutoModelForTokenClassification", {}),
        ("BertForQuestionAnswering", "AutoModelForQuestionAnswering", {}),
        ("BertForMultipleChoice", "AutoModelForMultipleChoice", {}),
        ("BertForNextSentencePrediction", "AutoModelForNextSentencePrediction", {}),
        ("BertForPreTraining", "AutoModelForPreTraining", {}),
        ("RobertaForSequenceClassification", "AutoModelForSequenceClassification", {}),
        ("XLMRobertaForMaskedLM", "AutoModelForMaskedLM", {}),
        ("DebertaForSequenceClassification", "AutoModelForSequenceClassification", RELATIVE),
        ("DebertaForMaskedLM", "AutoModelForMaskedLM", {**RELATIVE, "embedding_size": 10}),
        ("DebertaV2ForMaskedLM", "AutoModelForMaskedLM", {**RELATIVE, "conv_kernel_size": 3}),
        ("DebertaV2ForQuestionAnswering", "AutoModelForQuestionAnswering", RELATIVE),
    ],
)
def test_auto_classes_read_it_and_write_it_again(
    pruned: Callable[..., PreTrainedModel], name: str, auto: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    def tied(model: PreTrainedModel) -> bool:
        head = model.get_output_embeddings()
        return head is not None and head.weight is model.get_input_embeddings().weight

    small = pruned(name, **settings)
    batch = batch_of(small)
    expected, was_tied = outputs(small, batch), tied(small)
    for place in ("one", "two"):
        small.save_pretrained(tmp_path / place)
        small = getattr(transformers, auto).from_pretrained(tmp_path / place)
        assert type(small).__name__ == name
        assert tied(small) == was_tied
        found = outputs(small, batch)
        assert all(torch.allclose(found[key], value, atol=1e-6) for key, value in expected.items())
        assert not getattr(small, "is_quantized", False)
        assert not hasattr(small, "hf_quantizer")


def test_the_encoder_of_a_checkpoint_serves_another_task(
    pruned: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    small = pruned("BertForMaskedLM")
    small.save_pretrained(tmp_path)
    batch = batch_of(small)
    model = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=3)
    assert model.classifier.weight.shape == (3, 18)
    found, expected = (outputs(each, batch)["last_hidden_state"] for each in (model.bert, small.bert))
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_dtype_can_be_asked_for(pruned: Callable[..., PreTrainedModel], dtype: torch.dtype, tmp_path: Path) -> None:
    pruned("BertForSequenceClassification").save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
    assert {value.dtype for value in again.parameters()} == {dtype}


def test_a_pipeline_reads_it(pruned: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    small = pruned("BertForSequenceClassification")
    small.save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "film"]
    transformers.BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(tmp_path)
    classify = pipeline("text-classification", str(tmp_path))
    found = classify("a fine film", top_k=None)
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    expected = small(input_ids=ids).logits.softmax(-1)[0]
    scores = {row["label"]: row["score"] for row in found}
    assert scores == pytest.approx({f"LABEL_{index}": value for index, value in enumerate(expected.tolist())}, abs=1e-5)


@pytest.mark.parametrize("name", ["RobertaForSequenceClassification", "DebertaV2ForSequenceClassification"])
def test_the_trainer_trains_it_and_a_checkpoint_resumes(
    pruned: Callable[..., PreTrainedModel], name: str, tmp_path: Path
) -> None:
    pruned(name).save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    batch = batch_of(model)
    rows = [{key: value[index] for key, value in batch.items()} | {"labels": index % 2} for index in range(3)]
    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "steps", "save_steps": 3}
    arguments = TrainingArguments(str(tmp_path / "run"), max_steps=3, learning_rate=1e-2, **options)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    Trainer(model, arguments, train_dataset=rows).train()
    assert all(not torch.equal(value, before[key]) for key, value in model.named_parameters() if "dense" in key)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-3")
    model.train(False)
    assert torch.allclose(outputs(again, batch)["logits"], outputs(model, batch)["logits"], atol=1e-6)
    longer = TrainingArguments(str(tmp_path / "run"), max_steps=4, learning_rate=1e-2, **options)
    done = Trainer(again, longer, train_dataset=rows).train(resume_from_checkpoint=True)
    assert done.global_step == 4


def test_without_cofiprune_loading_fails(pruned: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    """With an error and not with fresh weights, also where a removed block leaves no other shape behind."""
    cases = {
        "bert-all": ("BertForSequenceClassification", HARD, {}),
        "roberta-attention": ("RobertaForSequenceClassification", {"layers.0.attention": [0.0]}, {}),
        "deberta-attention": ("DebertaForSequenceClassification", {"layers.1.attention": [0.0]}, RELATIVE),
        "deberta-v2-ffn": ("DebertaV2ForSequenceClassification", {"layers.2.ffn": [0.0]}, RELATIVE),
        "bert-attention": ("BertForSequenceClassification", {"layers.1.attention": [0.0]}, {}),
        "bert-ffn": ("BertForSequenceClassification", {"layers.2.ffn": [0.0]}, {}),
        "bert-units": ("BertForSequenceClassification", {"layers.2.intermediate": [0.0] * 34}, {}),
        "distilbert-attention": ("DistilBertForSequenceClassification", {"layers.0.attention": [0.0]}, {}),
        "distilbert-ffn": ("DistilBertForSequenceClassification", {"layers.1.ffn": [0.0]}, {}),
        "bert-scale": ("BertForSequenceClassification", {"layers.2.heads": [0.5, 1.0, 1.0, 1.0]}, {}),
    }
    for place, (name, masks, settings) in cases.items():
        pruned(name, masks, **settings).save_pretrained(tmp_path / place)
    code = (
        "import sys, pathlib\n"
        "from transformers import AutoModelForSequenceClassification\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    try:\n"
        "        AutoModelForSequenceClassification.from_pretrained(path)\n"
        "        print(path.name, 'loads')\n"
        "    except Exception as error:\n"
        "        print(path.name, 'fails')\n"
        "assert 'cofiprune' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    # Only a model that lost nothing is one that transformers alone reads, and rightly so: its scales are folded in.
    assert dict(line.split() for line in done.stdout.splitlines()) == {
        place: "loads" if place == "bert-scale" else "fails" for place in cases
    }


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda entry: entry.update(format_version=2),
            CheckpointError,
            "in format 2, this version of cofiprune reads formats up to 1",
        ),
        (lambda entry: entry.pop("format_version"), CheckpointError, "states no format_version"),
        (lambda entry: entry["sizes"].update(hidden=25), PlanError, "recorded size 25 for group 'hidden'"),
        (lambda entry: entry["sizes"].update(heads=[2, 0, 4, 4]), PlanError, r"group 'layers.3.heads' does not fit"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(
    pruned: Callable[..., PreTrainedModel],
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    error: type[CofipruneError],
    message: str,
) -> None:
    pruned("BertForSequenceClassification").save_pretrained(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(error, match=message):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_record_of_other_sizes_than_the_weights_fails(pruned: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    pruned("BertForSequenceClassification").save_pretrained(tmp_path)
    edit(tmp_path, lambda entry: entry["sizes"].update(hidden=17))
    # Newer releases of transformers notice before we do.
    with pytest.raises((RuntimeError, CheckpointError), match="mismatch|the recorded sizes"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_head_of_another_size_is_new_or_refused(pruned: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    pruned("BertForSequenceClassification").save_pretrained(tmp_path)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    with pytest.raises((RuntimeError, CheckpointError), match="mismatch|'classifier.weight' has shape"):
        load(tmp_path, num_labels=5)
    model = load(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert model.classifier.weight.shape == (5, 24)
    edit(tmp_path, lambda entry: entry["sizes"].update(intermediate=[34, 8, 0]))
    with pytest.raises(CheckpointError, match=r"layer.1.*has shape \(9.*the recorded sizes"):
        load(tmp_path, ignore_mismatched_sizes=True)


def test_a_copy_of_an_unpruned_model_needs_no_cofiprune(tmp_path: Path) -> None:
    cofiprune.compact(build("BertModel")).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "auto", "settings"),
    [
        ("BertForSequenceClassification", "AutoModelForSequenceClassification", {}),
        ("BertForMaskedLM", "AutoModelForMaskedLM", {}),
        ("DebertaV2ForSequenceClassification", "AutoModelForSequenceClassification", RELATIVE),
        ("RobertaModel", "AutoModel", {}),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_from_config_builds_what_the_weights_fit(
    pruned: Callable[..., PreTrainedModel], name: str, auto: str, settings: dict[str, Any], device: str, tmp_path: Path
) -> None:
    small = pruned(name, **settings)
    small.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device(device):
        built = getattr(transformers, auto).from_config(config)
    assert {value.device.type for value in built.parameters()} == {device}
    shapes = {key: value.shape for key, value in small.state_dict().items()}
    assert {key: value.shape for key, value in built.state_dict().items()} == shapes
    if device == "cpu":
        assert all(bool(torch.isfinite(value).all()) for value in built.parameters())
        built.load_state_dict(small.state_dict())
        batch = batch_of(small)
        found = outputs(built.eval(), batch)
        assert all(torch.allclose(found[key], value, atol=1e-6) for key, value in outputs(small, batch).items())
        built.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / "model.safetensors").stat().st_size > 0
        assert dict(cofiprune.structure(built).sizes) == dict(cofiprune.structure(small).sizes)
        with pytest.raises(AdapterError, match=r"records a compacted model's sizes \(from_config builds those\)"):
            cofiprune.structure(type(small)(config))


def test_a_class_that_builds_its_encoder_by_from_config_is_cut_once(tmp_path: Path) -> None:
    cls = transformers.CLIPVisionModelWithProjection
    model = cls(tiny_config("clip_vision_model", num_hidden_layers=3))
    with cofiprune.attach(model) as masks:
        masks["layers.0.ffn"] = [0]
        masks["hidden"] = [0] * 4 + [1] * 20
        small = cofiprune.compact(model)
    small.save_pretrained(tmp_path)
    shapes = {key: value.shape for key, value in small.state_dict().items()}
    for built in (cls.from_pretrained(tmp_path), cls._from_config(cls.config_class.from_pretrained(tmp_path))):
        assert {key: value.shape for key, value in built.state_dict().items()} == shapes


def test_a_second_method_gets_the_cut_skeleton(
    pruned: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As bitsandbytes or torchao, which quantise on the way in."""

    class Halving(HfQuantizer):
        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            self.shapes = {key: value.shape for key, value in model.state_dict().items()}
            return model

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            model.classifier.weight.data.mul_(0.5)
            return model

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return False

    class HalvingConfig(QuantizationConfigMixin):
        def __init__(self) -> None:
            self.quant_method = "halving"

    monkeypatch.setitem(auto_quantizers.AUTO_QUANTIZER_MAPPING, "halving", Halving)
    small = pruned("BertForSequenceClassification")
    small.save_pretrained(tmp_path)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    found = load(tmp_path, quantization_config=HalvingConfig())
    assert found.hf_quantizer.shapes == {key: value.shape for key, value in small.state_dict().items()}
    assert torch.equal(found.classifier.weight, small.classifier.weight * 0.5)
    assert torch.equal(found.bert.pooler.dense.weight, small.bert.pooler.dense.weight)
    with (
        pytest.warns(UserWarning, match="has room for one method"),
        pytest.raises(ValueError, match="not serializable"),
    ):
        found.save_pretrained(tmp_path / "again")
    assert not load(tmp_path).is_quantized


def test_weights_without_the_kept_heads_of_a_shared_table_are_refused(tmp_path: Path) -> None:
    model = build("MPNetForMaskedLM", dtype=torch.float32)
    with cofiprune.attach(model) as masks:
        masks["layers.0.heads"] = [0, 1, 1, 1]
        cofiprune.compact(model).save_pretrained(tmp_path)
    transformers.MPNetModel.from_pretrained(tmp_path)  # of another class, under other names
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.endswith("kept_units")}
    assert len(kept) == len(weights) - 1
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="the weights lack 'kept_units'"):
        transformers.MPNetForMaskedLM.from_pretrained(tmp_path)
