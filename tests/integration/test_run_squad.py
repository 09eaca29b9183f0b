"""Question answering: SQuAD's measures, answers from logits, and runs of all steps."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from cofiprune.data import tokenise

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "squad"


@pytest.fixture(scope="module")
def squad(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("run_squad")


@pytest.fixture(scope="module")
def cut(squad: ModuleType, example: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Cut questions into windows."""
    folder = example("bundled").tiny_bert(tmp_path_factory.mktemp("squad") / "tiny", seed=0)
    model, tokenizer = squad.load_model(folder), AutoTokenizer.from_pretrained(folder)
    return lambda questions, length=384, stride=128: tokenise(
        questions, tokenizer, model, max_length=length, stride=stride
    )


def ask(context: str, *answers: str) -> dict[str, Any]:
    starts = [context.index(text) for text in answers]
    return {"question": "Who won?", "context": context, "answers": {"text": list(answers), "answer_start": starts}}


def options(**changes: Any) -> Any:
    defaults = {"n_best": 20, "max_answer_length": 30, "version_2_with_negative": False, "null_score_threshold": 0.0}
    return SimpleNamespace(**{**defaults, **changes})


# Exact match and F1


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "f1"),
    [
        ("The cat", "cat", 1, 1),  # articles
        ("an apple, a day.", "Apple day", 1, 1),  # punctuation and case
        ("theatre", "atre", 0, 0),  # articles are whole words
        ("U.S.A.", "usa", 1, 1),
        ("New  York\n City", "new york city", 1, 1),
        ("red red car", "red car", 0, 0.8),  # repeats count as often as they are in both
        ("in the old town", "old town hall", 0, 2 / 3),
        ("x", "y", 0, 0),
        ("", "y", 0, 0),
        ("the", "a", 1, 0),  # nothing is left of either, so that they are equal and have no word in common
        ("10–a–20", "10– –20", 1, 1),  # an article gives way to a space
        ("10–20", "10 20", 0, 0),  # a dash beyond ASCII is no punctuation
    ],
)
def test_exact_match_and_f1_follow_the_official_rules(
    squad: ModuleType, prediction: str, answer: str, exact: float, f1: float
) -> None:
    assert squad.exact_match(prediction, answer) == exact
    assert squad.f1(prediction, answer) == squad.f1(answer, prediction) == pytest.approx(f1)


def test_a_question_has_the_best_score_over_its_answers(squad: ModuleType) -> None:
    questions = [ask("the red car won", "red", "red car"), ask("a dog won", "dog")]
    assert squad.squad_metrics(questions, ["the red car", "nobody"], version_2=False) == {"exact_match": 0.5, "f1": 0.5}
    partly = squad.squad_metrics(questions, ["car", ""], version_2=False)
    assert partly == pytest.approx({"exact_match": 0, "f1": (2 / 3) / 2})


def test_an_empty_prediction_is_right_where_there_is_no_answer(squad: ModuleType) -> None:
    questions = [ask("a dog won"), ask("a dog won"), ask("a dog won", "dog"), ask("the a won", "the")]
    found = squad.squad_metrics(questions, ["", "dog", "dog", "."], version_2=True)
    assert found == {
        "exact_match": 0.75,  # an answer of which nothing is left counts as none, as in the official script
        "f1": 0.75,
        "has_answer_exact_match": 1,
        "has_answer_f1": 1,
        "no_answer_exact_match": 0.5,
        "no_answer_f1": 0.5,
    }


# Answers

CONTEXT = " ".join(f"Number {index} came from town {index % 7} on day {index % 5}." for index in range(60))


def logits(rows: list[Any], *points: tuple[int, int, int, float], rest: float = 0.0) -> Any:
    """Logits for windows, padded as evaluation does; a point is (window, first token, last token, value)."""
    starts, ends = np.full((2, len(rows), max(len(row["offsets"]) for row in rows)), -100.0, np.float32)
    for index, row in enumerate(rows):
        starts[index, : len(row["offsets"])] = ends[index, : len(row["offsets"])] = rest
    for window, first, last, value in points:
        starts[window, first] = ends[window, last] = value
    return starts, ends


def test_the_answer_is_the_best_span_over_all_windows(squad: ModuleType, cut: Any) -> None:
    questions = [ask(CONTEXT, "Number 57"), ask("A dog won.", "dog"), ask(CONTEXT, "Number 2")]
    rows = cut(questions, 48, 16)
    points = [
        (index, row["start_positions"], row["end_positions"], 5.0 + index)
        for index, row in enumerate(rows)
        if row["start_positions"]
    ]
    starts, ends = logits(rows, (1, 20, 20, 4.0), *points, rest=-50.0)
    assert squad.find_answers(questions, rows, starts, ends, options()) == ["Number 57", "dog", "Number 2"]


def test_spans_are_in_the_context_in_order_and_not_too_long(squad: ModuleType, cut: Any) -> None:
    question = ask("one two three four five six seven eight", "three")
    rows = cut([question])
    at = {
        word: int(np.flatnonzero(rows[0]["offsets"][:, 0] == question["context"].index(word))[0])
        for word in question["context"].split()
    }

    def best(starts: Any, ends: Any, **settings: Any) -> str:
        return str(squad.find_answers([question], rows, starts, ends, options(**settings))[0])

    starts, ends = logits(rows, (0, at["two"], at["seven"], 9.0))
    ends[0, at["three"]] = 3.0
    assert best(starts, ends) == "two three four five six seven"
    assert best(starts, ends, max_answer_length=6) == "two three four five six seven"
    assert best(starts, ends, max_answer_length=5) == "two three"
    starts[0, 1] = ends[0, 2] = starts[0, 0] = ends[0, 0] = 50.0  # the question and the first special token
    assert best(starts, ends) == "two three four five six seven"
    starts, ends = logits(rows, (0, at["six"], at["two"], 9.0))  # ends before it starts
    ends[0, at["seven"]] = 1.0
    assert best(starts, ends) == "six seven"
    assert best(starts, ends, n_best=1) == ""  # that one start and that one end are no span


def test_no_answer_is_given_when_its_score_is_above_the_best_by_more_than_the_threshold(
    squad: ModuleType, cut: Any
) -> None:
    question = ask(CONTEXT, "Number 57")
    rows = cut([question], 64, 16)
    starts, ends = logits(rows, (2, 30, 30, 2.0), *((index, 0, 0, 3.0) for index in range(len(rows))))

    def best(threshold: float = 0.0, version_2: bool = True) -> str:
        chosen = options(version_2_with_negative=version_2, null_score_threshold=threshold)
        return str(squad.find_answers([question], rows, starts, ends, chosen)[0])

    span = CONTEXT[slice(*rows[2]["offsets"][30])]
    assert best() == best(1.9) == ""  # 6 against 4
    assert best(2.0) == best(version_2=False) == span
    starts[5, 0] = -10.0  # one window in which there seems to be an answer is enough
    assert best() == span


@pytest.mark.skipif(not REAL.is_dir(), reason="the real SQuAD is not here")
def test_right_positions_give_right_answers_on_the_real_data(squad: ModuleType, cut: Any) -> None:
    pytest.importorskip("pyarrow")
    chosen = squad.load_questions(squad.parse(["--data-dir", str(REAL)])[0], "validation", "dev")
    assert len(chosen) == 10570
    chosen = chosen[::40]
    for max_length, stride in ((384, 128), (96, 32)):
        rows = cut(chosen, max_length, stride)
        points = [
            (index, row["start_positions"], row["end_positions"], 9.0 if row["start_positions"] else 1.0)
            for index, row in enumerate(rows)
        ]
        answers = squad.find_answers(chosen, rows, *logits(rows, *points), options(n_best=2))
        scores = squad.squad_metrics(chosen, answers, version_2=False)
        assert 0.97 < scores["exact_match"] <= scores["f1"] <= 1  # an answer may be a part of a token


# Data and runs

ROWS = [ask("A “dog” won the race; the cat came second.", "dog", "“dog”"), ask("It rained.", "It")]


def test_each_version_takes_its_own_files_and_data_set(
    squad: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unanswered = [*ROWS, {**ROWS[0], "answers": {"text": [], "answer_start": []}}]
    (tmp_path / "dev-v1.1.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "dev-v2.0.jsonl").write_text("\n".join(map(json.dumps, unanswered)))
    words = ["--data-dir", str(tmp_path)]
    assert len(squad.load_questions(squad.parse(words)[0], "validation", "dev")) == 2
    words.append("--version_2_with_negative")
    assert len(squad.load_questions(squad.parse(words)[0], "validation", "dev")) == 3
    asked = []

    def load_dataset(name: str, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        return unanswered

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]
    assert len(squad.load_questions(squad.parse(["--version-2-with-negative"])[0], "train")) == 3
    with pytest.raises(SystemExit, match="questions without an answer; --version-2-with-negative allows that"):
        squad.load_questions(squad.parse([])[0], "validation", "dev")
    assert asked == [("rajpurkar/squad_v2", "train"), ("rajpurkar/squad", "validation")]


@pytest.mark.parametrize("version_2", [False, True])
def test_tiny_run_goes_through_all_steps(squad: ModuleType, tmp_path: Path, version_2: bool) -> None:
    chosen = ["--version-2-with-negative", "--null-score-threshold", "0.01"] if version_2 else []
    short = ["--preset", "squad", "--sparsity-warmup-epochs", "0.4", "--pre-finetune-epochs", "0"]
    words = ["--tiny", *chosen, "--max-length", "40", "--doc_stride", "12", "--no-benchmark", *short]
    squad.main([*words, "--output-dir", str(tmp_path)])

    result = json.loads((tmp_path / "result.json").read_text())
    assert result["sparsity"] == pytest.approx(0.9, abs=0.005)
    expected = {"exact_match", "f1"}
    if version_2:
        expected |= {f"{part}_{name}" for part in ("has_answer", "no_answer") for name in ("exact_match", "f1")}
    assert set(result["pruned"]) == set(result["dense"]) == {"layer_parameters", *expected}

    # Measured again, row by row, from the files that it left.
    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    questions = squad.made_up(1, version_2=version_2)[:32]
    rows = tokenise(questions, tokenizer, model, max_length=40, stride=12)
    assert len(rows) > 48
    starts, ends = np.zeros((2, len(rows), 40), np.float32)
    with torch.inference_mode():
        for index, row in enumerate(rows):
            outputs = model(**{name: torch.tensor([row[name]]) for name in tokenizer.model_input_names})
            starts[index, : len(row["input_ids"])] = outputs.start_logits[0].numpy()
            ends[index, : len(row["input_ids"])] = outputs.end_logits[0].numpy()
    answers = squad.find_answers(questions, rows, starts, ends, squad.parse(words)[0])
    again = squad.squad_metrics(questions, answers, version_2=version_2)
    assert {name: result["pruned"][name] for name in again} == pytest.approx(again, abs=0.04)  # one question may turn


def test_tiny_run_on_files_chooses_the_best_by_f1_and_fine_tunes_what_it_left(
    squad: ModuleType, tmp_path: Path
) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, ROWS * 16)))
    common = ["--tiny", "--no-benchmark", "--data-dir", str(tmp_path), "--metric-for-best-model", "f1"]
    first, second = str(tmp_path / "pruned"), str(tmp_path / "finetuned")
    squad.main([*common, "--finetune-epochs", "0", "--teacher", "none", "--output-dir", first])
    squad.main([*common, "--model", first, "--target-sparsity", "none", "--output-dir", second])
    results = [json.loads(Path(folder, "result.json").read_text()) for folder in (first, second)]
    assert results[0]["pruned"]["layer_parameters"] == results[1]["pruned"]["layer_parameters"]
    assert results[1]["best_step"] is not None


def test_lengths_are_those_of_the_original(example: Callable[[str], ModuleType]) -> None:
    glue, squad = (
        example(name).parse(words)[0] for name, words in (("run_glue", ["--task", "rte"]), ("run_squad", []))
    )
    assert (glue.max_length, squad.max_length, squad.doc_stride) == (128, 384, 128)
