"""Prune an encoder on a task of GLUE, or on text classification and regression data of your own.

    python examples/run_glue.py --task mrpc --target-sparsity 0.9
    python examples/run_glue.py --task mnli --data-dir DIR --model FOLDER --teacher FOLDER --preset auto
    python examples/run_glue.py --train-file train.csv --validation-file dev.csv --label-column rating
    python examples/run_glue.py --task sst2 --tiny

The steps are those of `common.py`. `--task mnli` reports accuracy on the matched and on the mismatched validation set.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from common import Task, load_model, load_tokenizer, main, subset
from glue_data import TASKS, Splits, hub_glue, read_glue, tiny_glue
from original import is_original
from results import say
from transformers import PreTrainedModel

import cofiprune
from cofiprune.cli.columns import Columns, add_column_options, find_columns
from cofiprune.cli.files import Row, read_rows
from cofiprune.cli.labels import Head
from cofiprune.cli.models import load_config, task_by_architecture
from cofiprune.cli.options import Parser, UsageError
from cofiprune.cli.tokens import tokenised
from cofiprune.errors import CheckpointError, DataError, suggest

KIND = "sequence-classification"
SMALL = 10_000
"""Rows of training below which `--preset auto` takes the recipe for small tasks."""


def add_options(parser: Parser) -> None:
    """Add what is particular to this example."""
    parser.add_argument("--task", "--task-name", metavar="NAME", help=f"task of GLUE: {', '.join(TASKS)}")
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="folder with train.* and validation.* (default: from the hub)"
    )
    parser.add_argument("--train-file", metavar="FILE", help="data of your own: csv, tsv, json, jsonl or parquet")
    parser.add_argument("--validation-file", metavar="FILE", help="the same, to measure on")
    add_column_options(parser)


def make_task(options: argparse.Namespace) -> Task:
    """Read the data, agree with the models on the order of classes, and tokenise."""
    metrics: Sequence[str] = ()
    preset = None
    if options.train_file or options.validation_file:
        name, splits, columns = own_files(options)
        head = Head.of_data([row[columns.label] for row in splits.train], label_names(options))
    else:
        name = task_name(options)
        if options.data_dir:
            splits = read_glue(name, options.data_dir, train=options.trains)
        else:
            splits = tiny_or_hub(name, options)
        columns = Columns("text", "pair" if "pair" in splits.validation[""][0] else None, "label")
        head, metrics, preset = Head(TASKS[name].labels), TASKS[name].metrics, TASKS[name].preset
    head = Head(agreed_names(options, head.names, name), head.multi_label)
    compute = None if head.multi_label else metrics_of(metrics or default_metrics(head), head, positive(name))
    tokenizer = load_tokenizer(options)

    def rows(raw: Sequence[Row], where: str, *, training: bool) -> list[dict[str, Any]]:
        chosen = subset(raw, options, training=training)
        if not chosen:  # what is measured alone has none for training
            return []
        return tokenised(chosen, columns, KIND, tokenizer, max_length=options.max_length, head=head, where=where)

    train = rows(splits.train, options.train_file or f"train of {name}", training=True)
    validation = {
        ending: rows(side, options.validation_file or f"validation{ending} of {name}", training=False)
        for ending, side in splits.validation.items()
    }
    sizes = ", ".join(f"{len(side):,}{ending.replace('_', ' ')}" for ending, side in validation.items())
    say(f"{name}: {len(train):,} rows for training, {sizes} for validation")

    def new_model(source: str) -> PreTrainedModel:
        model = load_model(source, KIND, head)
        if head.names and model.num_labels == len(head.names):
            head.apply(model.config)  # a head whose classes had no names gets them
        return model

    def measure(model: PreTrainedModel) -> dict[str, float]:
        found = {}
        for ending, side in validation.items():
            values = cofiprune.evaluate(model, side, batch_size=64, compute_metrics=compute)
            found.update({f"{metric}{ending}": values[metric] for metric in metrics or default_metrics(head)})
        return found

    return Task(
        name,
        train,
        validation[""],
        new_model,
        measure,
        tokenizer,
        (metrics or default_metrics(head))[0],
        compute_metrics=compute,
        preset=preset or ("glue-small" if len(train) < SMALL else "glue-large"),
        settings={"classes": head.names},
    )


def task_name(options: argparse.Namespace) -> str:
    """The task of GLUE that is meant; `SST-2` is `sst2`.

    :raises UsageError: when there is no such task.
    """
    if options.task is None:
        raise UsageError(f"--task is missing: one of {', '.join(TASKS)}; or --train-file and --validation-file")
    name = str(options.task).lower().replace("-", "").replace("_", "")
    if name not in TASKS:
        raise UsageError(f"unknown task {options.task!r}.{suggest(name, TASKS)} One of {', '.join(TASKS)}")
    return name


def tiny_or_hub(name: str, options: argparse.Namespace) -> Splits:
    """Made-up rows for `--tiny`, else the task's own from the hub."""
    return tiny_glue(name) if options.tiny else hub_glue(name)


def own_files(options: argparse.Namespace) -> tuple[str, Splits, Columns]:
    """The rows of the user's files, and the columns that hold text and label.

    :raises CofipruneError: when files or columns are missing.
    """
    if not (options.train_file and options.validation_file):
        raise UsageError("data of your own needs both --train-file and --validation-file")
    train, validation = read_rows(options.train_file), read_rows(options.validation_file)
    for rows, file in ((train, options.train_file), (validation, options.validation_file)):
        columns = find_columns(rows[0], options, KIND, file)
        if columns.label is None:
            raise DataError(
                f"{file} has no label column of a known name; its columns are {', '.join(rows[0])}; name it by "
                "--label-column"
            )
    return options.task or Path(options.train_file).stem, Splits(train, {"": validation}), columns


def label_names(options: argparse.Namespace) -> tuple[str, ...]:
    """The names of the classes that the user gives."""
    return tuple(name.strip() for name in (options.label_names or "").split(",") if name.strip())


def agreed_names(options: argparse.Namespace, names: tuple[str, ...], task: str) -> tuple[str, ...]:
    """The names of the classes in the order that the models have them; that of the data, where none has a head.

    Models differ: of the released MNLI models, some have contradiction first. Labels are matched by name.

    :raises CheckpointError: when a model has other classes, or two have them in different orders.
    """
    teacher = None if options.teacher in ("self", "train", "none") else options.teacher
    found: dict[str, tuple[str, ...]] = {}
    student = options.pretrained_pruned_model or options.model
    for source in (student, teacher, options.model if options.teacher == "train" else None):
        own = None if source is None else names_of(source)
        if own is None or source in found:
            continue
        if bool(own) != bool(names) or (names and not is_generic(own, names) and not matches(own, names)):
            raise CheckpointError(
                f"the head of {source} predicts {', '.join(own[:8]) or 'a number'}, and the labels of {task} are "
                f"{', '.join(names[:8]) or 'numbers'}; give an encoder without a head, or rename the classes in its "
                "config.json (id2label)"
            )
        found[source] = names if is_generic(own, names) else own
    orders = {tuple(map(plain, own)): source for source, own in reversed(found.items())}
    if len(orders) > 1:
        said = "; ".join(f"{place}: {', '.join(found[place])}" for place in orders.values())
        raise CheckpointError(
            f"the models have their classes in different orders ({said}), so that one cannot teach the other; classes "
            "without names in config.json (id2label) are taken to be in the order of the data"
        )
    own = next(iter(found.values()), names)
    by_name = {plain(name): name for name in names}
    return tuple(by_name.get(plain(name), name) for name in own)


def names_of(source: str) -> tuple[str, ...] | None:
    """The classes of a model's head, () for a number; None for a model without a head of this kind."""
    if is_original(source):
        return Head.of_model(load_model(source, KIND).config).names
    config = load_config(source)
    return Head.of_model(config).names if task_by_architecture(config) == KIND else None


def is_generic(own: Sequence[str], names: Sequence[str]) -> bool:
    """Whether the classes have no names but numbers; then they are taken to be in the data's order."""
    numbered = all(name in (f"LABEL_{index}", str(index)) for index, name in enumerate(own))
    return numbered and len(own) == len(names)


def matches(own: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a model has the data's classes; classes that the data only numbers may have any names."""
    numbered = all(name == f"LABEL_{index}" for index, name in enumerate(names))
    return len(own) >= len(names) if numbered else {*map(plain, own)} >= {*map(plain, names)}


def plain(name: str) -> str:
    """A name without what is written in different ways."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def positive(task: str) -> str | None:
    """The class whose F1 is reported."""
    return TASKS[task].labels[1] if task in TASKS and "f1" in TASKS[task].metrics else None


def default_metrics(head: Head) -> tuple[str, ...]:
    """The metrics for data of the user's."""
    return ("f1", "accuracy") if head.multi_label else ("accuracy",) if head.names else ("pearson", "spearman")


def metrics_of(wanted: Sequence[str], head: Head, positive: str | None) -> Callable[[Any], dict[str, float]]:
    """A function from predictions to the metrics of a task.

    :param positive: the class that F1 is of.
    :raises DataError: when scikit-learn is not installed.
    """
    try:
        scores, stats = import_module("sklearn.metrics"), import_module("scipy.stats")
    except ImportError as error:
        raise DataError(f'{error.name} is needed to measure: pip install "cofiprune[examples]"') from error

    def correlation(name: str, predicted: Any, labels: Any) -> float:
        if predicted.std() == 0 or labels.std() == 0:  # not defined; nothing was predicted
            return 0.0
        return float(getattr(stats, name)(predicted, labels).statistic)

    def compute(prediction: Any) -> dict[str, float]:
        logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        if not head.names:
            found = {"pearson": "pearsonr", "spearman": "spearmanr"}
            return {name: correlation(found[name], logits.reshape(-1), labels.reshape(-1)) for name in wanted}
        answers = logits.argmax(-1)
        functions: dict[str, Callable[[], float]] = {
            "accuracy": lambda: scores.accuracy_score(labels, answers),
            "matthews_correlation": lambda: scores.matthews_corrcoef(labels, answers),
            "f1": lambda: scores.f1_score(labels, answers, pos_label=head.names.index(positive), zero_division=0),
        }
        return {name: float(functions[name]()) for name in wanted}

    return compute


if __name__ == "__main__":
    sys.exit(main("run_glue", "Prune an encoder on GLUE or your own text data.", add_options, make_task))
