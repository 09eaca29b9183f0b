"""examples/evaluate.py: its figures are those of the library for every form of a model."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizerFast,
    PreTrainedModel,
)

import cofiprune

Capsys = pytest.CaptureFixture[str]

pytest.importorskip("sklearn")
pytest.importorskip("seqeval")

WORDS = ["red", "green", "blue", "yellow", "white", "the", "a", "thing", "has", "number", "that", "is", "good", "bad"]
SENTIMENT = {0: "negative", 1: "positive"}


@pytest.fixture(scope="module")
def script(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("evaluate")


def save_tokenizer(folder: Path) -> BertTokenizerFast:
    """A tokenizer of less than 500 entries, which is what the sample models have."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{one}" for one in letters), *WORDS]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "vocab.txt"
    file.write_text("\n".join(vocabulary))
    tokenizer = BertTokenizerFast(vocab={word: index for index, word in enumerate(vocabulary)})
    tokenizer.save_pretrained(folder)
    return tokenizer


def model_of(cls: type[PreTrainedModel], seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    return cls(BertConfig(vocab_size=200, max_position_embeddings=64, **sizes, **settings))


def save(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of models by name; `small` is compacted from `dense`."""
    base = tmp_path_factory.mktemp("models")
    dense = model_of(BertForSequenceClassification, id2label=SENTIMENT, label2id={"negative": 0, "positive": 1})
    with torch.no_grad():
        dense.classifier.weight.mul_(50)  # so that the answers differ from row to row
    masks = cofiprune.attach(dense)
    masks["hidden"] = [1] * 12 + [0] * 4
    masks["layers.0.heads"] = [1, 0, 1, 0]
    masks["layers.1.ffn"] = [0]
    small = cofiprune.compact(dense)
    masks.detach()
    return {
        "dense": save(dense, base / "dense"),
        "small": save(small, base / "small"),
        "bare": save(model_of(BertModel), base / "bare"),
        "answers": save(model_of(BertForQuestionAnswering), base / "answers"),
        "three": save(model_of(BertForSequenceClassification, num_labels=3), base / "three"),
        "tags": save(model_of(BertForTokenClassification, id2label={0: "O", 1: "B-x", 2: "I-x"}), base / "tags"),
    }


@pytest.fixture(scope="module")
def sst2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows in the form that GLUE publishes."""
    folder = tmp_path_factory.mktemp("sst2")
    lines = [f"the {WORDS[n % 5]} thing is {('bad', 'good')[n % 2]} {n}\t{n % 2}" for n in range(40)]
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]))
    return folder


def results(script: ModuleType, capsys: Capsys, *arguments: str | Path) -> list[dict[str, Any]]:
    """Return what the script prints with --json."""
    script.main([*map(str, arguments), "--json"])
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_dense_and_compacted_next_to_each_other(
    script: ModuleType, models: dict[str, str], sst2: Path, capsys: Capsys, tmp_path: Path
) -> None:
    names = (models["dense"], models["small"])
    lengths = ("--data-dir", sst2, "--batch-size", "16", "--runs", "2", "--max-length", "48")
    found = results(script, capsys, "SST-2", *names, *lengths)
    assert [result["model"] for result in found] == list(names)
    tokenizer = save_tokenizer(tmp_path)
    lines = (sst2 / "dev.tsv").read_text().splitlines()[1:]
    rows = [{**tokenizer(line.split("\t")[0]), "labels": int(line.split("\t")[1])} for line in lines]
    for result, state in zip(found, ("dense", "compacted"), strict=True):
        model = BertForSequenceClassification.from_pretrained(result["model"])
        size = cofiprune.summary(model)
        assert result["state"] == size.state == state
        encoder = sum(value.numel() for value in model.bert.encoder.parameters())
        assert result["size"] == size.layer_parameters == encoder  # no embeddings, pooler or head
        assert result["parameters"] == sum(value.numel() for value in model.parameters())
        assert result["sparsity"] == size.sparsity
        assert result["accuracy"] == pytest.approx(cofiprune.evaluate(model, rows)["accuracy"])
        assert 0 < result["seconds per example"] < 1
    assert found[1]["sparsity"] == 1 - found[1]["size"] / found[0]["size"]
    assert found[0]["speed-up over the first"] == 1


def test_the_table_has_what_the_original_prints(
    script: ModuleType, models: dict[str, str], capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = ["--tiny", "--max-length", "48", "--device", "cpu"]
    script.main(["sst2", models["dense"], models["small"], *words])
    printed = capsys.readouterr().out
    small = cofiprune.summary(BertForSequenceClassification.from_pretrained(models["small"]))
    for text in (
        "sst2; cpu, batch 4 of 48 tokens", "size", "sparsity", "accuracy", "seconds per example", models["small"],
        f"{small.layer_parameters:,}", f"{small.sparsity:.4f}",
    ):  # fmt: skip
        assert text in printed


def test_labels_are_matched_by_name(
    script: ModuleType, models: dict[str, str], sst2: Path, capsys: Capsys, tmp_path: Path
) -> None:
    model = BertForSequenceClassification.from_pretrained(models["dense"])
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight.flip(0))
        model.classifier.bias.copy_(model.classifier.bias.flip(0))
    model.config.id2label, model.config.label2id = {0: "Positive", 1: "Negative"}, {"Positive": 0, "Negative": 1}
    words = ("--data-dir", sst2, "--runs", "1", "--max-length", "48")
    found = results(script, capsys, "sst2", models["dense"], save(model, tmp_path), *words)
    assert found[0]["accuracy"] == found[1]["accuracy"]


QUESTION = {"id": "1", "context": "the red thing", "question": "a", "answers": {"text": ["red"], "answer_start": [4]}}
TAGGED = {"tokens": ["the", "red", "thing"], "ner_tags": ["O", "B-x", "I-x"]}


@pytest.mark.parametrize(
    ("task", "model", "rows", "metrics"),
    [
        ("mnli", "three", [{"premise": "red", "hypothesis": "blue", "label": n % 3} for n in range(6)], {"accuracy"}),
        ("squad", "answers", [QUESTION] * 2, {"exact_match", "f1"}),
        ("squad_v2", "answers", [QUESTION] * 2, {"exact_match", "has_answer_f1"}),
        ("ner", "tags", [TAGGED] * 2, {"precision", "recall", "f1"}),
    ],
)
def test_other_tasks_need_no_rows_for_training(
    script: ModuleType,
    models: dict[str, str],
    capsys: Capsys,
    tmp_path: Path,
    task: str,
    model: str,
    rows: list[dict[str, Any]],
    metrics: set[str],
) -> None:
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = ["--doc-stride", "8"] if "squad" in task else []
    words = ["--data-dir", tmp_path, "--tiny", "--max-length", "64", *more]
    (found,) = results(script, capsys, task, models[model], *words)
    assert metrics <= found.keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sst", "DENSE"], "invalid choice: 'sst'"),
        (["sst2"], "MODEL"),
        (["sst2", "BARE"], "needs a model with a trained head"),
        (["sst2", "ANSWERS"], "needs a model with a trained head: one ...ForSequenceClassification"),
    ],
)
def test_what_cannot_be_measured_is_explained(
    script: ModuleType, models: dict[str, str], capsys: Capsys, words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main([models.get(word.lower(), word) for word in words])
    assert message in f"{stop.value}{capsys.readouterr().err}"
