"""The options that all training examples share, and what follows from them."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from quickstart_model import bundled_model

import cofiprune
from cofiprune.cli.options import Parser, add_settings, at_least, number, one_of, prune_config, writable_directory
from cofiprune.errors import CheckpointError, SettingsError
from cofiprune.selection.arguments import check_fraction
from cofiprune.training.config import PRESETS

TINY = {
    "epochs": 1,
    "finetune_epochs": 1,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "finetune_learning_rate": 3e-3,
    "logging_steps": 1,
}
"""Settings that `--tiny` has where they are not given."""
OPTIONS = {"teacher_epochs": 2.0, "teacher_learning_rate": 5e-5}
TINY_OPTIONS = {"teacher_epochs": 3.0, "teacher_learning_rate": 5e-3, "train_rows": 96, "eval_rows": 32}
"""Other options where they are not given, without and with `--tiny`."""
TINY_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,  # with the usual 0.02 so small a model takes long to learn anything
}
GRID_WEIGHTS = ((0.9, 0.1), (0.7, 0.3), (0.5, 0.5))
GRID_LEARNING_RATES = (1e-5, 2e-5, 3e-5)


@dataclass(frozen=True)
class Defaults:
    """What is taken where the command line says nothing; with `--tiny`, its settings go before these."""

    model: Callable[[argparse.Namespace], str]
    """Gives the folder of a model, after making it if need be."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `PruneConfig`."""
    options: Mapping[str, Any] = field(default_factory=lambda: OPTIONS)


def parse(
    name: str,
    description: str,
    add_options: Callable[[Parser], None],
    argv: Sequence[str],
    defaults: Defaults | None = None,
) -> argparse.Namespace:
    """Read the command line, and fill in what follows from it: the output folder, the model, the rows of `--tiny`.

    :param add_options: adds what only this example takes.
    :param defaults: of an example that does not read text.
    :raises CofipruneError: for whatever cannot be understood.
    """
    parser = Parser(prog=name, description=description)
    add_common_options(parser, name)
    add_options(parser)
    add_settings(parser, cofiprune.PruneConfig)
    options = parser.parse(list(argv))
    parts = (name.removeprefix("run_"), getattr(options, "task", None))
    options.output_dir = writable_directory(
        options.output_dir or str(Path("runs", "-".join(str(part) for part in parts if part))),
        other_than=(options.model, options.pretrained_pruned_model, options.teacher),
    )
    if options.resume and not options.output_dir.is_dir():
        raise CheckpointError(f"nothing to resume: there is no folder {options.output_dir}")
    options.target_sparsity = target_sparsity(options.target_sparsity)
    defaults = defaults or Defaults(text_model)
    for setting, value in {"seed": 57, **(TINY if options.tiny else defaults.settings)}.items():
        vars(options).setdefault(setting, value)
    for option, value in (TINY_OPTIONS if options.tiny else defaults.options).items():
        if getattr(options, option) is None:
            setattr(options, option, value)
    if options.teacher_epochs <= 0 or options.teacher_learning_rate <= 0:
        raise SettingsError("--teacher-epochs and --teacher-learning-rate take numbers above 0")
    options.trains = True
    # It complains of a wrong value before anything is loaded. What was typed as a seed is text.
    options.seed = settings_of(options, next(iter(PRESETS))).seed
    if options.model is None:
        options.model = defaults.model(options)
    return options


def text_model(options: argparse.Namespace) -> str:
    """The MiniLM-L6 weights that a package carries; with `--tiny`, a small BERT."""
    return tiny_model(options) if options.tiny else str(bundled_model())


def add_common_options(parser: Parser, name: str) -> None:
    """Add what every example takes, but for the settings of `PruneConfig`."""
    add = parser.add_argument
    add("--model", metavar="NAME", help="folder or hub name of an encoder (default: the packaged MiniLM-L6 weights)")
    add("--target-sparsity", default="0.9", metavar="X",
        help="share of the layers' parameters to remove, in (0, 1); none: fine-tune only (default: 0.9)")  # fmt: skip
    add("--teacher", metavar="NAME",
        help="folder or hub name; self: a copy of the model as it comes; train: fine-tune the model first, keep it in "
        "OUTPUT_DIR/teacher and prune a copy of it; none: learn from labels alone (default: train when pruning, else "
        "the folder teacher in the pruned model's, or none)")  # fmt: skip
    add("--teacher-epochs", type=number, metavar="X", help="epochs of training a teacher (default: 2)")
    add("--teacher-learning-rate", type=number, metavar="X", help="its learning rate (default: 5e-5)")
    add("--pretrained-pruned-model", metavar="DIR",
        help="skip pruning and fine-tune this: a compacted model, or a folder of the original CoFi")  # fmt: skip
    presets = (*PRESETS, "auto")
    add("--preset", type=one_of(presets, "preset"), metavar="{" + ",".join(presets) + "}",
        help="settings of the original's recipe, auto: by the task; settings that are given go on top")  # fmt: skip
    add("--output-dir", metavar="DIR", help=f"where everything goes (default: runs/{name.removeprefix('run_')}...)")
    add("--resume", action="store_true", help="go on with the run in the output folder, from its newest checkpoint")
    add("--train-rows", type=at_least(1), metavar="N", help="training rows to use, chosen at random, always the same")
    add("--eval-rows", type=at_least(1), metavar="N", help="validation rows to use, the first ones (default: all)")
    add("--max-length", type=at_least(8), default=128, metavar="N",
        help="tokens after which a text is cut (default: %(default)s)")  # fmt: skip
    add("--tiny", action="store_true", help="a small random model and few rows: see in seconds that all steps run")
    add("--benchmark", action=argparse.BooleanOptionalAction, default=True, help="measure the speed-up at the end")
    add("--grid", action="store_true",
        help="prune for each pair of distillation weights, fine-tune each with each learning rate; the same command "
        "again skips what is finished and goes on with what is not")  # fmt: skip
    add("--grid-alphas", type=weights, nargs="+", default=GRID_WEIGHTS, metavar="LAYERS,LOGITS",
        help="distill_layers_weight,distill_logits_weight of each (default: 0.9,0.1 0.7,0.3 0.5,0.5)")  # fmt: skip
    add("--grid-learning-rates", type=number, nargs="+", default=GRID_LEARNING_RATES, metavar="X",
        help="values of finetune_learning_rate (default: 1e-5 2e-5 3e-5)")  # fmt: skip


def settings_of(options: argparse.Namespace, automatic: str) -> cofiprune.PruneConfig:
    """The settings of the command line, on top of a preset.

    :param automatic: the preset that `--preset auto` means.
    """
    prunes = options.target_sparsity is not None and options.pretrained_pruned_model is None
    if not prunes and "batch_size" in vars(options):  # whatever a preset has for the time after pruning
        vars(options).setdefault("finetune_batch_size", options.batch_size)
    return prune_config(options, automatic if options.preset == "auto" else options.preset)


def target_sparsity(text: str) -> float | None:
    """A target sparsity, or None for `none`.

    :raises CofipruneError: for a percentage, with the fraction that is meant, and for what is no number.
    """
    if text.lower() == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        raise SettingsError(f"--target-sparsity takes a number in (0, 1), or none; not {text!r}") from None
    return check_fraction(value, "--target-sparsity")


def weights(text: str) -> tuple[float, float]:
    """The type of an argument that is two numbers with a comma between them."""
    layers, comma, logits = text.partition(",")
    if not comma:
        raise argparse.ArgumentTypeError(f"takes two numbers such as 0.9,0.1; not {text!r}")
    return float(layers), float(logits)


def tiny_model(options: argparse.Namespace) -> str:
    """Make a small BERT with random weights and the packaged tokenizer; return the folder that it is in."""
    folder: Path = options.output_dir / "tiny-model"
    if PartialState().is_main_process:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(bundled_model()))
        torch.manual_seed(options.seed)
        config = transformers.BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **TINY_SIZES)
        transformers.BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    PartialState().wait_for_everyone()
    return str(folder)
