"""Models, tokenizers and data by name: a local directory or a name on the hub, and files of data.

Files are read before a model is loaded, because the labels in them may say what head to make.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cofiprune.cli.beside import Beside, apart
from cofiprune.cli.options import UsageError, at_least, one_of
from cofiprune.data import Labels, TextColumns, find_text_columns, load_rows, tokenise
from cofiprune.data.cached import CACHED
from cofiprune.data.tasks import IGNORED, Task, task_by_name
from cofiprune.data.text import collator_for
from cofiprune.errors import CheckpointError, DataError, explained

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TASKS: Mapping[str, str] = {
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "masked-lm": "ForMaskedLM",
    "multiple-choice": "ForMultipleChoice",
    "image-classification": "ForImageClassification",
    "audio-classification": "ForAudioClassification",
    "feature-extraction": "",
}
"""Task: the ending of the AutoModel class that loads a model for it."""
_TOKENIZER_FILES = ("tokenizer*.json", "vocab.*", "merges.txt", "*.model")
_COLUMNS = ("text_column", "text_pair_column", "label_column")
_BARE = "unlabelled_file"
"""The option of a file of rows whose labels, if there are any, are not read."""
Row = dict[str, Any]


@dataclass
class Loaded:
    """A model, and data sets that it can read."""

    model: PreTrainedModel
    task: str
    beside: Beside
    tokenizer: Any = None
    """None for a model without one."""
    datasets: dict[str, list[Row]] = field(default_factory=dict)
    """By the name of the option that gave the file."""
    collator: Any = None
    """Makes batches, where rows are more than padded."""


def add_model_options(parser: argparse.ArgumentParser, essential: argparse._ArgumentGroup | None = None) -> None:
    """Add the model, as a position or as `--model`, and its task.

    :param essential: the group of options for the first.
    """
    # Without SUPPRESS an empty position would overwrite what --model gave.
    (essential or parser).add_argument(
        "model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help="directory or hub name"
    )
    parser.add_argument("--model", dest="model", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add_task_option(parser)


def add_task_option(parser: argparse.ArgumentParser) -> None:
    """Add the choice of a task."""
    text = f"{', '.join(TASKS)} (default: what the model's configuration says, else {next(iter(TASKS))})"
    parser.add_argument("--task", type=one_of(TASKS, "task"), metavar="TASK", help=text)


def model_name(options: argparse.Namespace) -> str:
    """Return the model that the command line names.

    :raises UsageError: when it names none.
    """
    if not hasattr(options, "model"):
        raise UsageError("MODEL is missing: a directory with config.json, or a name on the hub")
    return str(options.model)


def load_config(name: str) -> PretrainedConfig:
    """Load a model's configuration.

    :raises CheckpointError: when there is no such model.
    """
    from transformers import AutoConfig

    _check_directory(name)
    nowhere = "" if Path(name).is_dir() else ": there is no such directory, and from the hub"
    # The hub, the file and the validators have exceptions of their own.
    with explained(CheckpointError, f"cannot load {name}{nowhere}", Exception):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)  # type: ignore[no-any-return]


def task_by_architecture(config: PretrainedConfig) -> str | None:
    """Return the task of the class that a model was saved from; None when the configuration does not tell."""
    architecture = next(iter(config.architectures or ()), "")
    endings = {**TASKS, "feature-extraction": "Model"}
    return next((task for task, ending in endings.items() if architecture.endswith(ending)), None)


def load_model(
    name: str,
    task: str | None = None,
    *,
    config: PretrainedConfig | None = None,
    dtype: Any = None,
    new_head: bool = False,
) -> PreTrainedModel:
    """Load a model by the AutoModel class of a task, in evaluation mode.

    :param task: by default the one of the architecture in the configuration, else sequence classification.
    :param dtype: of the weights; float32 by default, whatever they are stored in.
    :param new_head: weights that the checkpoint lacks are to be trained, and need no warning.
    :raises CheckpointError: when it cannot be loaded, saying why.
    """
    import torch
    import transformers

    config = config or load_config(name)
    task = task or task_by_architecture(config) or next(iter(TASKS))
    alone = not TASKS[task] and str(next(iter(config.architectures or ()), "")).endswith("EncoderModel")  # T5's
    auto = getattr(transformers, f"AutoModel{'ForTextEncoding' if alone else TASKS[task]}")
    original = (Path(name) / "pytorch_model.bin").is_file()
    hint = f" (if the original CoFi wrote it, read it by: cofiprune convert {name} OUT)" if original else ""
    # Missing files, shapes that differ, a task that the family does not have.
    with explained(CheckpointError, f"cannot load {name} for {task}{hint}", Exception):
        model, found = auto.from_pretrained(
            name, config=config, dtype=dtype or torch.float32, trust_remote_code=False, output_loading_info=True
        )
    new = sorted(found["missing_keys"])
    if new and not new_head:
        named = f"{', '.join(new[:2])}{' and others' if new[2:] else ''}"
        warnings.warn(f"{name} has no weights for {named}: they are random until trained", UserWarning, stacklevel=2)
    model.train(False)
    return model  # type: ignore[no-any-return]


def to_device(model: PreTrainedModel, device: str | None) -> PreTrainedModel:
    """Move a model to a device, by default to a GPU where there is one.

    :raises UsageError: when there is no such device.
    """
    import torch

    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    # torch asserts that it was compiled for the device.
    with explained(UsageError, f"cannot use the device {wanted!r}", RuntimeError, AssertionError):
        return model.to(wanted)  # type: ignore[no-any-return, arg-type]


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer, or return None for a model without one.

    :raises CheckpointError: when it is there and cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder = Path(name)
    # For a directory without its files transformers makes up an empty tokenizer.
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_FILES):
        return None
    with explained(CheckpointError, f"cannot load the tokenizer of {name}", Exception):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def add_data_options(
    parser: argparse.ArgumentParser, *, train: bool, files: argparse._ArgumentGroup | None = None
) -> None:
    """Add the files, their columns and how text is tokenised.

    :param files: the group of options for the files.
    """
    group = parser.add_argument_group("data")
    kinds = "csv, tsv, json, jsonl, parquet or txt"
    add = (files or group).add_argument
    if train:
        add("--train-file", metavar="FILE", help=f"training data: {kinds}, or a folder that `datasets` saved")
    add("--validation-file", metavar="FILE", help=f"data to evaluate on: {kinds}")
    add = group.add_argument
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
    given = {option: getattr(options, option, None) for option in ("train_file", "validation_file", _BARE)}
    config = load_config(name)
    files = {option: load_rows(path) for option, path in given.items() if path is not None}
    beside = Beside.of(name)
    task = options.task or _task("feature-extraction" if beside.pools else task_by_architecture(config), files)
    kind = task_by_name(TASKS[task]) or "embedding"
    named = {column: getattr(options, column) for column in _COLUMNS}
    columns = {option: _columns(rows[0], kind, named, option, str(given[option])) for option, rows in files.items()}
    for option, chosen in columns.items() if labelled else ():
        if option != _BARE:
            _check_labelled(files[option][0], chosen, task, str(given[option]))
    rows, chosen = next(((files[option], columns[option]) for option in files), ([], TextColumns(None)))
    _set_head(config, options, task, _labels(rows, chosen, task))
    model = load_model(name, task, config=config, new_head=trained)
    loaded = Loaded(model, task, beside, load_tokenizer(options.tokenizer or name))
    needs_tokenizer = any(chosen.text is not None for chosen in columns.values())
    if needs_tokenizer and loaded.tokenizer is None:
        raise DataError(f"{options.tokenizer or name} has no tokenizer for the text; name one by --tokenizer")
    for option, rows in files.items():
        settings = {"columns": columns[option], "max_length": options.max_length, "where": str(given[option])}
        loaded.datasets[option] = tokenise(rows, loaded.tokenizer, model, **settings)
    if needs_tokenizer:
        loaded.collator = collator_for(model, loaded.tokenizer)
    return loaded


def _columns(row: Row, kind: Task, named: Mapping[str, str | None], option: str, where: str) -> TextColumns:
    """Return the columns of a file; one of rows whose labels do not count may lack those that are named."""
    if option != _BARE:
        return find_text_columns(row, kind, **named, where=where)
    there = {column: name if name in row else None for column, name in named.items()}
    return replace(find_text_columns(row, kind, **there, where=where), label=None)


def _check_directory(name: str) -> None:
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and any(path.glob("0_*Transformer/config.json")):
            raise CheckpointError(apart(path))
        if not (path / "config.json").is_file():
            found = ", ".join(sorted(file.name for file in path.iterdir())[:6]) or "nothing"
            raise CheckpointError(f"{name} holds no model: it has no config.json; in it: {found}")
        if (path / "zs.pt").is_file() and not (path / "model.safetensors").is_file():  # it would load without its masks
            raise CheckpointError(f"{name} has masks of the original CoFi; read it by: cofiprune convert {name} OUT")
    elif path.exists():
        raise CheckpointError(f"{name} is a file; name the directory that holds config.json and the weights")
    elif name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        raise CheckpointError(f"there is no directory {name}")


def _task(stated: str | None, files: Mapping[str, list[Row]]) -> str:
    """Return what the model was saved for; a pretrained one with labelled texts is for classifying them."""
    stated = stated or next(iter(TASKS))
    labels = [row.get("label") for rows in files.values() for row in rows[:1]]
    if stated in ("masked-lm", "feature-extraction") and any(isinstance(label, str | int | float) for label in labels):
        return "sequence-classification"
    return stated


def _set_head(config: PretrainedConfig, options: argparse.Namespace, task: str, labels: list[Any]) -> None:
    """Make a configuration describe the head for the labels, where the model has none for the task."""
    names = tuple(name.strip() for name in (options.label_names or "").split(",") if name.strip())
    if task_by_architecture(config) not in (task, None) and labels:
        Labels.of_data(labels, names).apply(config)
    elif names:
        Labels.name(config, names)


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
    if wanted and columns.label is None and "start_positions" not in row and not set(CACHED) & set(row):
        raise DataError(
            f"{where} has no column of a known name for {wanted}; its columns are {', '.join(row)}; name it by "
            "--label-column"
        )
