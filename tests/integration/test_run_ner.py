"""Named entities: tokens and their labels, scores per entity, files, mistakes, and runs of all steps."""

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer, BertConfig, BertForTokenClassification

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data"
NAMES = ("O", "B-person", "I-person", "B-place", "I-place")


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of the examples by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield importlib.import_module


@pytest.fixture(scope="module")
def ner(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("ner")


@pytest.fixture(scope="module")
def tokenizer(example: Callable[[str], ModuleType]) -> Any:
    return AutoTokenizer.from_pretrained(str(example("quickstart_model").bundled_model()))


# Tokens and scores


def test_the_first_token_of_a_word_has_its_tag_and_the_others_none(ner: ModuleType, tokenizer: Any) -> None:
    sentence = ner.Sentence(("Hanna", "unbelievably", "\u200b", "left", "Gdańsk-Wrzeszcz"), (1, 0, 2, 0, 3))
    ((row,), (first,)) = ner.encode([sentence], tokenizer, 64)
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])

    assert first[2] == -1  # a word of which the tokenizer leaves nothing
    labelled = {int(token): int(label) for token, label in enumerate(row["labels"]) if label != -100}
    assert labelled == {first[0]: 1, first[1]: 0, first[3]: 0, first[4]: 3}
    assert [tokens[token] for token in (first[0], first[3], first[4])] == ["hanna", "left", "gdansk"]
    assert len(tokens) > 8
    assert row["labels"][0] == row["labels"][-1] == -100
    assert [len(row[name]) for name in row] == [len(tokens)] * len(row)


def test_words_that_are_cut_off_have_no_token(ner: ModuleType, tokenizer: Any) -> None:
    sentence = ner.Sentence(("one", "two", "three", "four", "five"), (0, 1, 2, 0, 3))
    ((row,), (first,)) = ner.encode([sentence], tokenizer, 5)
    assert first.tolist() == [1, 2, 3, -1, -1]
    assert row["labels"].tolist() == [-100, 0, 1, 2, -100]


def test_a_tokenizer_that_tells_no_words_is_refused(ner: ModuleType) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="need a fast tokenizer"):
        ner.encode([], Slow(), 8)


def predicted(sentences: Any, firsts: Any, tags: list[list[int]]) -> Any:
    """Predictions as evaluation gives them: an id for each token, here 4 where it should not be read."""
    longest = max(int(first.max()) for first in firsts) + 3
    found = np.full((len(sentences), longest), 4)
    for row, (first, given) in enumerate(zip(firsts, tags, strict=True)):
        for token, tag in zip(first, given, strict=True):
            if token >= 0:
                found[row, token] = tag
    return found


def test_scores_count_whole_entities_of_the_right_kind(ner: ModuleType, tokenizer: Any) -> None:
    sentences = [
        ner.Sentence(("Ada", "Lovelace", "left", "New", "York"), (1, 2, 0, 3, 4)),
        ner.Sentence(("Unbelievably", "Boris", "met", "Chen"), (0, 1, 0, 1)),
    ]
    _, firsts = ner.encode(sentences, tokenizer, 64)

    def scores(*tags: list[int]) -> dict[str, float]:
        found: dict[str, float] = ner.entity_scores(sentences, firsts, predicted(sentences, firsts, list(tags)), NAMES)
        return found

    assert scores([1, 2, 0, 3, 4], [0, 1, 0, 1]) == {"precision": 1, "recall": 1, "f1": 1}
    # Half of a name, a name of the wrong kind, a right one and one that is none.
    assert scores([1, 0, 0, 1, 2], [3, 1, 0, 0]) == pytest.approx({"precision": 1 / 4, "recall": 1 / 4, "f1": 1 / 4})
    assert scores([1, 2, 0, 0, 0], [0, 0, 0, 0]) == pytest.approx({"precision": 1, "recall": 1 / 4, "f1": 2 / 5})
    assert scores([0] * 5, [0] * 4) == {"precision": 0, "recall": 0, "f1": 0}


def test_entities_that_are_cut_off_count_as_missed(ner: ModuleType, tokenizer: Any) -> None:
    sentences = [ner.Sentence(("Ada", "left", "Oslo"), (1, 0, 3))]
    _, firsts = ner.encode(sentences, tokenizer, 4)
    found = ner.entity_scores(sentences, firsts, predicted(sentences, firsts, [[1, 0, 3]]), NAMES)
    assert found == pytest.approx({"precision": 1, "recall": 1 / 2, "f1": 2 / 3})


# Data


ROWS: list[dict[str, Any]] = [
    {"tokens": ["Ada", "left", "New", "York"], "ner_tags": [1, 0, 3, 4]},
    {"tokens": ["Nobody", "met", "Boris", "Novak"], "ner_tags": [0, 0, 1, 2]},
]


def named(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "ner_tags": [NAMES[tag] for tag in row["ner_tags"]]} for row in rows]


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows in the format of the file's ending."""
    if file.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        file.write_text(json.dumps(rows))


@pytest.mark.parametrize("ending", ["parquet", "json", "jsonl"])
@pytest.mark.parametrize("validation", ["validation", "dev"])
def test_tags_are_read_as_ids_or_as_names(ner: ModuleType, tmp_path: Path, ending: str, validation: str) -> None:
    write(tmp_path / f"train.{ending}", ROWS)
    write(tmp_path / f"{validation}.{ending}", named(ROWS))
    data = ner.load_sentences("mine", tmp_path, NAMES)
    assert data.label_names == NAMES
    assert data.train == data.validation == [ner.Sentence(tuple(row["tokens"]), tuple(row["ner_tags"])) for row in ROWS]
    assert not data.test


def test_names_of_tags_are_those_of_the_data(ner: ModuleType, tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.json", named(ROWS))
    data = ner.load_sentences("mine", tmp_path)
    assert data.label_names == ("O", "B-person", "B-place", "I-person", "I-place")
    assert data.train[0].tags == (1, 0, 2, 4)
    assert data.test == data.train


@pytest.mark.parametrize(("task", "names"), [("wnut17", 13), ("wnut_17", 13), ("ncbi_disease", 3)])
def test_names_of_known_data_sets_are_known(ner: ModuleType, tmp_path: Path, task: str, names: int) -> None:
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.json", [{"tokens": ["Ada"], "ner_tags": [1]}])
    data = ner.load_sentences(task, tmp_path)
    assert len(data.label_names) == len(set(data.label_names)) == names
    assert data.label_names[0] == "O"


def test_names_come_with_a_data_set_of_the_hub(
    ner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "tokens": datasets.Sequence(datasets.Value("string")),
            "ner_tags": datasets.Sequence(datasets.ClassLabel(names=list(NAMES))),
        }
    )
    split = datasets.Dataset.from_list(ROWS, features=features)
    asked = []

    def load(name: str) -> Any:
        asked.append(name)
        return datasets.DatasetDict({"train": split, "validation": split})

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = ner.load_sentences("someone/names", None)
    assert asked == ["someone/names"]
    assert data.label_names == NAMES
    assert [sentence.tags for sentence in data.train] == [tuple(row["ner_tags"]) for row in ROWS]

    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": split})
    with pytest.raises(ValueError, match="leondz/wnut_17 needs the splits train and validation; it has train"):
        ner.load_sentences("wnut17", None)


def changed(**changes: Any) -> list[dict[str, Any]]:
    """Two rows, the second with changes; None takes a column away."""
    row = {**ROWS[1], **changes}
    return [ROWS[0], {name: value for name, value in row.items() if value is not None}]


MISTAKES = [
    (changed(ner_tags=None), "row 1 (from 0): there is no column 'ner_tags'; it takes tokens, ner_tags and has tokens"),
    (changed(ner_tags=[0, 0, 1]), "row 1 (from 0): there are 4 tokens and 3 ner_tags"),
    (changed(ner_tags=[0, 0, 1, 5]), "row 1 (from 0): the tag 5 is not an id from 0 to 4"),
    (changed(ner_tags=[0, 0, 1, -1]), "the tag -1 is not an id"),
    (changed(ner_tags=[0, 0, 1, "B-thing"]), "the tag 'B-thing' is not one of O, B-person"),
    (changed(ner_tags=[0, 0, 1, 0.5]), "'ner_tags' must be a list of tags"),
    (changed(tokens="Nobody met Boris"), "'tokens' must be a list of words"),
    ([], "train.json has no rows"),
]


@pytest.mark.parametrize(("rows", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_rows_that_do_not_fit_end_in_one_line(
    example: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    rows: list[dict[str, Any]],
    message: str,
) -> None:
    write(tmp_path / "train.json", rows)
    write(tmp_path / "dev.json", ROWS)
    assert_refused(example, capsys, tmp_path, message, "--data-dir", tmp_path, "--label-names", *NAMES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "mine"], "the tags of 'mine' are ids, and their names are known only for wnut17, ncbi_disease."),
        (["--task", "wnut"], "Did you mean 'wnut17'?"),
        (["--task", "ncbi_disease"], "the tag 3 is not an id from 0 to 2"),
        (["--label-names", "O", "person", "B-place"], "the tag 'person' is neither O nor B-KIND nor I-KIND"),
        (["--label-name", "O"], "Did you mean '--label-names'"),
    ],
)
def test_mistakes_in_options_end_in_one_line(
    example: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.json", ROWS)
    assert_refused(example, capsys, tmp_path, message, "--data-dir", tmp_path, *arguments)


def test_a_model_with_a_head_for_other_tags_is_refused(
    example: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str], tmp_path: Path, tokenizer: Any
) -> None:
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        id2label={0: "O", 1: "B-gene"},
    )  # fmt: skip
    BertForTokenClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    capsys.readouterr()
    message = "has a head for the tags O, B-gene and the data has O, B-person"
    assert_refused(example, capsys, tmp_path, message, "--model", tmp_path / "model")


def assert_refused(
    example: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    message: str,
    *arguments: Any,
) -> None:
    assert example("run_ner").main(["--tiny", *map(str, arguments), "--output-dir", str(folder / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("run_ner: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.skipif(not (REAL / "wnut17").is_dir(), reason="the real data is not here")
@pytest.mark.parametrize(("task", "sizes"), [("wnut17", (3394, 1009, 1287)), ("ncbi_disease", (5432, 923, 940))])
def test_right_tags_are_right_on_the_real_data(
    ner: ModuleType, tokenizer: Any, task: str, sizes: tuple[int, int, int]
) -> None:
    pytest.importorskip("pyarrow")
    data = ner.load_sentences(task, REAL / task)
    assert (len(data.train), len(data.validation), len(data.test)) == sizes
    sentences = data.validation
    _, firsts = ner.encode(sentences, tokenizer, 512)
    right = predicted(sentences, firsts, [list(sentence.tags) for sentence in sentences])
    scores = ner.entity_scores(sentences, firsts, right, data.label_names)
    assert all(value > 0.99 for value in scores.values())


# Runs


def test_tiny_run_goes_through_all_steps(example: Callable[[str], ModuleType], ner: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert example("run_ner").main(["--tiny", "--no-benchmark", "--output-dir", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["headline"] == "f1"
    assert result["sparsity"] == pytest.approx(0.9, abs=0.005)
    assert set(result["metrics"]) == set(result["dense"]["metrics"]) == {"precision", "recall", "f1"}

    # Measured again, row by row, from the files that it left.
    model, tokenizer = AutoModelForTokenClassification.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.id2label == dict(enumerate(ner.MADE_UP_NAMES))
    sentences = ner.made_up(64, seed=1)[:32]
    rows, firsts = ner.encode(sentences, tokenizer, 128)
    found = np.zeros((len(rows), 128), np.int64)
    with torch.inference_mode():
        for index, row in enumerate(rows):
            inputs = {name: torch.tensor([row[name]]) for name in tokenizer.model_input_names}
            found[index, : len(row["labels"])] = model(**inputs).logits[0].argmax(-1).numpy()
    again = ner.entity_scores(sentences, firsts, found, ner.MADE_UP_NAMES)
    assert result["metrics"] == pytest.approx(again, abs=0.03)


def test_tiny_run_on_files_learns_chooses_by_f1_and_measures_the_test_split(
    example: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.jsonl", named(ROWS) * 16)
    out = tmp_path / "out"
    arguments = ["--tiny", "--no-benchmark", "--data-dir", str(tmp_path), "--task", "mine", "--output-dir", str(out)]
    chosen = ["--metric-for-best-model", "f1", "--target-sparsity", "none", "--teacher", "none"]
    training = ["--finetune-epochs", "20", "--finetune-learning-rate", "1e-2"]
    assert example("run_ner").main([*arguments, *chosen, *training]) == 0
    result = json.loads((out / "result.json").read_text())
    assert set(result["metrics"]) == {
        f"{part}{name}" for part in ("", "test_") for name in ("precision", "recall", "f1")
    }
    assert result["metrics"]["f1"] == result["metrics"]["test_f1"] == 1
    assert result["best_step"] is not None
    assert "test_f1" in capsys.readouterr().out
