"""Exported files compute what the model does, are of standard operators, and are not there when they do not."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import PreTrainedTokenizerFast

import cofiprune
from cofiprune.errors import CofipruneError, ExportError, SettingsError
from cofiprune.export.comparison import Expected, example
from cofiprune.export.folder import exported_config
from small import assert_no_trace, bert, build, randomise, trace

WRITE = sys.modules["cofiprune.export.write"]  # `cofiprune.export` is the function
ROWS = [{"input_ids": [5, 6, 7][: 1 + index % 3], "labels": index % 2} for index in range(12)]
needs_runtime = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")), reason="needs cofiprune[export]"
)


def pruned(name: str = "BertForSequenceClassification", **settings: Any) -> Any:
    model = build(name, dtype=torch.float32, **settings).eval()
    with cofiprune.attach(model) as masks:
        randomise(masks)
        return cofiprune.compact(model)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    """A pruned classifier in float16, its folder, and the report."""
    model, folder = pruned().half(), tmp_path_factory.mktemp("exported")
    before = trace(model)
    report = cofiprune.export(model, folder, dataset=ROWS)
    assert_no_trace(model, before)
    return model, folder, report


def optimised(file: Path, folder: Path) -> list[str]:
    """The operators of which ONNX Runtime makes a model."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]


@needs_runtime
def test_a_file_scores_as_the_model_does(exported: tuple[Any, Path, Any]) -> None:
    model, folder, report = exported
    assert list(report) == ["onnx/model.onnx"]
    assert report.difference["onnx/model.onnx"] < 1e-5
    assert report.metric == "accuracy"
    assert report.rows == len(ROWS)
    accuracy = cofiprune.evaluate(model.float(), ROWS)["accuracy"]
    assert report.reference == report.score["onnx/model.onnx"] == pytest.approx(accuracy)
    assert report["onnx/model.onnx"].megabytes == pytest.approx((folder / "onnx/model.onnx").stat().st_size / 1e6)
    assert "onnx/model.onnx" in str(report)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "onnx"]


@needs_runtime
def test_a_file_takes_other_numbers_of_rows_and_tokens(exported: tuple[Any, Path, Any]) -> None:
    import onnxruntime

    model, folder, _ = exported
    session = onnxruntime.InferenceSession(str(folder / "onnx/model.onnx"), providers=["CPUExecutionProvider"])
    assert [entry.shape for entry in session.get_inputs()] == [["batch", "sequence"]] * 3
    for rows, tokens in ((1, 1), (5, 31)):
        inputs = example(model, rows, tokens)
        (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model.float()(**inputs).logits, atol=1e-5, rtol=1e-5)


@needs_runtime
def test_a_graph_is_of_standard_operators_that_stay_fast(exported: tuple[Any, Path, Any], tmp_path: Path) -> None:
    import onnx

    file = exported[1] / "onnx/model.onnx"
    assert {node.domain for node in onnx.load(file).graph.node} <= {"", "ai.onnx"}
    found = optimised(file, tmp_path)
    assert {"LayerNormalization", "BiasGelu"} <= set(found)
    assert not {"SkipLayerNormalization", "IsNaN", "GatherND"} & set(found)


@needs_runtime
def test_a_configuration_states_what_comes_out(exported: tuple[Any, Path, Any]) -> None:
    model, folder, _ = exported
    stated = json.loads((folder / "config.json").read_text())
    assert stated["hidden_size"] == model.get_input_embeddings().embedding_dim < model.config.hidden_size
    assert stated["num_hidden_layers"] == model.config.num_hidden_layers
    assert not {"quantization_config", "auto_map"} & set(stated)


def test_a_width_is_called_as_the_family_calls_it() -> None:
    model = pruned("DistilBertModel", dim=24, n_heads=4, n_layers=2, hidden_dim=34)
    assert exported_config(model)["dim"] == model.get_input_embeddings().embedding_dim < model.config.dim


class Mean(nn.Module):
    """A pooling as sentence-transformers has it."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        weights = features["attention_mask"].unsqueeze(-1).float()
        return {**features, "sentence_embedding": (features["token_embeddings"] * weights).sum(1) / weights.sum(1)}


@needs_runtime
def test_an_embedding_is_an_output_and_large_weights_go_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(sys.modules["cofiprune.export.graph"], "_ONE_FILE", 0)
    model, file = pruned("BertModel"), tmp_path / "new" / "encoder.onnx"
    report = cofiprune.export(model, file, modules=[Mean()])
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_outputs()] == ["last_hidden_state", "sentence_embedding"]
    assert report.difference["encoder.onnx"] < 1e-5
    assert report.metric == "agreement"
    assert report.score["encoder.onnx"] == pytest.approx(1.0)
    assert sorted(each.name for each in file.parent.iterdir()) == ["encoder.onnx", "encoder.onnx.data"]
    assert report["encoder.onnx"].megabytes > file.stat().st_size / 1e6


@pytest.mark.slow
@needs_runtime
@pytest.mark.parametrize(
    "name",
    ["BertForQuestionAnswering", "BertForMaskedLM", "BertForMultipleChoice", "RobertaForTokenClassification",
     "DistilBertModel", "DebertaV2ForSequenceClassification", "ModernBertForSequenceClassification", "MPNetModel",
     "EuroBertForTokenClassification", "EsmForMaskedLM", "NomicBertModel", "T5EncoderModel",
     "LayoutLMForTokenClassification", "ViTForImageClassification", "BlipVisionModel", "Idefics3VisionTransformer",
     "Wav2Vec2ForSequenceClassification"],
)  # fmt: skip
def test_families_and_heads(name: str, tmp_path: Path) -> None:
    model = pruned(name, **WORDS.get(name, {}))
    report = cofiprune.export(model, tmp_path)
    assert report.difference["onnx/model.onnx"] < 1e-4
    assert report.score["onnx/model.onnx"] == pytest.approx(1.0)


SPECIALS = {f"{name}_token_id": 1 for name in ("pad", "bos", "eos", "cls", "sep")}
WORDS: dict[str, dict[str, Any]] = {
    "ModernBertForSequenceClassification": SPECIALS, "EuroBertForTokenClassification": SPECIALS,
    "EsmForMaskedLM": {"pad_token_id": 1, "mask_token_id": 2, "token_dropout": True},
    **{
        name: {"image_size": 8, "patch_size": 4}
        for name in ("ViTForImageClassification", "BlipVisionModel", "Idefics3VisionTransformer")
    },
    "Wav2Vec2ForSequenceClassification": {
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "conv_dim": (6, 6), "conv_kernel": (4, 3),
        "conv_stride": (2, 2),
    },
}  # fmt: skip


@needs_runtime
def test_openvino_computes_the_same(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    report = cofiprune.export(pruned(), tmp_path, format=("openvino", "onnx"), dataset=ROWS)
    assert set(report) == {"onnx/model.onnx", "openvino/openvino_model.xml"}
    entry = report["openvino/openvino_model.xml"]
    assert entry.difference < 1e-5
    assert entry.score == report.reference
    weights = tmp_path / "openvino" / "openvino_model.bin"
    assert entry.megabytes == pytest.approx((weights.stat().st_size + entry.path.stat().st_size) / 1e6)


@needs_runtime
def test_what_computes_something_else_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(file: Path) -> Any:
        return lambda batch: {"logits": torch.zeros(len(batch["input_ids"]), 2)}

    monkeypatch.setattr(WRITE, "write_onnx", lambda whole, model, file, inputs, **how: file.write_bytes(b"a graph"))
    monkeypatch.setattr(WRITE, "onnx_answers", wrong)
    with pytest.raises(ExportError, match="the onnx form of this BertForSeq.* computes something else"):
        cofiprune.export(pruned(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_padding_is_not_compared_and_no_number_never_passes() -> None:
    batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
    states = torch.ones(1, 3, 2)
    expected = Expected.of(lambda batch: {"last_hidden_state": states}, [batch])
    other = states.clone()
    other[:, 2] = 7
    assert expected.difference(lambda batch: {"last_hidden_state": other}) == 0
    other[:, 1] = float("nan")
    assert not expected.difference(lambda batch: {"last_hidden_state": other}) <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "onx"}, "unknown format 'onx'. Did you mean 'onnx'?"),
        ({"format": ()}, "unknown format ''"),
        ({"dir": "model.onnx", "format": ("onnx", "openvino")}, "is one ONNX file; name a folder"),
        ({"dir": __file__}, "is a file; name a folder"),
        ({"model": nn.Linear(2, 2)}, "an object of sentence-transformers, not a Linear"),
    ],
)
def test_what_cannot_be_written_is_said_first(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CofipruneError) as raised:
        cofiprune.export(**{"model": bert(), "dir": tmp_path, **settings})
    assert message in str(raised.value)
    assert not list(tmp_path.iterdir())


@needs_runtime
def test_what_does_not_run_is_said(tmp_path: Path) -> None:
    model = bert()
    model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ExportError, match="BertForSequenceClassification does not run on made-up inputs: division"):
        cofiprune.export(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_masks_and_missing_packages_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    with cofiprune.attach(model), pytest.raises(CofipruneError, match="export cofiprune.compact"):
        cofiprune.export(model, tmp_path)
    monkeypatch.setattr(WRITE, "find_spec", lambda name: None)
    with pytest.raises(CofipruneError, match="needs onnx and onnxscript and .*: pip install 'cofiprune.export"):
        cofiprune.export(model, tmp_path)


@needs_runtime
def test_a_score_of_ones_own_is_what_counts(tmp_path: Path) -> None:
    def own(found: Any) -> dict[str, float]:
        assert len(found.predictions) == len(ROWS)
        assert list(found.label_ids) == [row["labels"] for row in ROWS]  # in the order of the rows
        return {"recall": float((found.predictions.argmax(-1) == 1).mean()), "other": 0.5}

    model = pruned()
    report = cofiprune.export(model, tmp_path, dataset=ROWS, compute_metrics=own, metric="recall")
    expected = cofiprune.evaluate(model, ROWS, compute_metrics=own)["recall"]
    assert (report.metric, report.reference) == ("recall", expected)
    assert report.score["onnx/model.onnx"] == expected
    for wrong, match in (
        ({"dataset": ROWS}, "returns recall, other. metric= names"),
        ({"dataset": ROWS, "metric": "recal"}, "Did you mean 'recall'"),
        ({}, "needs dataset="),
    ):
        with pytest.raises(SettingsError, match=match):
            cofiprune.export(model, tmp_path, compute_metrics=own, **wrong)


@needs_runtime
def test_a_folder_with_the_model_in_it_keeps_its_configuration(tmp_path: Path) -> None:
    model = pruned()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    cofiprune.export(model, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    assert type(model).from_pretrained(tmp_path).num_parameters() == model.num_parameters()
    dense = build("BertForSequenceClassification", dtype=torch.float32).eval()
    with pytest.raises(SettingsError, match="weights of another model.*another quantization_config"):
        cofiprune.export(dense, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


@needs_runtime
def test_files_of_another_model_do_not_stay_and_those_of_the_same_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, quantised = pruned(), "onnx/model_quantized.onnx"
    left = {
        name: tmp_path / name
        for name in ("openvino/openvino_model.xml", "openvino/openvino_model.bin", "onnx/own.onnx")
    }
    cofiprune.export(model, tmp_path, int8=True)
    (tmp_path / "openvino").mkdir()
    for file in left.values():
        file.write_bytes(b"of whatever")
    before = (tmp_path / quantised).read_bytes()
    report = cofiprune.export(model, tmp_path)
    assert (list(report), report.removed) == (["onnx/model.onnx"], ("openvino/openvino_model.xml",))
    assert (tmp_path / quantised).read_bytes() == before
    with torch.no_grad():
        next(model.parameters())[1] += 1
    monkeypatch.setattr(sys.modules["cofiprune.export.graph"], "_ONE_FILE", 0)
    report = cofiprune.export(model, tmp_path)
    assert report.removed == (quantised,)
    assert f"removed, since of another model: {quantised}" in str(report)
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["model.onnx", "model.onnx.data", "own.onnx"]
    monkeypatch.undo()
    cofiprune.export(model, tmp_path)
    assert [name for name, file in left.items() if file.exists()] == ["onnx/own.onnx"]
    assert not (tmp_path / "onnx/model.onnx.data").exists()


@needs_runtime
def test_a_tokenizer_has_one_limit_for_every_reader(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=12, pad_token="[PAD]")
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=30)
    cofiprune.export(pruned(), tmp_path, tokenizer=tokenizer)
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    lengths = [[len(each.ids) for each in plain.encode_batch(texts)] for texts in (["a a a a a", "a"], ["a " * 50])]
    assert lengths[0] == [5, 5]
    assert lengths[1] == [12]
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 4
