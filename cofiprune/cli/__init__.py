"""The command line: every subcommand is a thin door to a function of the package.

Names are those of the Python arguments. A mistake of the user's is one line on stderr and exit code 2. Only what the
chosen subcommand needs is imported, and torch and transformers not before its arguments are understood.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from cofiprune.cli.options import Parser, UsageError
from cofiprune.errors import CofipruneError, suggest

MISTAKE, FAILED, INTERRUPTED, TERMINATED = 2, 1, 130, 143
_PACKAGE = Path(__file__).parents[1]

# How messages of the package name arguments, and how they are named here.
_SPELLED_HERE = {
    "resume=True": "--resume",
    "resume='auto'": "--resume auto",
    "resume=False and another output_dir": "another --output-dir",
    "overwrite=True": "--overwrite",
    "train_dataset: ": "--train-file: ",
    "eval_dataset: ": "--validation-file: ",
    "unlabelled_dataset: ": "--unlabelled-file: ",
    **{
        name: f"--{name.replace('_', '-')}"
        for name in ("text_column", "text_pair_column", "label_column", "label_names")
    },
}


class Command(NamedTuple):
    """A subcommand; its module has `add_NAME_options(parser)` and `NAME(options)`."""

    module: str
    arguments: str
    summary: str
    example: str


_TRAINED = "MODEL --train-file FILE --output-dir DIR"
_SST2 = "textattack/bert-base-uncased-SST-2"
COMMANDS = {
    "prune": Command(
        "train",
        "MODEL --output-dir DIR",
        "prune a model to a target and save the smaller one",
        f"{_SST2} --train-file train.csv --validation-file dev.csv --target-sparsity 0.9 --output-dir small",
    ),
    "finetune": Command(
        "train",
        _TRAINED,
        "train a model, dense or compacted, with or without a teacher",
        "bert-base-uncased --train-file train.csv --validation-file dev.csv --output-dir teacher",
    ),
    "evaluate": Command(
        "measure",
        "MODEL --validation-file FILE",
        "loss and metrics of a model on a data file",
        "small --validation-file dev.csv",
    ),
    "benchmark": Command(
        "measure",
        "MODEL [--baseline NAME]",
        "latency and throughput on this device",
        f"small --baseline {_SST2}",
    ),
    "inspect": Command(
        "measure",
        "MODEL",
        "parameters, MACs and structure: what can be pruned, and what cannot",
        "small",
    ),
    "export": Command(
        "export",
        "MODEL OUT",
        "write a model as ONNX and compare it with the original",
        "small small-onnx",
    ),
    "advise": Command(
        "advise",
        "MODEL --train-file FILE",
        "what the ways to make a model smaller cost on your rows",
        f"{_SST2} --train-file train.csv --validation-file dev.csv",
    ),
    "teach": Command(
        "teach",
        "MODEL --train-file FILE --output FILE",
        "write what a model puts out for rows, for students to learn from",
        f"{_SST2} --train-file train.csv --output taught.parquet",
    ),
    "vocabulary": Command(
        "vocabulary",
        "MODEL --texts FILE --output-dir DIR",
        "keep the tokens that texts use, with a proof",
        "small --texts texts.txt --output-dir smaller",
    ),
    "convert": Command(
        "export",
        "DIR OUT",
        "read a directory of the original CoFi, write a compacted model",
        "cofi-run small",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for a mistake of the user's, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.showwarning = _in_one_line  # type: ignore[assignment]  # it takes the rest as it comes
            run(arguments)
            sys.stdout.flush()
        return 0
    except KeyboardInterrupt as stop:
        return _say("interrupted", stop, INTERRUPTED)
    except SystemExit as stop:
        return _say("stopped", stop, TERMINATED) if isinstance(stop.code, str) else int(stop.code or 0)
    except BrokenPipeError:  # what was printed has gone to `head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, CofipruneError | OSError):
            return _say("error", error, MISTAKE)
        return _say(f"internal error, --debug shows where: {type(error).__name__}", error, FAILED)


def run(arguments: Sequence[str]) -> None:
    """Run the subcommand that the arguments name.

    :raises CofipruneError: for a mistake of the user's.
    """
    at = next((n for n, argument in enumerate(arguments) if not argument.startswith("-")), None)
    if at is None:
        _overview().parse(arguments)
        raise UsageError(f"a command is missing: {', '.join(COMMANDS)} (--help explains them)")
    command = arguments[at]
    if command not in COMMANDS:
        raise UsageError(f"unknown command {command!r}.{suggest(command, COMMANDS)} Commands: {', '.join(COMMANDS)}")
    chosen = COMMANDS[command]
    module = import_module(f"cofiprune.cli.{chosen.module}")
    prog = f"cofiprune {command}"
    usage = f"{prog} {chosen.arguments} [options]"
    together = re.sub(r"(--\S+) ", "\\1\u00a0", f"{prog} {chosen.example}")  # an option and its value
    example = " \\\n      ".join(textwrap.wrap(together, 68, break_on_hyphens=False)).replace("\u00a0", " ")
    described = f"{chosen.summary[0].upper()}{chosen.summary[1:]}.\n\nexample:\n  {example}"
    parser = Parser(prog=prog, usage=usage, description=described)
    getattr(module, f"add_{command}_options")(parser)
    _add_debug(parser)
    words = [*arguments[:at], *arguments[at + 1 :]]
    options = parser.parse(words)
    options.command, options.words = command, words
    import cofiprune

    cofiprune.load()
    if not options.debug:
        _quiet()
    getattr(module, command)(options)


def _overview() -> Parser:
    """Make the parser of a command line without a command."""
    from cofiprune import __version__

    listed = "\n".join(f"  {name:<11}{command.summary}" for name, command in COMMANDS.items())
    parser = Parser(
        prog="cofiprune",
        usage="cofiprune COMMAND [options]",
        description="Structured pruning for Hugging Face encoders.",
        epilog=f"commands:\n{listed}\n\nThe options of a command: cofiprune COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=f"cofiprune {__version__}")
    _add_debug(parser)
    return parser


def _add_debug(parser: Parser) -> None:
    parser.add_argument("--debug", action="store_true", help="show tracebacks, warnings and the logs of transformers")


def _quiet() -> None:
    """Keep the logs of the libraries off the terminal."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


def _say(what: str, reason: BaseException, code: int) -> int:
    """Print one line on stderr; arguments are named as they are on the command line."""
    text = " ".join(str(reason).split())
    for argument, option in _SPELLED_HERE.items():
        text = text.replace(argument, option)
    print(f"cofiprune: {what}{': ' if text else ''}{text}", file=sys.stderr)
    return code


def _in_one_line(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
    """Show the warnings of this package as single lines, and none of others."""
    if Path(filename).is_relative_to(_PACKAGE):
        print(f"cofiprune: warning: {' '.join(str(message).split())}", file=sys.stderr)
