"""The tasks that `evaluate.py` knows: those of run_glue, run_squad and run_ner, measured as these measure them."""

import argparse
import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import glue_data
import ner
import run_glue
import run_ner
import run_squad
from common import Task
from original import is_original
from transformers import PreTrainedModel

import cofiprune
from cofiprune.cli.models import TASKS as HEADS
from cofiprune.cli.models import load_config, load_model, task_by_architecture
from cofiprune.cli.options import Parser, UsageError
from cofiprune.errors import CheckpointError, suggest

TASKS: Mapping[str, ModuleType] = {
    **dict.fromkeys(glue_data.TASKS, run_glue),
    "squad": run_squad,
    "squad_v2": run_squad,
    **dict.fromkeys(ner.LABEL_NAMES, run_ner),
    "classification": run_glue,
    "ner": run_ner,
}
"""Task -> the example that it is one of; the last two are for data of one's own."""
_KINDS = {run_glue: "sequence-classification", run_squad: "question-answering", run_ner: "token-classification"}
_MAX_LENGTH = 128


def task_named(name: str) -> str:
    """The task that is meant, as `TASKS` has it; `SST-2` is `sst2`.

    :raises UsageError: when there is no such task.
    """
    spellings = {_plain(known): known for known in TASKS}
    if _plain(name) not in spellings:
        raise UsageError(f"unknown task {name!r}.{suggest(name.lower(), TASKS)} One of {', '.join(TASKS)}")
    return spellings[_plain(name)]


def load(source: str, task: str) -> PreTrainedModel:
    """Load a dense or compacted model, or a folder of the original CoFi, that has a head for a task.

    :raises CofipruneError: when it cannot be loaded, or has another head or none.
    """
    kind = _KINDS[TASKS[task]]
    model = None
    if is_original(source):
        model = cofiprune.load_cofi_checkpoint(Path(source).expanduser())
        stated = type(model).__name__
    else:
        config = load_config(source)
        stated = next(iter(config.architectures or ()), "model of no stated class")
        if task_by_architecture(config) == kind:
            model = load_model(source, kind, config=config)
    if model is None or not type(model).__name__.endswith(HEADS[kind]):
        raise CheckpointError(
            f"{source} is a {stated}, and {task} needs a model with a trained head: one ...{HEADS[kind]}"
        )
    return model


def make_task(options: argparse.Namespace, source: str) -> Task:
    """Read the data of a task, and tokenise it for a model; labels take the order of the model's.

    :param source: the model, which brings its tokenizer.
    :raises CofipruneError: when data or tokenizer cannot be read, or the model has other labels.
    """
    name, module = options.task, TASKS[options.task]
    changes: dict[str, Any] = {}
    if name == "classification":
        if options.validation_file is None:
            raise UsageError("classification is for data of your own: give a file by --validation-file")
        # The file stands for the training data as well, of which an evaluation needs none.
        changes = {"train_file": options.validation_file, "validation_file": options.validation_file, "task": None}
    elif options.validation_file is not None:
        raise UsageError(f"--validation-file is for the task classification; {name} has a --data-dir")
    elif name == "ner" and options.data_dir is None:
        raise UsageError("ner is for data of your own: give its folder by --data-dir")
    elif module is run_squad:
        changes = {"version_2_with_negative": name == "squad_v2"}
    else:
        changes = {"task": name}
    try:
        with redirect_stdout(io.StringIO()):  # what is read is said in the table, and --json prints JSON alone
            task: Task = module.make_task(_options(module, options, source, changes))
    except CheckpointError as error:
        if "has no tokenizer" not in str(error):
            raise
        raise CheckpointError(f"{source} has no tokenizer; copy the files of the model that it came from") from error
    if module is run_ner:
        task.new_model(source)  # complains of a model with other tags; run_glue follows the model's order
    return task


def _options(
    module: ModuleType, options: argparse.Namespace, source: str, changes: Mapping[str, Any]
) -> argparse.Namespace:
    """What an example would read from its own command line, for a run that measures and trains nothing."""
    parser = Parser(prog="evaluate", description=f"options of {module.__name__}")
    parser.set_defaults(max_length=_MAX_LENGTH)
    module.add_options(parser)
    given = parser.parse(options.more)
    given.model, given.pretrained_pruned_model, given.teacher = source, None, "none"
    given.trains, given.train_rows, given.eval_rows = False, 1, options.eval_rows
    given.tiny, given.seed = options.tiny, 57
    given.data_dir = options.data_dir
    given.max_length = options.max_length or given.max_length
    vars(given).update(changes)
    return given


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())
