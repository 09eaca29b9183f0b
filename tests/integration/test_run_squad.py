"""Question answering: files with questions, mistakes that end in one line, and runs of all steps."""

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of the examples by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield importlib.import_module


@pytest.fixture(scope="module")
def squad(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("squad")


@pytest.fixture(scope="module")
def data(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("squad_data")


# Data


ROWS: list[dict[str, Any]] = [
    {
        "id": "1",
        "title": "Dogs",
        "context": "A “dog” won the race; the cat came second.",
        "question": "Who won?",
        "answers": {"text": ["dog", "“dog”"], "answer_start": [3, 2]},
    },
    {
        "id": "2",
        "title": "Dogs",
        "context": "A “dog” won the race; the cat came second.",
        "question": "Who came second?",
        "answers": {"text": ["the cat"], "answer_start": [22]},
    },
]
UNANSWERED = {**ROWS[0], "id": "3", "question": "Who came third?", "answers": {"text": [], "answer_start": []}}


def nested(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows as SQuAD was published."""
    questions = [
        {
            "id": row["id"],
            "question": row["question"],
            "answers": [
                dict(zip(("text", "answer_start"), pair, strict=True))
                for pair in zip(*row["answers"].values(), strict=True)
            ],
            "is_impossible": not row["answers"]["text"],
        }
        for row in rows
    ]
    return {
        "version": "x",
        "data": [{"title": "Dogs", "paragraphs": [{"context": ROWS[0]["context"], "qas": questions}]}],
    }


def write(file: Path, rows: list[dict[str, Any]], form: str = "") -> None:
    """Write rows in the format of the file's ending, or nested."""
    if file.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        file.write_text(json.dumps(nested(rows) if form == "nested" else rows, indent=1 if form == "nested" else None))


@pytest.mark.parametrize(
    ("train", "validation", "form"),
    [
        ("train.parquet", "validation.parquet", ""),
        ("train.json", "dev.json", ""),
        ("train.jsonl", "validation.jsonl", ""),
        ("train-v2.0.json", "dev-v2.0.json", "nested"),
        ("train-00000-of-00001.parquet", "validation_subset.parquet", ""),
    ],
)
def test_questions_are_read_from_the_published_forms(
    data: ModuleType, squad: ModuleType, tmp_path: Path, train: str, validation: str, form: str
) -> None:
    write(tmp_path / train, [*ROWS, UNANSWERED], form)
    write(tmp_path / validation, ROWS, form)
    found = data.load_questions(tmp_path, version_2=True)
    expected = squad.Question("1", ROWS[0]["context"], "Who won?", ("dog", "“dog”"), (3, 2))
    assert found[0][0] == found[1][0] == expected
    assert found[0][2].answers == ()
    assert [len(side) for side in found] == [3, 2]


def test_each_version_takes_its_own_of_the_original_files(data: ModuleType, tmp_path: Path) -> None:
    for version, rows in (("v1.1", ROWS), ("v2.0", [*ROWS, UNANSWERED])):
        write(tmp_path / f"train-{version}.json", rows, "nested")
        write(tmp_path / f"dev-{version}.json", rows, "nested")
    assert len(data.load_questions(tmp_path, version_2=False)[1]) == 2
    assert len(data.load_questions(tmp_path, version_2=True)[1]) == 3


def changed(**changes: Any) -> list[dict[str, Any]]:
    """Two rows, the second with changes; None takes a column away."""
    row = {**ROWS[1], **changes}
    return [ROWS[0], {name: value for name, value in row.items() if value is not None}]


MISTAKES = [
    (changed(context=None), "row 1 (from 0): there is no column 'context'"),
    (changed(answers=None), "there is no column 'answers'"),
    (changed(question="  "), "'question' must be a text"),
    (
        changed(answers={"text": ["dog"], "answer_start": [4]}),
        "the answer 'dog' does not stand at character 4 of the context, but 'og”'",
    ),
    (changed(answers={"text": ["dog"], "answer_start": [-1]}), "does not stand at character -1"),
    (changed(answers={"text": [""], "answer_start": [0]}), "does not stand at character 0"),
    (changed(answers={"text": ["dog"], "answer_start": []}), "'answers' must be"),
    (changed(answers={"text": ["dog"], "answer_start": ["3"]}), "'answers' must be"),
    (changed(answers=["dog"]), "'answers' must be"),
    ([ROWS[0], UNANSWERED], "the question has no answer; --version-2-with-negative allows that"),
    ([], "has no rows"),
]


@pytest.mark.parametrize(("rows", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_rows_that_are_no_questions_end_in_one_line(
    example: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    rows: list[dict[str, Any]],
    message: str,
) -> None:
    write(tmp_path / "train.json", rows)
    write(tmp_path / "dev.json", ROWS)
    assert_refused(example, capsys, message, "--data-dir", tmp_path, "--output-dir", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-length", "64", "--doc-stride", "64"], "--doc-stride 64 leaves no room"),
        (["--doc-stride", "-1"], "-1 is less than 0"),
        (["--n-best", "0"], "0 is less than 1"),
        (["--max-answer-length", "long"], "whole number"),
        (["--data-dir", "no-such-folder"], "does not exist"),
        (["--data-dir", ROOT / "docs"], "no train-v1.1.* or train.*"),
        (["--max_answer_lengths", "3"], "Did you mean '--max-answer-length'"),
    ],
)
def test_mistakes_in_options_end_in_one_line(
    example: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[Any],
    message: str,
) -> None:
    assert_refused(example, capsys, message, *arguments, "--output-dir", tmp_path / "out")


def assert_refused(
    example: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str], message: str, *arguments: Any
) -> None:
    assert example("run_squad").main(["--tiny", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("run_squad: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_questions_come_from_the_hub(
    data: ModuleType, example: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    datasets = pytest.importorskip("datasets")
    splits = {"train": [*ROWS, UNANSWERED], "validation": ROWS}
    loaded = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or loaded)
    train, validation = data.load_questions(None, version_2=True)
    assert [question.answers for question in train] == [("dog", "“dog”"), ("the cat",), ()]
    assert len(validation) == 2
    with pytest.raises(ValueError, match="rajpurkar/squad, train, row 2 .* the question has no answer"):
        data.load_questions(None, version_2=False)
    assert asked == ["rajpurkar/squad_v2", "rajpurkar/squad"]

    def offline(name: str) -> None:
        raise ConnectionError("no way to the hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert example("run_squad").main(["--output-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error == (
        "run_squad: error: cannot load rajpurkar/squad from the hub (no way to the hub); "
        "--data-dir reads files of your own\n"
    )


def test_a_damaged_file_and_two_files_of_a_split_end_in_an_error(data: ModuleType, tmp_path: Path) -> None:
    write(tmp_path / "dev.json", ROWS)
    (tmp_path / "train.json").write_text('{"data": [{"paragraphs": [{"qas": [{"id": "1"}]}]}]}')
    with pytest.raises(ValueError, match=r"train.json is not nested as SQuAD is: KeyError 'answers'"):
        data.load_questions(tmp_path, version_2=False)
    (tmp_path / "train.json").write_text('{"data": []}')
    with pytest.raises(ValueError, match="train.json has no rows"):
        data.load_questions(tmp_path, version_2=False)
    (tmp_path / "train.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read .*train.json"):
        data.load_questions(tmp_path, version_2=False)
    (tmp_path / "train.json").rename(tmp_path / "train-a.json")
    write(tmp_path / "train-b.json", ROWS)
    with pytest.raises(ValueError, match=r"more than one file for train \(train-a.json, train-b.json\)"):
        data.load_questions(tmp_path, version_2=False)


# Runs


@pytest.mark.parametrize("version_2", [False, True])
def test_tiny_run_goes_through_all_steps(
    example: Callable[[str], ModuleType], squad: ModuleType, tmp_path: Path, version_2: bool
) -> None:
    chosen = ["--version-2-with-negative", "--null-score-threshold", "0.01"] if version_2 else []
    windows = {"max_length": 40, "stride": 12}
    arguments = ["--max-length", "40", "--doc_stride", "12", "--no-benchmark", "--preset", "auto"]
    short = ["--epochs", "1", "--finetune-epochs", "1", "--sparsity-warmup-epochs", "0.4", "--pre-finetune-epochs", "0"]
    out = tmp_path / "out"
    code = example("run_squad").main(["--tiny", *chosen, *arguments, *short, "--output-dir", str(out)])
    assert code == 0

    result = json.loads((out / "result.json").read_text())
    assert result["headline"] == "f1"
    assert result["sparsity"] == pytest.approx(0.9, abs=0.005)
    expected = {"exact_match", "f1"}
    if version_2:
        expected |= {f"{part}_{name}" for part in ("has_answer", "no_answer") for name in ("exact_match", "f1")}
    assert set(result["metrics"]) == set(result["dense"]["metrics"]) == expected

    # Measured again, row by row, from the files that it left.
    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    questions = example("squad_data").made_up(64, version_2=version_2, seed=1)[:32]
    rows, cut = squad.encode(questions, tokenizer, **windows)
    assert len(rows) > 48
    starts, ends = np.zeros((2, len(rows), windows["max_length"]), np.float32)
    with torch.inference_mode():
        for index, row in enumerate(rows):
            inputs = {
                name: torch.tensor([list(row[name])]) for name in ("input_ids", "attention_mask", "token_type_ids")
            }
            outputs = model(**inputs)
            starts[index, : len(row["input_ids"])] = outputs.start_logits[0].numpy()
            ends[index, : len(row["input_ids"])] = outputs.end_logits[0].numpy()
    answers = squad.find_answers(questions, cut, starts, ends, squad.SpanSettings(20, 30, version_2, 0.01))
    again = squad.squad_metrics(questions, [best[0].text for best in answers], version_2=version_2)
    assert result["metrics"] == pytest.approx(again, abs=0.04)  # rounding may turn one question of 32


def test_tiny_run_on_files_chooses_the_best_by_f1_and_fine_tunes_what_it_left(
    example: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = example("run_squad").main
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", ROWS * 16)
    common = ["--tiny", "--no-benchmark", "--data-dir", str(tmp_path)]
    first, second = str(tmp_path / "pruned"), str(tmp_path / "finetuned")
    assert run([*common, "--finetune-epochs", "0", "--teacher", "none", "--output-dir", first]) == 0
    assert (
        run([*common, "--pretrained-pruned-model", first, "--metric-for-best-model", "f1", "--output-dir", second]) == 0
    )
    results = [json.loads(Path(folder, "result.json").read_text()) for folder in (first, second)]
    assert results[0]["layer_parameters"] == results[1]["layer_parameters"]
    assert all("eval_f1" in result["evaluations"] for result in results)
    assert results[1]["best_step"] is not None
    assert "exact_match" in capsys.readouterr().out

    again = [*common, "--pretrained-pruned-model", first, "--metric-for-best-model", "f1", "--output-dir", second]
    assert run([*again, "--resume", "--doc-stride", "64"]) == 2
    assert "its doc_stride is 128, asked for 64" in capsys.readouterr().err
    assert run([*again, "--resume"]) == 0


def test_lengths_are_those_of_the_original(example: Callable[[str], ModuleType]) -> None:
    options = example("options")
    for name, length in (("run_glue", 128), ("run_squad", 384)):
        parser = options.Parser(prog=name, description="")
        options.add_common_options(parser, name)
        example(name).add_options(parser)
        found = parser.parse_args([])
        assert found.max_length == length
        assert getattr(found, "doc_stride", 128) == 128
