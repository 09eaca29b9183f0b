"""What the training examples have in common: from options to a pruned model, and the table at the end.

An example describes its task by a `Task` and hands over to `main`:

    def add_options(parser: Parser) -> None: ...                   # its own options, besides those in options.py
    def make_task(options: argparse.Namespace) -> Task: ...        # reads and tokenises its data

    if __name__ == "__main__":
        sys.exit(main("run_name", "What it does.", add_options, make_task))
"""

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from grid import run_grid
from options import Defaults, parse, settings_of
from original import is_original
from pipeline import check_free, prepare_dense, run_once
from quickstart_data import DataError
from quickstart_model import ModelError
from results import result_table, say
from transformers import PreTrainedModel

import cofiprune
from cofiprune.cli.labels import Head
from cofiprune.cli.models import TASKS, load_config, task_by_architecture
from cofiprune.cli.models import load_model as load_by_task
from cofiprune.cli.models import load_tokenizer as tokenizer_of
from cofiprune.cli.options import Parser
from cofiprune.errors import CheckpointError

Rows = list[dict[str, Any]]


@dataclass
class Task:
    """What an example brings: data, a head, and how it is measured."""

    name: str
    train: Rows
    """Tokenised rows, each of its own length: what `cofiprune.prune` and `finetune` take."""
    validation: Rows
    """The same, for evaluations in training."""
    new_model: Callable[[str], PreTrainedModel]
    """Loads a folder or hub name with this task's head, a new one where it has none; see `load_model`."""
    measure: Callable[[PreTrainedModel], Mapping[str, float]]
    """The task's official metrics on all validation rows; the model is on its device already."""
    tokenizer: Any
    headline: str
    """The metric of `measure` by which runs are compared; greater is better."""
    collator: Callable[[list[Any]], Any] | None = None
    """Makes batches in training, where rows are more than padded."""
    compute_metrics: Callable[[Any], dict[str, float]] | None = None
    """Metrics of the evaluations in training, beside those that the package computes."""
    preset: str = "glue-small"
    """What `--preset auto` chooses."""
    seq_len: int | None = None
    """Tokens at which speed is measured; by default `--max-length`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else the results depend on; a run goes on with the same values only."""


def main(
    name: str,
    description: str,
    add_options: Callable[[Parser], None],
    make_task: Callable[[argparse.Namespace], Task],
    argv: Sequence[str] | None = None,
    defaults: Defaults | None = None,
) -> int:
    """Run an example and return its exit code; a user's mistake ends in one line and 2."""
    transformers.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a name that is nowhere is said once
    transformers.logging.disable_progress_bar()
    try:
        options = parse(name, description, add_options, sys.argv[1:] if argv is None else argv, defaults)
        run(options, make_task(options))
    except (cofiprune.CofipruneError, DataError, ModelError, OSError) as error:
        return say_why(name, f"error: {error}", 2)
    except KeyboardInterrupt:
        return say_why(name, "interrupted; with --resume it goes on from the last checkpoint", 130)
    except SystemExit as stop:
        if not isinstance(stop.code, str):  # of --help
            raise
        return say_why(name, stop.code, 143)
    return 0


def say_why(name: str, reason: str, code: int) -> int:
    """Print one line on stderr, where arguments are named as they are on the command line."""
    message = " ".join(reason.split()).replace("resume=True", "--resume").replace("output_dir", "--output-dir")
    print(f"{name}: {message}", file=sys.stderr)
    return code


def run(options: argparse.Namespace, task: Task) -> dict[str, Any]:
    """Do what the options ask for and print the table; return the result, which OUTPUT_DIR/result.json has too.

    :raises CofipruneError: for what cannot be done.
    """
    config = settings_of(options, task.preset)
    if not options.resume and not options.grid:
        check_free(options.output_dir)
    dense = prepare_dense(options, task, config)
    if options.grid:
        return run_grid(options, task, config, dense)
    result = run_once(options, task, config, options.output_dir, dense, options.pretrained_pruned_model)
    say(result_table(result))
    return result


def subset(rows: Sequence[Any], options: argparse.Namespace, *, training: bool) -> list[Any]:
    """The rows that `--train-rows` or `--eval-rows` leave; choosing before tokenising is quicker."""
    count = options.train_rows if training else options.eval_rows
    if count is None or count >= len(rows):
        return list(rows)
    chosen = np.random.RandomState(1234).permutation(len(rows))[:count].tolist() if training else range(count)
    return [rows[index] for index in chosen]


def load_tokenizer(options: argparse.Namespace) -> Any:
    """The tokenizer of the pruned model that is fine-tuned where it brings its own, else of the model.

    :raises CofipruneError: when there is none, or that of the model is another family's.
    """
    pruned = options.pretrained_pruned_model
    found = None if pruned is None else tokenizer_of(pruned)
    if found is not None:
        return found
    families = [family(source) for source in (pruned, options.model) if source is not None]
    if len({*families} - {None}) > 1:
        raise CheckpointError(
            f"{pruned} brings no tokenizer, and --model is a {families[1]}, not a {families[0]}: name the model that "
            "it was made from by --model"
        )
    found = tokenizer_of(options.model)
    if found is None:
        raise CheckpointError(f"{options.model} has no tokenizer")
    return found


def family(source: str) -> str | None:
    """What kind of model a folder or hub name holds, such as "bert"; None when that cannot be seen."""
    try:
        config, _ = transformers.PretrainedConfig.get_config_dict(source)
    except (OSError, ValueError):  # that loading the model explains
        return None
    found: str | None = config.get("model_type")
    return found


def load_model(source: str, kind: str, head: Head | None = None) -> PreTrainedModel:
    """Load a folder or hub name; a folder of the original CoFi is converted on the way.

    :param kind: what it is for, as in `cofiprune.cli.models.TASKS`: "sequence-classification", ...
    :param head: the classes that a new head tells apart; a model that has a head of this kind keeps its own.
    :raises CofipruneError: when it cannot be loaded.
    """
    if is_original(source):
        return cofiprune.load_cofi_checkpoint(Path(source).expanduser(), task_head=TASKS[kind] or None)
    config = load_config(source)
    if head is not None and task_by_architecture(config) != kind:
        head.apply(config)
    return load_by_task(source, kind, config=config, new_head=True)
