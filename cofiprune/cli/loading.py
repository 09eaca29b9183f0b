"""A model with its data: files are read first, because the labels in them may say what head to make."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cofiprune.cli.columns import Columns, add_column_options, find_columns
from cofiprune.cli.files import Row, read_rows
from cofiprune.cli.labels import Head
from cofiprune.cli.models import TASKS, load_config, load_model, load_tokenizer, model_name, task_by_architecture
from cofiprune.cli.parser import at_least
from cofiprune.cli.tokens import CLASSIFIERS, tokenised
from cofiprune.data.tasks import IGNORED
from cofiprune.errors import DataError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_MAX_LENGTH = 128
_MAX_LENGTH_OF_PASSAGES = 384  # as the published SQuAD models were trained


@dataclass
class Loaded:
    """A model, and data sets that it can read."""

    model: PreTrainedModel
    task: str
    tokenizer: Any = None
    """None for a model without one."""
    datasets: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By the name of the option that gave the file."""
    collator: Any = None
    """What makes batches, where rows are more than padded."""


def add_data_options(parser: argparse.ArgumentParser, *, train: bool) -> None:
    """Add the files, their columns and how text is tokenised."""
    group = parser.add_argument_group("data")
    kinds = "csv, tsv, json, jsonl or parquet"
    if train:
        group.add_argument("--train-file", metavar="FILE", help=f"training data: {kinds}")
    group.add_argument("--validation-file", metavar="FILE", help=f"data to evaluate on: {kinds}")
    add_column_options(group)  # type: ignore[arg-type]  # a group adds arguments as a parser does
    group.add_argument(
        "--max-length",
        type=at_least(1),
        metavar="N",
        help=f"tokens after which a text is cut (default: {_MAX_LENGTH}, with passages {_MAX_LENGTH_OF_PASSAGES})",
    )
    group.add_argument("--tokenizer", metavar="NAME", help="directory or hub name (default: that of the model)")


def load(options: argparse.Namespace, *, labelled: bool, trained: bool = False) -> Loaded:
    """Load the model that the options name, with their data files tokenised for it.

    :param labelled: whether every file must have labels.
    :param trained: whether a head that the checkpoint does not have is about to be trained.
    :raises CofipruneError: for whatever is missing or does not fit.
    """
    name = model_name(options)
    given = {"train_file": getattr(options, "train_file", None), "validation_file": options.validation_file}
    config = load_config(name)
    files = {option: read_rows(path) for option, path in given.items() if path is not None}
    task = options.task or _task(config, files)
    columns = {option: find_columns(rows[0], options, task, str(given[option])) for option, rows in files.items()}
    if labelled:
        for option, chosen in columns.items():
            _check_labelled(files[option][0], chosen, task, str(given[option]))
    head = _head(config, options, task, files, columns)
    model = load_model(name, task, config=config, new_head=trained)
    loaded = Loaded(model, task, load_tokenizer(options.tokenizer or name))
    needs_tokenizer = any(chosen.text is not None for chosen in columns.values())
    if needs_tokenizer and loaded.tokenizer is None:
        raise DataError(f"{options.tokenizer or name} has no tokenizer for the text; name one by --tokenizer")
    length = _length(options.max_length, task, model)
    for option, rows in files.items():
        loaded.datasets[option] = tokenised(
            rows, columns[option], task, loaded.tokenizer, max_length=length, head=head, where=str(given[option])
        )
    if task == "masked-lm" and needs_tokenizer:
        from transformers import DataCollatorForLanguageModeling

        loaded.collator = DataCollatorForLanguageModeling(loaded.tokenizer)
    return loaded


def _task(config: PretrainedConfig, files: Mapping[str, list[Row]]) -> str:
    """What the model was saved for; a pretrained one with labelled texts is for classifying them."""
    stated = task_by_architecture(config) or next(iter(TASKS))
    labels = [row.get("label") for rows in files.values() for row in rows[:1]]
    if stated in ("masked-lm", "feature-extraction") and any(isinstance(label, str | int | float) for label in labels):
        return "sequence-classification"
    return stated


def _head(
    config: PretrainedConfig,
    options: argparse.Namespace,
    task: str,
    files: Mapping[str, list[Row]],
    columns: Mapping[str, Columns],
) -> Head:
    """The head that the model has; one that is new is made for the labels of the first file. Both go to `config`."""
    names = tuple(name.strip() for name in (options.label_names or "").split(",") if name.strip())
    head = Head.of_model(config)
    labels = next((_labels(files[option], columns[option], task) for option in files), [])
    if task_by_architecture(config) not in (task, None) and labels:
        head = Head.of_data(labels, names)
    elif names and len(names) != len(head.names):
        raise DataError(f"--label-names has {len(names)} names and the model {config.num_labels} labels")
    elif names:
        head = Head(names, head.multi_label)
    else:
        return head
    head.apply(config)
    return head


def _labels(rows: Sequence[Row], columns: Columns, task: str) -> list[Any]:
    """The labels from which a head can be made."""
    if columns.label is None or task not in (*CLASSIFIERS, "token-classification"):
        return []
    cells = [row.get(columns.label) for row in rows]
    if task == "token-classification":
        return [tag for tags in cells if isinstance(tags, list) for tag in tags if tag != IGNORED]
    return cells


def _check_labelled(row: Row, columns: Columns, task: str, where: str) -> None:
    wanted = {"masked-lm": "", "question-answering": "answers", "feature-extraction": ""}.get(task, "a label")
    if wanted and columns.label is None and "start_positions" not in row:
        raise DataError(
            f"{where} has no column of a known name for {wanted}; its columns are {', '.join(row)}; name it by "
            "--label-column"
        )


def _length(asked: int | None, task: str, model: PreTrainedModel) -> int:
    """Tokens after which a text is cut: never more than the model reads."""
    from cofiprune.data.checks import longest_sequence

    length = asked or (_MAX_LENGTH_OF_PASSAGES if task == "question-answering" else _MAX_LENGTH)
    limit = longest_sequence(model)
    if asked is not None and limit is not None and asked > limit:
        raise DataError(f"--max-length is {asked}; {type(model).__name__} reads at most {limit} tokens")
    return length if limit is None else min(length, limit)
