"""int8 files: smaller, table included, as good as asked for, or not there."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cofiprune
from cofiprune.errors import CofipruneError, ExportError
from cofiprune.export.integers import affine, matrices, rounded, with_int8
from cofiprune.export.quantisation import quantise_onnx
from cofiprune.export.sessions import onnx_answers
from cofiprune.measure.answers import Scorer
from small import build

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")), reason="needs cofiprune[export]"
)
FLOAT, INT8 = "onnx/model.onnx", "onnx/model_quantized.onnx"
SIZES = {"hidden_size": 48, "intermediate_size": 96, "vocab_size": 4000}


def classifier(**settings: Any) -> Any:
    return build("BertForSequenceClassification", dtype=torch.float32, **{**SIZES, **settings}).eval()


def rows(model: Any, count: int = 120, seed: int = 0) -> list[dict[str, Any]]:
    """Rows whose labels are the model's own answers."""
    generator = np.random.default_rng(seed)
    ids = [generator.integers(5, 3999, generator.integers(3, 12)).tolist() for _ in range(count)]
    with torch.no_grad():
        labels = [model(input_ids=torch.tensor([each])).logits.argmax().item() for each in ids]
    return [{"input_ids": each, "labels": label} for each, label in zip(ids, labels, strict=True)]


def with_outliers(model: Any) -> Any:
    """Let one dimension of what the second layer's feed-forward block reads be a thousand times the others.

    The norm in front multiplies by it and the matrix behind divides by it, so that floats compute the same.
    """
    layer = model.bert.encoder.layer[1]
    norm, reader = layer.attention.output.LayerNorm, layer.intermediate.dense
    with torch.no_grad():
        norm.weight[3] *= 1000
        norm.bias[3] *= 1000
        reader.weight[:, 3] /= 1000
    return model


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Scorer]:
    """A model, its ONNX file, and rows to score on."""
    model, folder = classifier(), tmp_path_factory.mktemp("float")
    cofiprune.export(model, folder)
    return model, folder / FLOAT, Scorer.of(model, rows(model), onnx_answers(folder / FLOAT))


@pytest.mark.parametrize("mode", ["static", "dynamic", "weights"])
def test_a_file_is_small_and_scores_as_the_float_file_does(
    float_file: tuple[Any, Path, Scorer], tmp_path: Path, mode: str
) -> None:
    model, source, scorer = float_file
    target = tmp_path / "small.onnx"
    made = quantise_onnx(source, target, model, int8=mode, scorer=scorer, max_drop=0.05)
    assert made.note.startswith(f"{mode}, 16 of 16 matrices in int8; tried: {mode}: accuracy ")
    assert scorer.score(onnx_answers(target)).value >= 0.95
    parameters = sum(value.numel() for value in model.parameters())
    assert target.stat().st_size < 1.1 * parameters + 60_000  # of a byte each, and the graph


def test_the_fastest_is_taken_and_all_are_named(float_file: tuple[Any, Path, Scorer], tmp_path: Path) -> None:
    model, source, scorer = float_file
    note = quantise_onnx(source, tmp_path / "small.onnx", model, scorer=scorer, max_drop=0.2).note
    assert all(f"{mode}: accuracy" in note for mode in ("static", "dynamic", "weights"))
    assert note.count("ms a batch") == 3


def test_without_rows_nothing_is_calibrated(float_file: tuple[Any, Path, Scorer], tmp_path: Path) -> None:
    model, source, _ = float_file
    assert quantise_onnx(source, tmp_path / "small.onnx", model).note == "dynamic, 16 of 16 matrices in int8"


def test_a_matrix_that_hurts_stays_in_float(tmp_path: Path) -> None:
    model = with_outliers(classifier())
    unlabelled = [{"input_ids": row["input_ids"]} for row in rows(model)]
    report = cofiprune.export(model, tmp_path, int8="static", dataset=unlabelled, max_drop=0.03)
    note = report[INT8].note
    assert "in float: bert.encoder.layer.1.intermediate.dense.weight; tried: static: agreement 0." in note
    assert "; static with 1 matrices in float: agreement " in note
    assert report.metric == "agreement"
    assert report.score[INT8] >= 0.97
    assert report[INT8].megabytes < 0.45 * report[FLOAT].megabytes


def test_too_much_is_refused_with_figures_and_nothing_is_left(tmp_path: Path) -> None:
    model = classifier()
    with torch.no_grad():  # one dimension of every norm is far out, and no reader divides by it
        for name, value in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                value[3] *= 3000
    with pytest.raises(ExportError) as raised:
        cofiprune.export(model, tmp_path / "out", int8="dynamic", dataset=rows(model), max_drop=0)
    said = str(raised.value)
    assert "max_drop=0 on these rows, so nothing was written: dynamic: accuracy 0." in said
    assert "matrices in float: accuracy" in said
    assert "int8='weights'" in said
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"int8": True, "max_drop": 1}, "a fraction, 0.01 for one point in a hundred, and below 1; not 1"),
        ({"int8": True, "max_drop": -0.1}, "a fraction"),
        ({"int8": True, "max_drop": float("nan")}, "a fraction"),
        ({"int8": True, "max_drop": "1%"}, "a fraction"),
        ({"int8": True, "max_drop": 0.01, "dataset": None}, "measured on rows: give dataset=rows"),
        ({"max_drop": 0.01}, "give int8=True with it"),
        ({"int8": "static", "dataset": None}, "reads ranges off rows: give dataset=rows"),
        ({"int8": "statik"}, "one of static, dynamic, weights, not 'statik'. Did you mean 'static'?"),
        ({"int8": True, "dir": "model.onnx"}, "name a folder for it and its int8 form"),
        ({"int8": "dynamic", "format": "openvino"}, "OpenVINO has no dynamic int8"),
        ({"int8": True, "dataset": []}, "dataset"),
    ],
)
def test_arguments_are_explained_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    given = {"dir": ".", "dataset": [{"input_ids": [5, 6], "labels": 0}], **settings}
    with pytest.raises(CofipruneError) as raised:
        cofiprune.export(classifier(), **{**given, "dir": tmp_path / given["dir"]})
    assert message in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["BertForMaskedLM", "BertForQuestionAnswering", "BertForTokenClassification", "BertModel",
             "DebertaV2ForSequenceClassification", "ModernBertForSequenceClassification", "ViTForImageClassification"],
)  # fmt: skip
def test_other_heads_and_families(tmp_path: Path, name: str) -> None:
    settings = {"image_size": 8, "patch_size": 4} if name.startswith("ViT") else {"pad_token_id": 0}
    model = build(name, dtype=torch.float32, **settings).eval()
    given: list[dict[str, Any]] = [{"input_ids": list(range(5, 6 + n))} for n in range(1, 20)]
    if name.startswith("ViT"):
        given = [{"pixel_values": torch.randn(3, 8, 8)} for _ in range(20)]
    report = cofiprune.export(model, tmp_path, int8="static", dataset=given)
    assert report.metric == "agreement"
    assert report.score[INT8] > 0.8


def test_ranges_hold_zero_exactly() -> None:
    for limits in ((0.3, 2.0), (-3.0, -1.0), (-1.0, 2.0), (0.0, 0.0)):
        scale, zero = affine(*limits)
        assert 0 <= zero <= 255
        assert rounded(np.array([0.0]), limits) == 0
        inside = np.linspace(*limits, 50)
        assert np.abs(rounded(inside, limits) - inside).max() <= scale


def test_what_a_branch_reads_stays() -> None:
    from onnx import TensorProto, helper, numpy_helper

    def branch(name: str) -> Any:
        node = helper.make_node("Add", ["product", name], [f"sum.{name}"])
        out = helper.make_tensor_value_info(f"sum.{name}", TensorProto.FLOAT, None)
        return helper.make_graph([node], name, [], [out])

    weights = {"w": np.eye(4), "one": np.ones(4), "two": 2 * np.ones(4)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("If", ["which"], ["y"], then_branch=branch("one"), else_branch=branch("two")),
    ]
    shapes = {"x": (TensorProto.FLOAT, [1, 4]), "which": (TensorProto.BOOL, []), "y": (TensorProto.FLOAT, None)}
    x, which, y = (helper.make_tensor_value_info(name, *shape) for name, shape in shapes.items())
    constants = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    model = helper.make_model(helper.make_graph(nodes, "graph", [x, which], [y], constants))
    kept = {value.name for value in with_int8(model, matrices(model), "weights", {}).graph.initializer}
    assert {"one", "two", "w.columns.integers"} <= kept
    assert "w" not in kept


@pytest.mark.slow
def test_a_tied_table_has_columns_for_the_product_too(tmp_path: Path) -> None:
    import onnx

    model = build("BertForMaskedLM", dtype=torch.float32, vocab_size=3000).eval()
    cofiprune.export(model, tmp_path)
    graph = onnx.load(tmp_path / FLOAT)
    small = with_int8(graph, matrices(graph), "weights", {})
    found = [value for value in small.graph.initializer if len(value.dims) == 2 and min(value.dims) > 2]
    assert {value.data_type for value in found} == {onnx.TensorProto.INT8}


@pytest.mark.slow
def test_openvino(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    model = classifier()
    report = cofiprune.export(model, tmp_path, format="openvino", int8=True, dataset=rows(model), max_drop=0.05)
    name = "openvino/openvino_model_qint8_quantized.xml"
    assert report.score[name] >= 0.95
    weights = [(tmp_path / "openvino" / f"openvino_model{end}.bin").stat().st_size for end in ("", "_qint8_quantized")]
    assert weights[1] < 0.4 * weights[0]
