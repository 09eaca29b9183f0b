"""`cofiprune convert`: from a directory of the original CoFi to an ordinary compacted model."""

from __future__ import annotations

import argparse

from cofiprune.cli.parser import one_of

_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    """Add what `convert` takes."""
    parser.add_argument("path", metavar="DIR", help="config.json, pytorch_model.bin and, of a run, zs.pt")
    parser.add_argument("out", metavar="OUT", help="directory to write to")
    parser.add_argument(
        "--task-head",
        type=one_of(_HEADS, "head"),
        metavar="HEAD",
        help=f"{', '.join(_HEADS)} (default: what config.json says)",
    )


def convert(options: argparse.Namespace) -> None:
    """Write the model anew and print its summary."""
    from cofiprune import cofi_checkpoint
    from cofiprune.measure.summary import summary

    model = cofi_checkpoint.convert(options.path, options.out, task_head=options.task_head)
    print(f"{summary(model)}\n\nsaved in {options.out}")
