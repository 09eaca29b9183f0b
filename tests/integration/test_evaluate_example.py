"""examples/evaluate.py: its figures are those of the library for every form of a model, and mistakes are explained."""

import importlib
import json
import shutil
from collections.abc import Iterator, Sequence
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

pytest.importorskip("sklearn")
pytest.importorskip("seqeval")

EXAMPLES = Path(__file__).parents[2] / "examples"
FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "cofi"
ORIGINALS = ("bert4-binary-released", "bert4-soft_binhidden-full_zs")
WORDS = ["red", "green", "blue", "yellow", "white", "the", "a", "thing", "has", "number", "that", "is", "good", "bad"]
SENTIMENT = {0: "negative", 1: "positive"}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield importlib.import_module("evaluate")


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


def results(script: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> list[dict[str, Any]]:
    """What the script prints with --json."""
    code = script.main([*map(str, arguments), "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    found: list[dict[str, Any]] = json.loads(printed.out)
    return found


def rows_of(folder: Path, tokenizer: BertTokenizerFast) -> list[dict[str, Any]]:
    lines = (folder / "dev.tsv").read_text().splitlines()[1:]
    return [{**tokenizer(line.split("\t")[0]), "labels": int(line.split("\t")[1])} for line in lines]


def test_dense_and_compacted_side_by_side(
    script: ModuleType, models: dict[str, str], sst2: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    names = (models["dense"], models["small"])
    found = results(script, capsys, "sst2", *names, "--data-dir", sst2, "--batch-size", "16", "--runs", "2")
    assert [result["model"] for result in found] == list(names)
    rows = rows_of(sst2, save_tokenizer(tmp_path))
    for result, state in zip(found, ("dense", "compacted"), strict=True):
        model = BertForSequenceClassification.from_pretrained(result["model"])
        size = cofiprune.summary(model)
        assert result["state"] == size.state == state
        assert result["size"] == size.layer_parameters
        encoder = sum(value.numel() for value in model.bert.encoder.parameters())
        assert result["size"] == encoder  # no embeddings, pooler or head
        assert result["parameters"] == sum(value.numel() for value in model.parameters())
        assert result["sparsity"] == size.sparsity
        assert result["rows"] == 40
        assert result["metrics"] == {"accuracy": pytest.approx(cofiprune.evaluate(model, rows)["accuracy"])}
        assert 0 < result["seconds_per_example"] < 1
        assert (result["batch_size"], result["timed_batches"], result["runs"]) == (16, 2, 2)
    assert found[0]["sparsity"] == 0
    assert found[1]["sparsity"] == 1 - found[1]["size"] / found[0]["size"]
    assert found[0]["speedup"] == 1
    times = [result["seconds_per_example"] for result in found]
    assert found[1]["speedup"] == pytest.approx(times[0] / times[1])


def test_the_table_has_what_the_original_prints(
    script: ModuleType, models: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert script.main(["SST-2", models["dense"], models["small"], "--tiny", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    small = cofiprune.summary(BertForSequenceClassification.from_pretrained(models["small"]))
    for words in (
        "sst2, 32 rows", "1 thread,", "size", "sparsity", "accuracy", "seconds per example", models["small"],
        f"{small.layer_parameters:,}", f"{small.sparsity:.4f}",
    ):  # fmt: skip
        assert words in printed


def test_labels_are_matched_by_name(
    script: ModuleType, models: dict[str, str], sst2: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = BertForSequenceClassification.from_pretrained(models["dense"])
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight.flip(0))
        model.classifier.bias.copy_(model.classifier.bias.flip(0))
    model.config.id2label, model.config.label2id = {0: "Positive", 1: "Negative"}, {"Positive": 0, "Negative": 1}
    turned = save(model, tmp_path)
    found = results(script, capsys, "sst2", models["dense"], turned, "--data-dir", sst2, "--runs", "1")
    assert found[0]["metrics"] == found[1]["metrics"]


@pytest.mark.parametrize("name", ORIGINALS)
def test_folders_of_the_original(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    if not (FIXTURES / name).is_dir():
        pytest.skip(f"sample directory {name} is not here")
    for file in (FIXTURES / name).iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    save_tokenizer(tmp_path)
    (found,) = results(script, capsys, "mnli", tmp_path, "--tiny")
    model = cofiprune.load_cofi_checkpoint(tmp_path)
    size = cofiprune.summary(model)
    assert (found["size"], found["sparsity"]) == (size.layer_parameters, size.sparsity)
    assert found["state"] == "compacted"
    assert found["size"] == sum(value.numel() for value in model.base_model.encoder.parameters())
    assert 0 < found["sparsity"] < 1
    assert found["metrics"].keys() == {"accuracy", "accuracy_mismatched"}


@pytest.mark.parametrize(
    ("task", "model", "metrics"),
    [("squad", "answers", {"exact_match", "f1"}), ("squad_v2", "answers", {"exact_match", "f1"})],
)
def test_questions(
    script: ModuleType,
    models: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    task: str,
    model: str,
    metrics: set[str],
) -> None:
    more = ("--max-length", "64", "--", "--doc-stride", "8")
    code = script.main([task, models[model], "--tiny", "--json", *more])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    (found,) = json.loads(printed.out)
    assert found["metrics"].keys() >= metrics


def test_tags_of_ones_own(
    script: ModuleType, models: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [{"tokens": ["the", "red", "thing"], "ner_tags": ["O", "B-x", "I-x"]} for _ in range(20)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    (found,) = results(script, capsys, "ner", models["tags"], "--data-dir", tmp_path, "--tiny")
    assert found["metrics"].keys() == {"precision", "recall", "f1"}
    assert found["rows"] == 20


def test_classes_of_ones_own(
    script: ModuleType, models: dict[str, str], sst2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = results(
        script, capsys, "classification", models["dense"], "--validation-file", sst2 / "dev.tsv", "--runs", "1"
    )
    (known,) = results(script, capsys, "sst2", models["dense"], "--data-dir", sst2, "--runs", "1")
    assert found["metrics"]["accuracy"] == known["metrics"]["accuracy"]


QUESTION = {"id": "1", "context": "the red thing", "question": "a", "answers": {"text": ["red"], "answer_start": [4]}}
TAGGED = {"tokens": ["the", "red", "thing"], "ner_tags": ["O", "B-x", "I-x"]}


@pytest.mark.parametrize(
    ("task", "model", "file", "rows"),
    [
        ("sst2", "dense", "dev.tsv", "sentence\tlabel\nred\t0\nblue\t1\n"),
        ("ner", "tags", "validation.json", json.dumps([TAGGED] * 2)),
        ("squad", "answers", "dev.jsonl", "\n".join([json.dumps(QUESTION)] * 2)),
    ],
)
def test_it_takes_no_rows_for_training(
    script: ModuleType,
    models: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    task: str,
    model: str,
    file: str,
    rows: str,
) -> None:
    (tmp_path / file).write_text(rows)
    code = script.main([task, models[model], "--data-dir", str(tmp_path), "--tiny", "--json", "--max-length", "64",
                        *(["--", "--doc-stride", "8"] if task == "squad" else [])])  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert json.loads(printed.out)[0]["rows"] == 2


@pytest.mark.parametrize("model", ["dense", "answers"])
def test_weights_in_a_pickle_do_not_make_a_folder_the_originals(
    script: ModuleType, models: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str
) -> None:
    shutil.copytree(models[model], tmp_path / "plain")
    head = {"dense": BertForSequenceClassification, "answers": BertForQuestionAnswering}[model]
    torch.save(head.from_pretrained(models[model]).state_dict(), tmp_path / "plain" / "pytorch_model.bin")
    (tmp_path / "plain" / "model.safetensors").unlink()
    task, more = ("sst2", []) if model == "dense" else ("squad", ["--max-length", "64", "--", "--doc-stride", "8"])
    code = script.main([task, models[model], str(tmp_path / "plain"), "--tiny", "--json", *more])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    one, other = json.loads(printed.out)
    assert one["metrics"] == other["metrics"]
    assert other["state"] == "dense"


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x04}q\x00."])
def test_damaged_weights_are_told_of(
    script: ModuleType, models: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes
) -> None:
    shutil.copytree(models["dense"], tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").unlink()
    (tmp_path / "broken" / "pytorch_model.bin").write_bytes(content)
    assert script.main(["sst2", str(tmp_path / "broken"), "--tiny"]) == 2
    error = capsys.readouterr().err
    assert "pytorch_model.bin" in error
    assert error.count("\n") == 1


def test_speed_is_that_of_whole_batches_in_their_order(script: ModuleType, models: dict[str, str]) -> None:
    model = BertForSequenceClassification.from_pretrained(models["dense"])
    rows = [{"input_ids": [2] + [7] * (n % 8) + [3], "labels": 0} for n in range(50)]
    seen: list[torch.Size] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    (speed,) = importlib.import_module("speed").speeds([model], [rows], batch_size=8, batches=3, runs=2, warmup=1)
    assert {shape[0] for shape in seen} == {8}
    assert len(seen) == 3 * (1 + 2)
    assert speed.batches == 3
    assert speed.tokens == 9  # the longest of any eight neighbours; grouped by length the batches would differ
    assert speed.examples_per_second == 1 / speed.seconds_per_example
    seen.clear()
    (speed,) = importlib.import_module("speed").speeds([model], [rows[:5]], batch_size=8, runs=1)
    assert speed.batch_size == 5


MISTAKES: list[tuple[Sequence[str], str]] = [
    (["sst", "DENSE"], "Did you mean 'sst2'?"),
    (["sst2"], "MODEL"),
    (["sst2", "EMPTY"], "holds no model"),
    (["sst2", "no/such/folder"], "there is no directory"),
    (["sst2", "BARE"], "needs a model with a trained head"),
    (["sst2", "ANSWERS"], "needs a model with a trained head"),
    (["mnli", "DENSE"], "predicts negative, positive, and the labels of mnli are entailment, neutral, contradiction"),
    (["ncbi_disease", "TAGS"], "tags"),
    (["sst2", "DENSE", "--data-dir", "EMPTY"], "no validation"),
    (["sst2", "DENSE", "--data-dir", "WORDS"], "its columns are words, label"),
    (["sst2", "DENSE", "--data-dir", "EMPTY"], "which is empty"),
    (["sst2", "DENSE", "--data-dir", "ABOVE"], "which has empty/, words/"),
    (["squad", "ANSWERS", "--data-dir", "ABOVE"], "which has empty/, words/"),
    (["sst2", "DENSE", "--data-dir", "no-such-folder"], "does not exist"),
    (["sst2", "DENSE", "--device", "nowhere"], "cannot use the device"),
    (["sst2", "DENSE", "--batchsize", "3"], "Did you mean '--batch-size'?"),
    (["sst2", "DENSE", "--batch-size", "0"], "less than 1"),
    (["squad", "ANSWERS", "--", "--doc-strid", "3"], "Did you mean '--doc-stride'?"),
    (["classification", "DENSE"], "--validation-file"),
    (["ner", "TAGS"], "--data-dir"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda value: " ".join(value)[:40])
def test_a_mistake_ends_in_one_line(
    script: ModuleType,
    models: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: Sequence[str],
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "words").mkdir()
    for name in ("train", "dev"):
        (tmp_path / "words" / f"{name}.tsv").write_text("words\tlabel\nred\t1\n")
    places = {name.upper(): folder for name, folder in models.items()}
    places |= {"EMPTY": str(tmp_path / "empty"), "WORDS": str(tmp_path / "words"), "ABOVE": str(tmp_path)}
    given = [places.get(argument, argument) for argument in arguments]
    tiny = [] if "--data-dir" in given or given[0] in ("classification", "ner") else ["--tiny"]
    place = given.index("--") if "--" in given else len(given)
    code = script.main([*given[:place], *tiny, *given[place:]])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("evaluate: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_without_a_tokenizer(
    script: ModuleType, models: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(Path(models["dense"]) / name, tmp_path / name)
    assert script.main(["sst2", str(tmp_path), "--tiny"]) == 2
    assert "has no tokenizer; copy the files" in capsys.readouterr().err
