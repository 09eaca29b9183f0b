"""Which columns of a data file hold the text and the label: named on the command line, or known by their names."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cofiprune.cli.files import Row
from cofiprune.errors import DataError, suggest

# What the files of GLUE, SQuAD and CoNLL call them, in the order in which they are looked for.
_TEXTS: tuple[tuple[str, ...], ...] = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "context"),
    ("text_a", "text_b"),
    ("#1 String", "#2 String"),
    ("sentence",),
    ("text",),
)
_WORDS = (("tokens",), ("words",))
_LABELS = ("label", "labels", "gold_label", "is_duplicate", "Quality")
_TAGS = ("ner_tags", "pos_tags", "tags", "labels", "label")
_ANSWERS = ("answers",)
INPUTS = ("input_ids", "pixel_values", "input_values", "input_features", "inputs_embeds")
"""Columns of rows that are a model's inputs already."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read."""

    text: str | None
    """None for rows that are a model's inputs already."""
    pair: str | None
    label: str | None


def add_column_options(parser: argparse.ArgumentParser) -> None:
    """Add the names of columns."""
    parser.add_argument("--text-column", metavar="NAME", help="text, or first text of a pair (default: by its name)")
    parser.add_argument("--text-pair-column", metavar="NAME", help="second text of a pair")
    parser.add_argument("--label-column", metavar="NAME", help="label; classes may be names or numbers")
    parser.add_argument(
        "--label-names", metavar="A,B,...", help="names of the classes in the order of their ids, where they have none"
    )


def find_columns(row: Row, options: argparse.Namespace, task: str, where: str) -> Columns:
    """Choose the columns to read.

    :param row: the first of a file.
    :raises DataError: when a column that is named is not there, or no text is recognised.
    """
    for name in (options.text_column, options.text_pair_column, options.label_column):
        if name is not None and name not in row:
            raise DataError(f"{where} has no column {name!r}.{suggest(name, row)} Its columns: {', '.join(row)}")
    known = {"token-classification": _TAGS, "question-answering": _ANSWERS, "masked-lm": ()}.get(task, _LABELS)
    label = options.label_column or next((name for name in known if name in row), None)
    if options.text_column is not None:
        return Columns(options.text_column, options.text_pair_column, label)
    if any(isinstance(row.get(name), list) for name in INPUTS):
        return Columns(None, None, label)
    found = _texts(row, _WORDS if task == "token-classification" else _TEXTS)
    if found is None:
        wanted = ", ".join("+".join(names) for names in (_WORDS if task == "token-classification" else _TEXTS))
        raise DataError(
            f"{where} has no text column of a known name ({wanted}); its columns are {', '.join(row)}; name them by "
            "--text-column and --label-column"
        )
    pair = options.text_pair_column or (found[1] if len(found) == 2 else None)
    return Columns(found[0], pair, label)


def column(rows: Sequence[Row], name: str, kind: type, where: str) -> list[Any]:
    """Return the values of a column that must all be of one type.

    :raises DataError: naming the first row where it is another.
    """
    values = [row.get(name) for row in rows]
    for number, value in enumerate(values):
        if not isinstance(value, kind):
            nouns: Mapping[type, str] = {str: "text", list: "list of words", dict: "answer"}
            raise DataError(f"{where}, row {number} (from 0) has no {nouns[kind]} in {name!r}, but {value!r}")
    return values


def _texts(row: Row, known: Sequence[tuple[str, ...]]) -> tuple[str, ...] | None:
    return next((names for names in known if all(name in row for name in names)), None)
