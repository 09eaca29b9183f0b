"""A model with its data: files are read first, because the labels in them may say what head to make."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cofiprune.cli.models import TASKS, load_config, load_model, load_tokenizer, model_name, task_by_architecture
from cofiprune.cli.options import at_least
from cofiprune.data import Labels, TextColumns, find_text_columns, load_rows, tokenise
from cofiprune.data.tasks import IGNORED, task_by_name
from cofiprune.errors import DataError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_COLUMNS = ("text_column", "text_pair_column", "label_column")
Row = dict[str, Any]


@dataclass
class Loaded:
    """A model, and data sets that it can read."""

    model: PreTrainedModel
    task: str
    tokenizer: Any = None
    """None for a model without one."""
    datasets: dict[str, list[Row]] = field(default_factory=dict)
    """By the name of the option that gave the file."""
    collator: Any = None
    """Makes batches, where rows are more than padded."""


def add_data_options(parser: argparse.ArgumentParser, *, train: bool) -> None:
    """Add the files, their columns and how text is tokenised."""
    group = parser.add_argument_group("data")
    kinds = "csv, tsv, json, jsonl, parquet or txt"
    add = group.add_argument
    if train:
        add("--train-file", metavar="FILE", help=f"training data: {kinds}, or a folder that `datasets` saved")
    add("--validation-file", metavar="FILE", help=f"data to evaluate on: {kinds}")
    add("--text-column", metavar="NAME", help="text, or first text of a pair (default: by its name)")
    add("--text-pair-column", metavar="NAME", help="second text of a pair")
    add("--label-column", metavar="NAME", help="label; classes may be names or numbers")
    add("--label-names", metavar="A,B,...", help="names of the classes in the order of their ids, where they have none")
    length = "tokens after which a text is cut (default: 128, with passages 384)"
    add("--max-length", type=at_least(1), metavar="N", help=length)
    add("--tokenizer", metavar="NAME", help="directory or hub name (default: that of the model)")


def load(options: argparse.Namespace, *, labelled: bool, trained: bool = False) -> Loaded:
    """Load the model that the options name, with their data files tokenised for it.

    :param labelled: whether every file must have labels.
    :param trained: whether a head that the checkpoint does not have is about to be trained.
    :raises CofipruneError: for whatever is missing or does not fit.
    """
    name = model_name(options)
    given = {"train_file": getattr(options, "train_file", None), "validation_file": options.validation_file}
    config = load_config(name)
    files = {option: load_rows(path) for option, path in given.items() if path is not None}
    task = options.task or _task(config, files)
    kind = task_by_name(TASKS[task]) or "embedding"
    named = {column: getattr(options, column) for column in _COLUMNS}
    columns = {
        option: find_text_columns(rows[0], kind, **named, where=str(given[option])) for option, rows in files.items()
    }
    for option, chosen in columns.items() if labelled else ():
        _check_labelled(files[option][0], chosen, task, str(given[option]))
    rows, chosen = next(((files[option], columns[option]) for option in files), ([], TextColumns(None)))
    _set_head(config, options, task, _labels(rows, chosen, task))
    model = load_model(name, task, config=config, new_head=trained)
    loaded = Loaded(model, task, load_tokenizer(options.tokenizer or name))
    needs_tokenizer = any(chosen.text is not None for chosen in columns.values())
    if needs_tokenizer and loaded.tokenizer is None:
        raise DataError(f"{options.tokenizer or name} has no tokenizer for the text; name one by --tokenizer")
    for option, rows in files.items():
        settings = {"columns": columns[option], "max_length": options.max_length, "where": str(given[option])}
        loaded.datasets[option] = tokenise(rows, loaded.tokenizer, model, **settings)
    if task == "masked-lm" and needs_tokenizer:
        from transformers import DataCollatorForLanguageModeling

        loaded.collator = DataCollatorForLanguageModeling(loaded.tokenizer)
    return loaded


def _task(config: PretrainedConfig, files: Mapping[str, list[Row]]) -> str:
    """Return what the model was saved for; a pretrained one with labelled texts is for classifying them."""
    stated = task_by_architecture(config) or next(iter(TASKS))
    labels = [row.get("label") for rows in files.values() for row in rows[:1]]
    if stated in ("masked-lm", "feature-extraction") and any(isinstance(label, str | int | float) for label in labels):
        return "sequence-classification"
    return stated


def _set_head(config: PretrainedConfig, options: argparse.Namespace, task: str, labels: list[Any]) -> None:
    """Make a configuration describe the head for the labels, where the model has none for the task."""
    names = tuple(name.strip() for name in (options.label_names or "").split(",") if name.strip())
    own = Labels.of_model(config)
    if task_by_architecture(config) not in (task, None) and labels:
        Labels.of_data(labels, names).apply(config)
    elif names and len(names) != len(own.names):
        raise DataError(f"--label-names has {len(names)} names and the model {config.num_labels} labels")
    elif names:
        Labels(names, own.multi_label).apply(config)


def _labels(rows: Sequence[Row], columns: TextColumns, task: str) -> list[Any]:
    """Return the labels from which a head can be made."""
    if columns.label is None or not task.endswith("classification"):
        return []
    cells = [row.get(columns.label) for row in rows]
    if task == "token-classification":
        return [tag for tags in cells if isinstance(tags, list) for tag in tags if tag != IGNORED]
    return cells


def _check_labelled(row: Row, columns: TextColumns, task: str, where: str) -> None:
    wanted = {"masked-lm": "", "question-answering": "answers", "feature-extraction": ""}.get(task, "a label")
    if wanted and columns.label is None and "start_positions" not in row:
        raise DataError(
            f"{where} has no column of a known name for {wanted}; its columns are {', '.join(row)}; name it by "
            "--label-column"
        )
