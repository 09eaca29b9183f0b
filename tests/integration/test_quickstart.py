"""The quickstart: what its data must be like, which mistakes it explains, and a run of all its steps."""

import csv
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of the examples by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module


@pytest.fixture(scope="module")
def data(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("quickstart_data")


@pytest.fixture(scope="module")
def glue(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("quickstart_glue")


@pytest.mark.slow
def test_docstring_task_is_large_balanced_and_split_by_module(data: ModuleType) -> None:
    task = data.docstring_task()
    train, validation = task.counts(task.train), task.counts(task.validation)

    assert len(task.label_names) >= 8
    assert len(task.train) + len(task.validation) >= 6000
    assert max(train) < 3 * min(train)
    assert max(validation) < 3 * min(validation)
    assert task.majority_baseline() < 0.2

    modules = [{row.source for row in side} for side in (task.train, task.validation)]
    assert all(len(side) > 50 for side in modules)
    assert not modules[0] & modules[1]
    texts = [row.text for row in task.train + task.validation]
    assert len(set(texts)) == len(texts)
    assert {row.label for row in task.train[:200]} == set(range(len(task.label_names)))  # rows come mixed


def test_docstring_task_is_the_same_in_every_process() -> None:
    program = """if True:
        import hashlib, sys
        import quickstart_data
        rows = quickstart_data.docstring_task(100, 30)
        print(hashlib.sha256(repr(rows).encode()).hexdigest())
        print("torch" in sys.modules or "transformers" in sys.modules)
    """
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(EXAMPLES), "PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]
    first, second = (run.communicate(timeout=300)[0].split() for run in runs)
    assert first == second
    assert first[1] == "False"  # packages are read, not imported


def test_passages_are_prose_of_the_files_own(data: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        '"""Turn :class:`~a.b.Apples` into `pears`, one by one, until there is no fruit left at all.\n'
        "\n"
        "    >>> code(that, is, left, out, because, it, is, not, prose, at, all, here)\n"
        "\n"
        "Too short. But it grows when the next sentence of the same paragraph has enough words.\n"
        '"""\n'
        "class A:\n"
        "    def method(self):\n"
        '        """Give back what the reader of this sentence expects to have been given back, no more."""\n'
    )
    assert list(data._passages(file)) == [
        "Turn a.b.Apples into pears, one by one, until there is no fruit left at all.",
        "Too short. But it grows when the next sentence of the same paragraph has enough words.",
        "Give back what the reader of this sentence expects to have been given back, no more.",
    ]


ROWS: list[dict[str, Any]] = [
    {"premise": 'She said "no", twice', "hypothesis": "She refused", "label": 0},
    {"premise": "It rains", "hypothesis": "It is dry", "label": 2},
]


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows in the format of the file's ending."""
    if file.suffix == ".parquet":
        pytest.importorskip("pyarrow")
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    elif file.suffix == ".csv":
        with file.open("w", newline="") as lines:
            table = csv.DictWriter(lines, rows[0])
            table.writeheader()
            table.writerows(rows)
    else:
        file.write_text("\n".join("\t".join(map(str, line)) for line in ([*rows[0]], *(row.values() for row in rows))))


@pytest.mark.parametrize("ending", ["parquet", "tsv", "csv", "json", "jsonl"])
@pytest.mark.parametrize("validation", ["validation", "dev_matched", "validation-00000-of-00001"])
def test_read_task_knows_the_published_forms(glue: ModuleType, tmp_path: Path, ending: str, validation: str) -> None:
    write(tmp_path / f"train.{ending}", ROWS)
    named = [{**row, "label": ("entailment", "neutral", "contradiction")[row["label"]]} for row in ROWS]
    write(tmp_path / f"{validation}.{ending}", named)
    task = glue.read_task("mnli", tmp_path)

    assert task.label_names == ("entailment", "neutral", "contradiction")
    assert [(row.text, row.pair, row.label) for row in task.train] == [tuple(row.values()) for row in ROWS]
    assert task.validation == task.train


def test_read_task_takes_a_task_of_ones_own(glue: ModuleType, tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.csv", [{"text": "good", "label": "yes"}])
    write(tmp_path / "train-00001-of-00002.csv", [{"text": "bad", "label": "no"}])
    write(tmp_path / "dev.csv", [{"text": "fine", "label": "yes"}])
    task = glue.read_task("mine", tmp_path)

    assert task.label_names == ("no", "yes")
    assert [row.label for row in task.train] == [1, 0]
    assert task.validation[0].pair is None


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (None, "no train"),
        ([{"words": "good", "label": 1}], "needs text columns"),
        ([{"sentence": "good", "label": 2}], "not among negative, positive"),
        ([{"sentence": None, "label": 1}], "row 1 of sst2 has no text"),
    ],
)
def test_read_task_explains_what_it_cannot_use(
    data: ModuleType, glue: ModuleType, tmp_path: Path, train: list[dict[str, Any]] | None, message: str
) -> None:
    write(tmp_path / "dev.json", [{"sentence": "fine", "label": 1}])
    if train is not None:
        write(tmp_path / "train.json", train)
    with pytest.raises(data.DataError, match=message):
        glue.read_task("sst2", tmp_path)


def test_bundled_model_verifies_the_weights(
    example: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = example("quickstart_model")
    package = tmp_path / model.BUNDLE
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('the code of the package was run')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(model.ModelError, match="is missing"):
        model.bundled_model()
    (package / "model" / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(model.ModelError, match="SHA-256"):
        model.bundled_model()


def quickstart(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the script as a user does."""
    return subprocess.run(
        [sys.executable, EXAMPLES / "quickstart.py", *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"},
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "95"], "write 0.95"),
        (["--sparsity", "1"], "not between 0 and 1"),
        (["--epochs", "0"], "less than 1"),
        (["--train-rows", "many"], "whole number"),
        (["--data-dir", "."], "needs --task"),
        (["--model", "no/such/model/here"], "cannot load"),
        (["--task", "sst2", "--data-dir", "no-such-folder"], "does not exist"),
    ],
)
def test_a_mistake_ends_in_one_line(
    example: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script = example("quickstart")
    try:
        code = script.main([*arguments, "--tiny"])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("quickstart: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_tiny_run_goes_through_all_steps(tmp_path: Path) -> None:
    result = quickstart("--tiny", "--output-dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    for words in ("Majority baseline", "sparsity", "MACs", "accuracy", "latency, batch 1", "latency, batch 32"):
        assert words in result.stdout
    saved = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= saved


def test_tiny_run_on_files_with_pairs_of_texts(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", ROWS * 32)
    result = quickstart("--tiny", "--task", "mnli", "--data-dir", tmp_path, "--output-dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "contradiction" in result.stdout
