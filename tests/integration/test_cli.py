"""The command line: every subcommand on a tiny model, and every mistake in one line with exit code 2."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertTokenizerFast,
)

import cofiprune
from cofiprune import cli
from cofiprune.training.config import FINETUNE, RECOVERY, names_of

Capsys = pytest.CaptureFixture[str]

GOOD, BAD = ("good", "fine", "great"), ("bad", "poor", "awful")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, "a", "film", "with", "music", "who", "made", "it")
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 32, "max_position_embeddings": 24,
}  # fmt: skip
REVIEWS = [
    {"sentence": f"a {word} film with {other} music", "label": int(word in GOOD)}
    for word in (*GOOD, *BAD)
    for other in (*GOOD, *BAD)
]
SHORT = ("--epochs", "2", "--finetune-epochs", "1", "--batch_size", "8", "--no-progress", "--logging-steps=5")


def write_csv(file: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    with file.open("w", newline="") as lines:
        table = csv.DictWriter(lines, rows[0], delimiter=delimiter)
        table.writeheader()
        table.writerows(rows)
    return file


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    BertTokenizerFast(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a dense model and data files."""
    place = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    save(BertForSequenceClassification(BertConfig(**SIZES, id2label={0: "negative", 1: "positive"})), place / "dense")
    write_csv(place / "train.csv", REVIEWS)
    named = [{**row, "label": ("negative", "Positive")[row["label"]]} for row in REVIEWS[::3]]
    write_csv(place / "dev.tsv", named, delimiter="\t")
    write_csv(place / "plain.csv", [{"words": "a good film", "stars": 1}])
    write_csv(place / "seven.csv", [{"text": "a good film", "label": 7}])
    return place


@pytest.fixture(scope="module")
def pruned(place: Path) -> Path:
    """The dense model pruned by the command line."""
    out = place / "pruned"
    files = ("--train-file", str(place / "train.csv"), "--validation-file", str(place / "dev.tsv"))
    arguments = ("--target-sparsity", "0.6", "--teacher", "self", *files, *SHORT)
    assert cli.main(["prune", str(place / "dense"), "--output-dir", str(out), *arguments]) == 0
    return out


def mistake(capsys: Capsys, *arguments: str | Path, code: int = 2) -> str:
    """Run a command line that must fail, and return its one line."""
    assert cli.main([str(argument) for argument in arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith("cofiprune: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(command: str, capsys: Capsys) -> None:
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"example:\n  cofiprune {command} " in shown
    assert "--json" in shown
    assert max(map(len, shown.partition("\noptions:")[0].partition("settings:")[0].splitlines())) <= 80
    assert shown.find("\noptions:") > shown.find("\nessential:")
    assert shown.startswith(f"usage: cofiprune {command}")
    assert "%%" not in shown


def test_help_lists_the_commands_and_version_is_the_packages(capsys: Capsys) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {command} " in shown for command in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"cofiprune {cofiprune.__version__}\n"


@pytest.mark.parametrize(("command", "models"), [("prune", (cofiprune.PruneConfig,)), ("finetune", FINETUNE)])
def test_a_command_has_the_settings_of_its_function_in_their_words(
    command: str, models: tuple[Any, ...], capsys: Capsys
) -> None:
    cli.main([command, "--help"])
    shown = re.sub(r"\s+", "", capsys.readouterr().out)  # long words are broken at hyphens
    for name, field in cofiprune.PruneConfig.model_fields.items():
        option = f"--{name.replace('_', '-')}"
        offered = name in names_of(*models) and not (command == "finetune" and name in RECOVERY)
        assert (re.search(rf"{option}(N|X|NAME|\{{|,--no-)", shown) is not None) == offered, name
        assert (re.sub(r"\s+", "", field.description or "") in shown) == offered, name
    assert "--progress,--no-progress" in shown
    assert "(default:57)" in shown


def test_prune_writes_a_model_that_reloads_with_its_plan_and_result(pruned: Path, capsys: Capsys) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(pruned)
    assert len(AutoTokenizer.from_pretrained(pruned)) == len(WORDS)
    kept = cofiprune.Plan.load(pruned / "plan.json").kept
    assert {name: size for name, size in kept.items() if size} == cofiprune.structure(model).sizes
    result = json.loads((pruned / "result.json").read_text())
    assert result["sparsity"] == pytest.approx(0.6, abs=0.005)
    assert (result["settings"]["method"], result["settings"]["finetune_epochs"]) == ("one-shot", 3)
    assert result["history"]
    assert 0 <= result["metrics"]["eval_accuracy"] <= 1
    assert model.config.id2label == {0: "negative", 1: "positive"}


def test_prune_tells_what_was_before_and_what_comes_next(pruned: Path, place: Path, capsys: Capsys) -> None:
    names = {file.name for file in pruned.iterdir()}
    assert {"report.html", "README.md", "result.json", "plan.json", "model.safetensors"} <= names
    assert not [name for name in names if name.startswith("checkpoint-")]
    told = json.loads((pruned / "result.json").read_text())
    assert told["dense"]["metrics"].keys() == told["pruned"]["metrics"].keys()
    assert "cofiprune prune" in (pruned / "report.html").read_text()
    arguments = ("--train-file", place / "train.csv", "--validation-file", place / "dev.tsv", "--output-dir", pruned)
    assert "finished model" in mistake(capsys, "prune", place / "dense", *arguments)
    short = ("--target-sparsity", "0.4", "--method", "one-shot", "--no-progress", "--overwrite", "--keep-checkpoints")
    out = place / "again"
    assert cli.main(["prune", str(place / "dense"), *map(str, arguments[:-1]), str(out), *short]) == 0
    shown = capsys.readouterr().out
    for word in ("dense", "pruned", "accuracy", "model.safetensors", "next: cofiprune evaluate", "cofiprune benchmark"):
        assert word in shown
    assert max(map(len, shown.partition("saved in")[0].splitlines())) <= 80


def test_a_dry_run_says_what_it_would_do_and_does_nothing(place: Path, tmp_path: Path, capsys: Capsys) -> None:
    files = (
        "--train-file",
        str(place / "train.csv"),
        "--output-dir",
        str(tmp_path / "none"),
        "--dry-run",
        "--epochs=2",
    )
    for command in ("prune", "finetune"):
        assert cli.main([command, str(place / "dense"), *files, "--batch-size", "8", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["training_rows"] == len(REVIEWS)
        assert f"{-(-len(REVIEWS) // 8)} an epoch" in told["steps"]
        assert "would be made" in told["output_dir"]
        assert not (tmp_path / "none").exists()
    without = [word for word in files if "none" not in word and word != "--output-dir"]
    for more, method, steps in (
        ([], "one-shot: all 4 epochs", "0 of pruning, "),
        (["--one-shot-share=0"], "cofi: one_shot_share is of gates", "of pruning, "),
        (["--method=cofi"], "cofi", "of pruning, "),
        (["--target-speedup=2"], "auto, picked when times are measured", ""),
    ):
        assert cli.main(["prune", str(place / "dense"), *without, *more, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["method"].startswith(method)
        assert steps in told["steps"]
        assert told["output_dir"].startswith("none yet")
    assert cli.main(["prune", str(place / "dense"), *files]) == 0
    assert "nothing was done" in capsys.readouterr().out
    assert "cannot be reached" in mistake(capsys, "prune", place / "dense", *files, "--units", "head")


@pytest.mark.parametrize("ending", ["json", "yaml"])
def test_a_file_gives_options_and_what_is_typed_goes_on_top(
    ending: str, place: Path, pruned: Path, tmp_path: Path, capsys: Capsys
) -> None:
    given = {"model": str(place / "dense"), "train_file": str(place / "train.csv"), "target-sparsity": 0.3,
             "units": ["head", "intermediate"], "progress": False, "learning_rate": None, "batch_size": 4}  # fmt: skip
    file = tmp_path / f"run.{ending}"
    file.write_text(json.dumps(given))  # which is YAML too
    more = ("--output-dir", str(tmp_path / "out"), "--dry-run", "--json")
    assert cli.main(["prune", "--config", str(file), "--target-sparsity=0.4", *more]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["target"], told["batch_size"]) == ("target_sparsity 0.4", 4)
    again = ("--train-file", str(place / "train.csv"), *more, "--config", str(pruned / "result.json"))
    assert cli.main(["prune", str(place / "dense"), *again]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["batch_size"] == 8
    for wrong in ({"train_file": ["a", "b"]}, {"output_dir": True}, {"progress": "x"}, {"seed": -1}, {"epochs": {}}):
        file.write_text(json.dumps({**given, **wrong}))
        assert next(iter(wrong)) in mistake(capsys, "prune", "--config", file, *more).replace("-", "_")
    file.write_text(json.dumps({"epoch": 3}))
    assert "Did you mean 'epochs'" in mistake(capsys, "prune", place / "dense", "--config", file, *more)
    assert "cannot be read" in mistake(capsys, "prune", place / "dense", "--config", tmp_path / "no.json", *more)


@pytest.mark.filterwarnings("default")  # torch's exporter warns of torch
@pytest.mark.parametrize("int8", [False, True])
def test_advise_measures_each_way_and_says_one_sentence(int8: bool, place: Path, capsys: Capsys) -> None:
    if int8:
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    arguments = ("--train-file", str(place / "train.csv"), "--target-sparsity", "0.3,0.5", "--json")
    switch = "--int8" if int8 else "--no-int8"
    assert cli.main(["advise", str(place / "dense"), *arguments, switch]) == 0
    told = json.loads(capsys.readouterr().out)
    names = ["dense", "every other layer", "pruned to 0.3", "pruned to 0.5", *(["dense in int8"] if int8 else [])]
    assert list(told["rows"]) == names
    weights = [told["rows"][name]["megabytes"] for name in names]
    assert weights[0] > weights[2] > weights[3]
    assert all(row["latency_ms"] > 0 and 0 <= row["metrics"]["accuracy"] <= 1 for row in told["rows"].values())
    assert told["advice"].endswith((".", "3"))
    assert "--train-file" in mistake(capsys, "advise", place / "dense")


def test_finetune_goes_on_from_a_compacted_model(pruned: Path, place: Path, tmp_path: Path, capsys: Capsys) -> None:
    arguments = ("--train-file", place / "train.csv", "--output-dir", tmp_path, "--epochs", "1", "--learning-rate=1e-3")
    assert cli.main(["finetune", *map(str, (pruned, *arguments))]) == 0
    assert f"saved in {tmp_path}" in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["settings"]["finetune_epochs"] == 1
    before, after = (AutoModelForSequenceClassification.from_pretrained(path) for path in (pruned, tmp_path))
    assert after.num_parameters() == before.num_parameters()


def test_evaluate_prints_what_the_function_finds(place: Path, pruned: Path, capsys: Capsys) -> None:
    assert cli.main(["evaluate", str(pruned), "--validation-file", str(place / "dev.tsv"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == len(REVIEWS[::3])
    result = json.loads((pruned / "result.json").read_text())
    assert found["accuracy"] == pytest.approx(result["metrics"]["eval_accuracy"])
    assert cli.main(["evaluate", str(pruned), "--validation-file", str(place / "dev.tsv")]) == 0
    assert f"accuracy  {found['accuracy']:.4f}" in capsys.readouterr().out


def test_benchmark_times_a_model_next_to_its_baseline(place: Path, pruned: Path, capsys: Capsys) -> None:
    sizes = ("--batch-size", "1", "2", "--seq_len", "8", "--runs", "2")
    assert cli.main(["benchmark", str(pruned), "--baseline", str(place / "dense"), *sizes, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["batch_size"] for row in report["rows"]] == [1, 2]
    assert all(row["ideal_speedup"] > 1 for row in report["rows"])


def test_rows_without_labels_come_from_a_file_of_their_own(place: Path, tmp_path: Path, capsys: Capsys) -> None:
    texts = tmp_path / "more.txt"
    texts.write_text("\n".join(f"a {word} film" for word in (*GOOD, *BAD)))
    words = [
        "finetune",
        str(place / "dense"),
        "--train-file",
        str(place / "train.csv"),
        "--unlabelled-file",
        str(texts),
    ]
    out = ["--output-dir", str(tmp_path / "out"), "--epochs", "1", "--batch-size", "8", "--no-progress", "--json"]
    assert cli.main([*words, *out, "--text-column", "sentence", "--teacher", "self", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["unlabelled_rows"] == 6
    assert cli.main([*words, *out, "--teacher", "self"]) == 0
    steps = [entry["step"] for entry in json.loads((tmp_path / "out" / "result.json").read_text())["history"]]
    assert max(steps) == -(-(len(REVIEWS) + 6) // 8)
    assert "--unlabelled-file" in mistake(capsys, *words, "--output-dir", tmp_path / "other")


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_what_teach_writes_takes_the_place_of_a_teacher(
    ending: str, place: Path, tmp_path: Path, capsys: Capsys
) -> None:
    file, dense, texts = tmp_path / f"taught.{ending}", str(place / "dense"), tmp_path / "texts.txt"
    texts.write_text("\n".join(row["sentence"] for row in REVIEWS))
    for source in (place / "train.csv", texts):
        words = ["teach", dense, "--train-file", str(source), "--output", str(file), "--outputs", "logits,hidden"]
        assert cli.main([*words, "--overwrite"]) == 0
        assert f"cofiprune prune STUDENT --train-file {file}" in capsys.readouterr().out
        run = ["prune", dense, "--train-file", str(file), "--output-dir", str(tmp_path / source.stem), *SHORT]
        assert cli.main([*run, "--target-sparsity", "0.5", "--json"]) == 0
        entries = json.loads((tmp_path / source.stem / "result.json").read_text())["history"]
        assert "logits_loss" in entries[-1]
        assert ("label_loss" in entries[-1]) == (source.suffix == ".csv")
    assert "is there already" in mistake(capsys, *words)
    assert "must end in" in mistake(capsys, *words[:4], "--output", "taught.csv")
    assert "leave the teacher out" in mistake(capsys, *run[:-1], "--overwrite", "--no-progress", "--teacher", "self")


@pytest.mark.parametrize("kind", ["dense", "pruned"])
def test_inspect_shows_groups_and_what_can_go(kind: str, place: Path, pruned: Path, capsys: Capsys) -> None:
    assert cli.main(["inspect", "--model", str(place / kind)]) == 0
    shown = capsys.readouterr().out
    assert "can be pruned: layer, head, intermediate, hidden; up to a sparsity of" in shown
    assert ("compacted" in shown) == (kind == "pruned")
    assert cli.main(["inspect", str(place / kind), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    groups = {group["name"]: group for group in report["groups"]}
    model = AutoModelForSequenceClassification.from_pretrained(place / kind)
    assert list(groups) == list(cofiprune.structure(model))
    if kind == "dense":
        layer = model.bert.encoder.layer[0]
        norm = layer.attention.output.LayerNorm.weight.numel()
        assert groups["layers.0.attention"]["parameters"] == sum(p.numel() for p in layer.attention.parameters())
        assert groups["layers.0.heads"]["parameters"] == 4 * norm * norm + 3 * norm


def test_inspect_says_why_something_cannot_be_pruned(tmp_path: Path, capsys: Capsys) -> None:
    BertForSequenceClassification(BertConfig(**SIZES)).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    masks = cofiprune.attach(model)
    for index in range(3):
        masks[f"layers.{index}.attention"] = [0]
    cofiprune.compact(model).save_pretrained(tmp_path)
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert "cannot be pruned: head: no such units are left" in capsys.readouterr().out


def test_convert_reads_a_directory_of_the_original(place: Path, tmp_path: Path, capsys: Capsys) -> None:
    source, out = tmp_path / "original", tmp_path / "out"
    source.mkdir()
    model = AutoModelForSequenceClassification.from_pretrained(place / "dense")
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    torch.save({"mlp_z": torch.tensor([1.0, 0.0, 1.0])}, source / "zs.pt")
    entries = {**model.config.to_dict(), "architectures": ["CoFiBertForSequenceClassification"]}
    (source / "config.json").write_text(json.dumps(entries))
    assert cli.main(["convert", str(source), str(out)]) == 0
    assert "compacted" in capsys.readouterr().out
    assert "cofiprune convert" in mistake(capsys, "inspect", source)
    assert "layers.1.ffn" not in cofiprune.structure(AutoModelForSequenceClassification.from_pretrained(out))


def test_vocabulary_keeps_what_texts_use(place: Path, pruned: Path, tmp_path: Path, capsys: Capsys) -> None:
    texts = ("--texts", str(place / "train.csv"))
    assert cli.main(["vocabulary", str(pruned), *texts, "--output-dir", str(tmp_path / "small")]) == 0
    assert "texts alike  100.0 %" in capsys.readouterr().out
    assert cli.main(["evaluate", str(tmp_path / "small"), "--validation-file", str(place / "dev.tsv")]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert (
        cli.main(["vocabulary", str(pruned), *texts, "--columns", "sentense", "--output-dir", str(tmp_path / "no")])
        == 2
    )
    assert "no column 'sentense' with texts. Did you mean 'sentence'?" in capsys.readouterr().err


def test_export_gives_the_same_answers_as_torch(place: Path, pruned: Path, tmp_path: Path, capsys: Capsys) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    rows = ("--file", str(place / "dev.tsv"))
    assert cli.main(["export", str(pruned), str(tmp_path), "--format", "onnx", *rows]) == 0
    shown = re.search(r"onnx/model.onnx +[0-9.]+ +(\S+) +(\S+) +1.0000$", capsys.readouterr().out, re.MULTILINE)
    assert shown is not None
    assert float(shown[1]) < 1e-5
    session = runtime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    assert {entry.name for entry in session.get_inputs()} == {"input_ids", "attention_mask", "token_type_ids"}
    assert all(entry.shape == ["batch", "sequence"] for entry in session.get_inputs())
    assert (tmp_path / "tokenizer.json").exists()


def test_export_says_what_it_needs(
    place: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["cofiprune.export.write"], "find_spec", lambda name: None)
    assert "pip install 'cofiprune[export]'" in mistake(capsys, "export", place / "dense", tmp_path / "m.onnx")


@pytest.mark.filterwarnings("default")
def test_prune_without_data_warns_in_one_line(place: Path, tmp_path: Path, capsys: Capsys) -> None:
    assert cli.main(["prune", str(place / "dense"), "--target-sparsity=0.3", "--output-dir", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    warnings = [line for line in captured.err.splitlines() if line.startswith("cofiprune: warning: ")]
    assert len(warnings) == 1
    assert "pruning without data" in warnings[0]
    assert json.loads((tmp_path / "result.json").read_text())["sparsity"] == pytest.approx(0.3, abs=0.005)


TAGGED = [{"tokens": ["a", "good", "film"], "ner_tags": ["O", "B", "O"]}, {"tokens": ["music"], "ner_tags": ["B"]}]
ANSWERED = [
    {"question": "who made it", "context": "a good film", "answers": {"text": ["good"], "answer_start": [2]}},
    {"question": "who made it", "context": "music", "answers": {"text": [], "answer_start": []}},
]
TOPICS = [{"text": f"{word} film", "label": word} for word in GOOD]
IDS = [{"input_ids": [2, 5, 3], "label": 1}, {"input_ids": [2, 6, 7, 3], "label": 0}]


@pytest.mark.parametrize(
    ("task", "rows", "labels"),
    [("sequence-classification", TOPICS, sorted(GOOD)), ("token-classification", TAGGED * 4, ["B", "O"])],
    ids=["topics", "tags"],
)
def test_a_pretrained_model_gets_a_head_for_the_labels_of_the_data(
    task: str, rows: list[dict[str, Any]], labels: list[str], tmp_path: Path
) -> None:
    save(BertForMaskedLM(BertConfig(**SIZES)), tmp_path / "base")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    arguments = ("--task", task, "--train-file", tmp_path / "rows.json", "--output-dir", tmp_path / "out", "--epochs=1")
    assert cli.main(["finetune", *map(str, (tmp_path / "base", *arguments))]) == 0
    assert list(AutoConfig.from_pretrained(tmp_path / "out").id2label.values()) == labels


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("task", "rows", "metric"),
    [
        ("token-classification", TAGGED, "accuracy"),
        ("question-answering", ANSWERED, "span_accuracy"),
        ("masked-lm", [{"text": "a good film with music"}] * 8, "perplexity"),
        ("sequence-classification", IDS, "accuracy"),
        ("sequence-classification", [{"text": "good", "label": 0.5}, {"text": "bad", "label": 3}], "mse"),
    ],
    ids=["tags", "answers", "masked-lm", "ids", "numbers"],
)
def test_evaluate_reads_the_data_of_other_tasks(
    task: str, rows: list[dict[str, Any]], metric: str, tmp_path: Path, capsys: Capsys
) -> None:
    save(BertForMaskedLM(BertConfig(**SIZES)), tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ("--validation-file", tmp_path / "rows.jsonl", "--task", task, "--json")
    assert cli.main(["evaluate", *map(str, (tmp_path, *arguments))]) == 0
    captured = capsys.readouterr()
    assert metric in json.loads(captured.out)
    assert ("are random until trained" in captured.err) == (task != "masked-lm")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "a command is missing"),
        ("prun dense", "Did you mean 'prune'"),
        ("--debugg", "Did you mean '--debug'"),
        ("prune dense", "--output-dir"),
        ("prune --output-dir out", "MODEL is missing"),
        ("prune dense --output-dir out --target-sparsty 0.5", "Did you mean '--target-sparsity'"),
        ("prune dense --output-dir out --epoch 3", "Did you mean '--epochs'"),
        ("prune dense --output-dir out --target-sparsity 95", "95 % is target_sparsity=0.95"),
        ("prune dense --output-dir out --target-sparsity many", "invalid number value"),
        ("prune dense --output-dir out --target-sparsity 0.9 --units head", "cannot be reached"),
        ("prune dense --output-dir out --epochs -1", "greater than or equal to 0"),
        ("prune dense --output-dir out --units head,heart", "unknown unit kind 'heart'"),
        ("prune dense --output-dir out --preset glue-smal", "Did you mean 'glue-small'"),
        ("prune dense --output-dir out --task sequence-clasification", "Did you mean 'sequence-classification'"),
        ("prune dense --output-dir out --train-file trian.csv", "Did you mean 'train.csv'"),
        ("prune dense --output-dir dense --train-file train.csv", "would be overwritten"),
        ("prune dense --output-dir train.csv", "cannot write to"),
        ("prune dense --output-dir out --train-file plain.csv", "no text column of a known name"),
        ("prune dense --output-dir out --train-file plain.csv --text-column words", "no column of a known name"),
        ("prune dense --output-dir out --train-file plain.csv --text-column word", "Did you mean 'words'"),
        ("prune dense --output-dir out --train-file train.csv --label-column sentence", "not among negative, positive"),
        ("prune dense --output-dir out --train-file train.csv --max-length 99", "reads at most 24 tokens"),
        ("prune dense --output-dir out --train-file train.csv --label-names a,b,c", "3 names and the model 2"),
        ("prune dense --output-dir out --train-file train.csv --teacher nobody/", "there is no directory"),
        ("prune dense --output-dir out --train-file train.csv --resume", "nothing to resume in out"),
        ("prune dense --output-dir out --train-file seven.csv", "--train-file: row 0: label 7 is not among the 2"),
        ("finetune dense --output-dir out", "needs --train-file"),
        ("finetune dense --output-dir out --units head", "unknown option --units"),
        ("evaluate dense", "needs --validation-file"),
        ("inspect nowhere/", "there is no directory nowhere/"),
        ("inspect train.csv", "train.csv is a file"),
        ("inspect .", "no config.json"),
        ("benchmark dense --seq-len 99", "at most 24 tokens"),
        ("benchmark dense --device cuda:99", "cannot use the device"),
        ("convert dense out", "pytorch_model.bin"),
        ("convert nowhere out", "no directory nowhere"),
        ("export dense out --format tflite", "unknown format 'tflite'"),
        ("export dense dense", "would be overwritten"),
        ("export dense out --int8-mode statik", "unknown kind of int8 'statik'. Did you mean 'static'?"),
        ("export dense out --int8 --max-drop 0.01", "max_drop is measured on rows"),
        ("export dense out --file nowhere.tsv", "nowhere.tsv"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: str, message: str, place: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(place)
    error = mistake(capsys, *arguments.split())
    assert error.startswith("cofiprune: error: ")
    assert message in error


def test_what_is_nobodys_mistake_still_ends_in_one_line(capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: BaseException) -> Any:
        def inspect(options: Any) -> None:
            raise error

        return inspect

    monkeypatch.setattr("cofiprune.cli.measure.inspect", raising(KeyboardInterrupt("Stopped; resume=True goes on.")))
    assert "Stopped; --resume goes on." in mistake(capsys, "inspect", "m", code=130)
    monkeypatch.setattr("cofiprune.cli.measure.inspect", raising(SystemExit("stopped by SIGTERM")))
    assert "SIGTERM" in mistake(capsys, "inspect", "m", code=143)
    monkeypatch.setattr("cofiprune.cli.measure.inspect", raising(RuntimeError("out of\nmemory")))
    assert "RuntimeError: out of memory" in mistake(capsys, "inspect", "m", code=1)
    assert cli.main(["inspect", "m", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "cofiprune", "inspect", "nowhere/"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "cofiprune: error: there is no directory nowhere/\n"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["prune", "--help"], 0), (["benchmark", "nowhere/", "--rums", "3"], 2), (["prun"], 2)],
)
def test_arguments_are_understood_before_anything_heavy_is_imported(arguments: list[str], code: int) -> None:
    program = "import runpy, sys, time; sys.argv = ['-m', *sys.argv[1:]]; sys.orig_argv = ['', '-m', 'cofiprune']\n"
    program += """if True:
        import atexit
        heavy = {"torch", "transformers", "accelerate", "rich"}
        atexit.register(lambda: print("heavy:", sorted(heavy & set(sys.modules)), time.process_time()))
        runpy.run_module("cofiprune", run_name="__main__")
    """
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == code, done.stderr
    heavy, seconds = done.stdout.splitlines()[-1].removeprefix("heavy: ").rsplit(" ", 1)
    assert heavy == "[]"
    assert float(seconds) < 1, "seconds of processor time, of which a quiet machine needs a quarter"
