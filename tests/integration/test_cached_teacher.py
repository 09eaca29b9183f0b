"""A teacher's outputs in the rows take the place of the teacher, and `teach` writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cofiprune
from cofiprune.data.files import load_rows
from cofiprune.errors import CheckpointError, CofipruneError, DataError, SettingsError
from cofiprune.training import teach as teaching
from toy import bert, spans, unlabelled
from toy import rows as new_rows

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 16, "progress": False, "logging_steps": 1}
HEADS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "classes": ("BertForSequenceClassification", lambda ids: {"labels": ids[1] % 2}, {}),
    "numbers": ("BertForSequenceClassification", lambda ids: {"labels": len(ids) / 10}, {"num_labels": 1}),
    "tags": ("BertForTokenClassification", lambda ids: {"labels": [token % 2 for token in ids]}, {}),
    "spans": ("BertForQuestionAnswering", spans, {}),
    "words": ("BertForMaskedLM", lambda ids: {"labels": list(ids)}, {}),
    "states": ("BertModel", lambda ids: {}, {}),
}


def taught(kind: str, file: Path, count: int = 32, **settings: Any) -> tuple[Any, list[dict[str, Any]], Any]:
    """A teacher, rows, and the same with its outputs."""
    name, labels, changes = HEADS[kind]
    teacher = bert(name, seed=1, **{"hidden_size": 24, "num_hidden_layers": 3, **changes}).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(3)
    rows = new_rows(count, labels=labels)
    assert cofiprune.teach(teacher, rows, file, progress=False, **settings) == file
    return teacher, rows, load_rows(file)


def student(kind: str) -> Any:
    name, _, changes = HEADS[kind]
    return bert(name, **changes)


def losses(result: Any) -> list[float]:
    return [entry["loss"] for entry in result.history if "loss" in entry]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", HEADS)
def test_the_file_teaches_what_the_teacher_does(kind: str, dtype: str, tmp_path: Path) -> None:
    outputs = ["embedding" if kind == "states" else "logits", "hidden"]
    teacher, rows, cached = taught(kind, tmp_path / "rows.parquet", outputs=outputs, layers=2, dtype=dtype)
    assert cached[0]["teacher_hidden"].dtype == dtype
    one, other = student(kind), student(kind)
    live = losses(cofiprune.finetune(one, rows, teacher=teacher, distill_layers=2, **QUICK))
    found = losses(cofiprune.finetune(other, cached, **QUICK))
    assert len(found) == 4
    assert found == pytest.approx(live, rel=1e-6 if dtype == "float32" else 2e-3)
    if dtype == "float32":
        for name, value in one.state_dict().items():
            assert torch.allclose(value.float(), other.state_dict()[name].float(), atol=2e-6), name


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
@pytest.mark.parametrize("method", ["one-shot", "cofi", "gates"])
def test_pruning_learns_from_it_too(method: str, ending: str, tmp_path: Path) -> None:
    teacher, rows, cached = taught("classes", tmp_path / f"rows.{ending}", 48, dtype="float32")
    settings = {**QUICK, "target_sparsity": 0.4, "method": method, "distill_layers_weight": 0, "finetune_epochs": 1}
    live = cofiprune.prune(student("classes"), rows, teacher=teacher, **settings)
    found = cofiprune.prune(student("classes"), cached, **settings)
    assert found.plan == live.plan
    assert losses(found) == pytest.approx(losses(live), rel=1e-5)


def test_both_files_hold_the_same(tmp_path: Path) -> None:
    for dtype in ("float16", "float32"):
        found = [
            taught("tags", tmp_path / f"{dtype}.{ending}", outputs=("logits", "hidden"), dtype=dtype)[2]
            for ending in ("parquet", "jsonl")
        ]
        for one, other in zip(*found, strict=True):
            assert one.keys() == other.keys() == {"input_ids", "labels", "teacher_logits", "teacher_hidden"}
            for name in one:
                assert np.array_equal(np.asarray(one[name]), np.asarray(other[name], np.asarray(one[name]).dtype))


def test_a_call_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teaching, "PART", 4)
    file, teacher, rows = tmp_path / "rows.jsonl", bert(seed=1).eval(), new_rows(18)
    calls, left = [], 3

    def limited(*args: Any) -> None:
        calls.append(1)
        if len(calls) > left:
            raise KeyboardInterrupt

    handle = teacher.register_forward_pre_hook(limited)
    with pytest.raises(KeyboardInterrupt):
        cofiprune.teach(teacher, rows, file, progress=False)
    assert not file.exists()
    with pytest.raises(CheckpointError, match="another teacher or other settings"):
        cofiprune.teach(teacher, rows, file, dtype="float32", progress=False)
    with pytest.raises(CheckpointError, match="parts of other rows"):
        cofiprune.teach(teacher, rows[1:], file, progress=False)
    left, begun = 100, len(calls)
    cofiprune.teach(teacher, (row for row in rows), file, progress=False)
    handle.remove()
    assert len(calls) - begun == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]
    cofiprune.teach(teacher, rows, tmp_path / "whole.jsonl", progress=False)
    assert file.read_text() == (tmp_path / "whole.jsonl").read_text()
    with pytest.raises(SettingsError, match="is there already"):
        cofiprune.teach(teacher, rows, file, progress=False)
    cofiprune.teach(teacher, rows[:7], file, overwrite=True, progress=False)
    assert len(file.read_text().splitlines()) == 7


def test_no_more_than_a_part_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teaching, "PART", 4)
    ahead: list[int] = []
    teacher = bert(seed=1).eval()
    read = 0

    def stream() -> Iterator[dict[str, Any]]:
        nonlocal read
        for row in new_rows(18):
            read += 1
            yield row

    done = 0

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal done
        ahead.append(read - done)
        done += len(kwargs["input_ids"])

    teacher.register_forward_pre_hook(count, with_kwargs=True)
    cofiprune.teach(teacher, stream(), tmp_path / "rows.parquet", progress=False)
    assert max(ahead) == 4
    assert len(load_rows(tmp_path / "rows.parquet")) == 18


def changed(rows: list[dict[str, Any]], index: int, **cells: Any) -> list[dict[str, Any]]:
    return [{**row, **(cells if number == index else {})} for number, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("name", "rows", "arguments", "words"),
    [
        ("BertForSequenceClassification", lambda rows: changed(rows, 3, teacher_logits=[1.0, 2.0, 3.0]), {},
         r"row 3: 'teacher_logits' has shape \(3,\), those of this BertForSequenceClassification are \(2,\)"),
        ("BertForSequenceClassification", lambda rows: changed(rows, 3, teacher_logits=[1.0, float("nan")]), {},
         "row 3: 'teacher_logits' holds nan"),
        ("BertForSequenceClassification", lambda rows: changed(rows, 3, teacher_logits=None), {},
         "row 3 lacks 'teacher_logits'"),
        ("BertForSequenceClassification", lambda rows: rows, {"teacher": "self"}, "take the place of a teacher"),
        ("BertForSequenceClassification", lambda rows: rows, {"unlabelled_dataset": unlabelled(4)},
         "unlabelled_dataset: its rows lack 'teacher_logits'"),
        ("BertModel", lambda rows: rows, {}, "pass 'teacher_embedding'"),
        ("BertForTokenClassification", lambda rows: rows, {}, r"'teacher_logits' has shape \(2,\)"),
        ("BertForSequenceClassification", lambda rows: [{**row, "teacher_embedding": [1.0]} for row in rows], {},
         "learns from 'teacher_logits'"),
        ("BertForSequenceClassification", lambda rows: [{**row, "teacher_hidden": [[1.0]]} for row in rows], {},
         "same tokenizer and max_length"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("run", ["prune", "finetune"])
def test_what_does_not_fit_is_refused_before_anything_runs(
    run: str, name: str, rows: Any, arguments: dict[str, Any], words: str
) -> None:
    given = [{**row, "teacher_logits": [0.5, -0.5]} for row in unlabelled(16)]
    target = {"target_sparsity": 0.4, "method": "one-shot", "finetune_epochs": 1} if run == "prune" else {}
    with pytest.raises(CofipruneError, match=words):
        getattr(cofiprune, run)(bert(name), rows(given), progress=False, **arguments, **target)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"output": "rows.csv"}, SettingsError, "must end in .parquet or .jsonl"),
        ({"outputs": "logit"}, SettingsError, "Did you mean 'logits'"),
        ({"outputs": ["embedding"]}, SettingsError, "has no embedding; it has logits and hidden"),
        ({"dtype": "float8"}, SettingsError, "takes 'float16' or 'float32'"),
        ({"dataset": [{"input_ids": [99]}]}, DataError, "from row 0 on: .*token id 99"),
        ({"dataset": []}, DataError, "no rows"),
        ({"dataset": [{"text": "words"}]}, DataError, "tokenise the text first"),
        ({"scale": 1e6}, DataError, "too large for float16; pass dtype='float32'"),
        ({"lyers": 1}, SettingsError, "Did you mean 'layers'"),
    ],
)
def test_mistakes_of_teach(arguments: dict[str, Any], error: type[CofipruneError], words: str, tmp_path: Path) -> None:
    teacher = bert(seed=1).eval()
    with torch.no_grad():
        teacher.classifier.bias.add_(arguments.pop("scale", 0))
    given = {"dataset": new_rows(4), "output": "rows.jsonl", "progress": False, **arguments}
    given["output"] = tmp_path / given["output"]
    with pytest.raises(error, match=words):
        cofiprune.teach(teacher, **given)


@pytest.mark.parametrize("width", [16, 24])
def test_rows_that_are_padded_keep_their_outputs(width: int, tmp_path: Path) -> None:
    """Also where the states are as wide as the rows are long, and where padding goes up to a multiple."""
    teacher = bert(seed=1, hidden_size=width).eval()
    rows = [
        {"input_ids": row["input_ids"] + [0] * (16 - len(row["input_ids"])), "labels": row["labels"],
         "attention_mask": [1] * len(row["input_ids"]) + [0] * (16 - len(row["input_ids"]))}
        for row in new_rows(24)
    ]  # fmt: skip
    file = cofiprune.teach(teacher, rows, tmp_path / "rows.parquet", outputs=["logits", "hidden"], dtype="float32",
                           progress=False)  # fmt: skip
    cached = load_rows(file)
    assert len(cached[0]["teacher_hidden"]) == sum(rows[0]["attention_mask"])
    whole = [{**row, "teacher_hidden": np.pad(row["teacher_hidden"], [(0, 16 - len(row["teacher_hidden"])), (0, 0)])}
             for row in cached]  # fmt: skip
    for settings in ({}, {"pad_to_multiple_of": 8}):
        live = losses(cofiprune.finetune(bert(), rows, teacher=teacher, **QUICK, **settings))
        for taught_rows in (cached, whole):
            found = losses(cofiprune.finetune(bert(), taught_rows, **QUICK, **settings))
            assert found == pytest.approx(live, rel=1e-6)


def test_rows_without_labels_have_outputs_as_well(tmp_path: Path) -> None:
    teacher, rows, cached = taught("numbers", tmp_path / "rows.parquet", dtype="float32")
    bare = unlabelled(16, seed=5)
    cofiprune.teach(teacher, bare, tmp_path / "bare.jsonl", dtype="float32", progress=False)
    settings = {**QUICK, "distill_layers_weight": 0}
    live = cofiprune.finetune(student("numbers"), rows, unlabelled_dataset=bare, teacher=teacher, **settings)
    found = cofiprune.finetune(student("numbers"), cached, unlabelled_dataset=tmp_path / "bare.jsonl", **settings)
    assert losses(found) == pytest.approx(losses(live), rel=1e-5)


def test_evaluation_passes_over_the_columns(tmp_path: Path) -> None:
    teacher, rows, cached = taught("classes", tmp_path / "rows.parquet", outputs=("logits", "hidden"))
    assert cofiprune.evaluate(teacher, cached) == cofiprune.evaluate(teacher, rows)
    cofiprune.finetune(student("classes"), rows, eval_dataset=cached, **QUICK)


def test_text_keeps_its_outputs(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(35))]
    tokenizer = BertTokenizerFast(vocab={name: index for index, name in enumerate(names)})
    texts = [{"sentence": f"w{n % 30} w3", "label": n % 2, "id": str(n)} for n in range(20)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, texts)))
    teacher, file = bert(seed=1).eval(), tmp_path / "out.parquet"
    cofiprune.teach(teacher, tmp_path / "in.jsonl", file, tokenizer=tokenizer, outputs=["logits", "hidden"],
                    dtype="float32", progress=False)  # fmt: skip
    found = load_rows(file)
    assert [{name: row[name] for name in texts[0]} for row in found] == texts
    one = cofiprune.finetune(bert(), texts, teacher=teacher, tokenizer=tokenizer, **QUICK)
    other = cofiprune.finetune(bert(), file, tokenizer=tokenizer, **QUICK)
    assert losses(other) == pytest.approx(losses(one), rel=1e-6)
