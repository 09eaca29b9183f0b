"""Named entities: scores per entity, the names of tags, and runs of all steps."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from cofiprune.data import Labels, tokenise

pytest.importorskip("seqeval")

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
NAMES = ("O", "B-person", "I-person", "B-place", "I-place")
ROWS: list[dict[str, Any]] = [
    {"tokens": ["Ada", "Lovelace", "left", "New", "York"], "ner_tags": [1, 2, 0, 3, 4]},
    {"tokens": ["Unbelievably", "Boris", "met", "Chen"], "ner_tags": [0, 1, 0, 1]},
]
NAMED = [{**row, "ner_tags": [NAMES[tag] for tag in row["ner_tags"]]} for row in ROWS]


@pytest.fixture(scope="module")
def ner(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("run_ner")


@pytest.fixture(scope="module")
def tagger(example: Callable[[str], ModuleType], ner: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small model for the tags, and its tokenizer."""
    folder = example("bundled").tiny_bert(tmp_path_factory.mktemp("ner") / "tiny", seed=0)
    return ner.load_model(folder, Labels(NAMES)), ner.load_tokenizer(folder)


def predicted(rows: Any, tags: list[list[int]]) -> Any:
    """Predictions as evaluation gives them: an id for each token, here 4 where it should not be read."""
    found = np.full((len(rows), max(len(row["words"]) for row in rows)), 4)
    for row, (tokens, given) in enumerate(zip(rows, tags, strict=True)):
        for token, word in enumerate(tokens["words"]):
            if word >= 0:
                found[row, token] = given[word]
    return found


def test_scores_count_whole_entities_of_the_right_kind(ner: ModuleType, tagger: Any) -> None:
    model, tokenizer = tagger
    rows = tokenise(ROWS, tokenizer, model)

    def scores(*tags: list[int]) -> dict[str, float]:
        found: dict[str, float] = ner.entity_scores(NAMED, rows, predicted(rows, list(tags)), Labels(NAMES))
        assert found == ner.entity_scores(ROWS, rows, predicted(rows, list(tags)), Labels(NAMES))
        return found

    assert scores([1, 2, 0, 3, 4], [0, 1, 0, 1]) == {"precision": 1, "recall": 1, "f1": 1}
    # Half of a name, a name of the wrong kind, a right one and one that is none.
    assert scores([1, 0, 0, 1, 2], [3, 1, 0, 0]) == pytest.approx({"precision": 1 / 4, "recall": 1 / 4, "f1": 1 / 4})
    assert scores([1, 2, 0, 0, 0], [0, 0, 0, 0]) == pytest.approx({"precision": 1, "recall": 1 / 4, "f1": 2 / 5})
    assert scores([0] * 5, [0] * 4) == {"precision": 0, "recall": 0, "f1": 0}

    cut = [{"tokens": ["Ada", "left", "Oslo"], "ner_tags": [1, 0, 3]}]  # what is cut off counts as missed
    rows = tokenise(cut, tokenizer, model, max_length=4)
    found = ner.entity_scores(cut, rows, predicted(rows, [[1, 0, 3]]), Labels(NAMES))
    assert found == pytest.approx({"precision": 1, "recall": 1 / 2, "f1": 2 / 3})


def write(folder: Path, rows: list[dict[str, Any]], *splits: str) -> list[str]:
    for split in splits:
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["--task", "mine", "--data-dir", str(folder)]


def test_names_of_tags_are_those_of_the_data_or_given(ner: ModuleType, tmp_path: Path) -> None:
    words = write(tmp_path, NAMED, "train", "dev")
    train, measured, labels = ner.load_data(ner.parse(words)[0])
    assert set(labels.names) == set(NAMES)
    assert train == measured[""] == NAMED
    assert list(measured) == [""]  # there is no test split
    words = write(tmp_path, ROWS, "train", "validation", "test")
    _, measured, labels = ner.load_data(ner.parse([*words, "--label-names", ",".join(NAMES)])[0])
    assert labels.names == NAMES
    assert list(measured) == ["", "test_"]
    with pytest.raises(SystemExit, match="the tags of mine are ids; give their names"):
        ner.load_data(ner.parse(words)[0])
    for task, count in (("wnut17", 13), ("ncbi_disease", 3)):
        *_, labels = ner.load_data(ner.parse([*words, "--task", task])[0])
        assert len(set(labels.names)) == count
        assert labels.names[0] == "O"


def test_names_come_with_a_data_set_of_the_hub(ner: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    tags = SimpleNamespace(feature=SimpleNamespace(names=list(NAMES)))
    split = type("Split", (list,), {"features": {"ner_tags": tags}})(ROWS)
    asked = []

    def load(name: str) -> Any:
        asked.append(name)
        return {"train": split, "validation": split}

    monkeypatch.setattr(datasets, "load_dataset", load)
    train, _, labels = ner.load_data(ner.parse(["--task", "someone/names"])[0])
    assert set(asked) == {"someone/names"}
    assert labels.names == NAMES
    assert train == NAMED


def test_a_model_with_a_head_for_other_tags_is_refused(ner: ModuleType, tagger: Any, tmp_path: Path) -> None:
    model, tokenizer = tagger
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"tokens": ["a"], "ner_tags": ["B-gene"]}, {"tokens": ["a"], "ner_tags": ["O"]}]
    words = write(tmp_path, rows, "train", "dev")
    with pytest.raises(ValueError, match="label 'B-gene' is not among O, B-person"):
        ner.main([*words, "--tiny", "--model", str(tmp_path / "model"), "--output-dir", str(tmp_path / "out")])


@pytest.mark.skipif(not (REAL / "wnut17").is_dir(), reason="the real data is not here")
@pytest.mark.parametrize(("task", "sizes"), [("wnut17", (3394, 1009, 1287)), ("ncbi_disease", (5432, 923, 940))])
def test_right_tags_are_right_on_the_real_data(
    ner: ModuleType, tagger: Any, task: str, sizes: tuple[int, int, int]
) -> None:
    pytest.importorskip("pyarrow")
    train, measured, labels = ner.load_data(ner.parse(["--task", task, "--data-dir", str(REAL / task)])[0])
    assert (len(train), len(measured[""]), len(measured["test_"])) == sizes
    model, tokenizer = tagger
    sentences = measured[""][:300]
    rows = tokenise([{"tokens": row["tokens"]} for row in sentences], tokenizer, model, max_length=512)
    right = predicted(rows, [labels.encode(row["ner_tags"]) for row in sentences])
    assert all(value > 0.99 for value in ner.entity_scores(sentences, rows, right, labels).values())


def test_tiny_run_goes_through_all_steps(ner: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ner.main(["--tiny", "--no-benchmark", "--output-dir", str(out)])
    result = json.loads((out / "result.json").read_text())
    assert result["sparsity"] == pytest.approx(0.9, abs=0.005)
    scores = {f"{split}{name}" for split in ("", "test_") for name in ("precision", "recall", "f1")}
    assert scores < set(result["pruned"]) == set(result["dense"])

    # Measured again, row by row, from the files that it left.
    model, tokenizer = AutoModelForTokenClassification.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    labels = Labels.of_model(model.config)
    sentences = ner.made_up(1)[:32]
    rows = tokenise(sentences, tokenizer, model)
    found = np.zeros((len(rows), 128), np.int64)
    with torch.inference_mode():
        for index, row in enumerate(rows):
            inputs = {name: torch.tensor([row[name]]) for name in tokenizer.model_input_names}
            found[index, : len(row["labels"])] = model(**inputs).logits[0].argmax(-1).numpy()
    again = ner.entity_scores(sentences, rows, found, labels)
    assert {name: result["pruned"][name] for name in again} == pytest.approx(again, abs=0.03)


def test_tiny_run_on_files_learns_and_chooses_by_f1(ner: ModuleType, tmp_path: Path) -> None:
    words = write(tmp_path, NAMED * 16, "train", "validation", "test")
    chosen = ["--metric-for-best-model", "f1", "--target-sparsity", "none"]
    training = ["--finetune-epochs", "20", "--finetune-learning-rate", "1e-2"]
    ner.main(["--tiny", "--no-benchmark", *words, *chosen, *training, "--output-dir", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["pruned"]["f1"] == result["pruned"]["test_f1"] == 1
    assert result["best_step"] is not None
