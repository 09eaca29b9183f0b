"""Texts without labels for `distill_embeddings.py`: from files, or the documentation strings of this installation."""

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from quickstart_data import DataError as NoTextsError
from quickstart_data import docstring_task

from cofiprune.cli.files import read_rows
from cofiprune.errors import DataError, suggest

TEXT_COLUMNS = (
    "text", "sentence", "sentence1", "sentence2", "premise", "hypothesis", "question", "question1", "question2",
)  # fmt: skip
"""Columns that are read where none is named: all of them that a file has."""
SCORE_COLUMNS = ("score", "label", "similarity_score", "similarity")
ENDINGS = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")
FEWEST_HELD_OUT, MOST_HELD_OUT = 10, 1000
"""Similarities of all pairs of held-out texts are compared: half a million of them."""


@dataclass(frozen=True)
class Texts:
    """What is learned from, and what is measured on; no text is in both."""

    train: list[str]
    held_out: list[str]
    source: str


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs of sentences with a similarity that people gave them."""

    first: list[str]
    second: list[str]
    scores: list[float]


def read_texts(options: argparse.Namespace) -> Texts:
    """The texts that the options ask for, in a random order that is always the same.

    Texts that occur twice are kept once. Where there is no file to hold out, a tenth of the texts is held out.

    :raises DataError: when there are too few, or none.
    """
    train_file, held_out_file = options.train_file, options.validation_file
    if options.data_dir is not None:
        train_file = train_file or _split(options.data_dir, ("train",))
        held_out_file = held_out_file or _split(options.data_dir, ("validation", "dev", "test"), needed=False)
    if train_file is not None:
        source = str(train_file)
        texts = _unique(_texts_of(train_file, options.text_column, options.split_sentences))
        apart = [] if held_out_file is None else _texts_of(held_out_file, options.text_column, options.split_sentences)
        held_out = _unique(apart, less=set(texts))
    elif held_out_file is not None:
        raise DataError("--validation-file needs --train-file: texts to learn from")
    else:
        source = "documentation strings of this Python installation"
        texts, held_out = _documentation(tiny=options.tiny)
    order = np.random.RandomState(1234).permutation(len(texts)).tolist()
    texts = [texts[index] for index in order]
    if not held_out:
        count = min(MOST_HELD_OUT, max(FEWEST_HELD_OUT, len(texts) // 10))
        texts, held_out = texts[count:], texts[:count]
    texts, held_out = texts[: options.train_rows], held_out[: min(options.eval_rows or MOST_HELD_OUT, MOST_HELD_OUT)]
    if len(texts) < options.batch_size or len(held_out) < FEWEST_HELD_OUT:
        raise DataError(
            f"{source}: {len(texts)} texts to learn from and {len(held_out)} to measure on; needed are a batch of "
            f"{options.batch_size} and {FEWEST_HELD_OUT}"
        )
    return Texts(texts, held_out, source)


def read_scored_pairs(file: Path) -> ScoredPairs:
    """Pairs of sentences and their similarity, as STS-B has them.

    :raises DataError: when a column is missing, or a score is no number.
    """
    rows = read_rows(file)
    score = next((name for name in SCORE_COLUMNS if name in rows[0]), None)
    if score is None or not {"sentence1", "sentence2"} <= set(rows[0]):
        raise DataError(
            f"{file} needs the columns sentence1, sentence2 and one of {', '.join(SCORE_COLUMNS)}; "
            f"it has {', '.join(rows[0])}"
        )
    scores = []
    for number, row in enumerate(rows, start=1):
        try:
            scores.append(float(row[score]))
        except (TypeError, ValueError):
            raise DataError(f"{file}, row {number}: the {score} is {row[score]!r}, which is no number") from None
    return ScoredPairs([str(row["sentence1"]) for row in rows], [str(row["sentence2"]) for row in rows], scores)


def encode(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Tokenised rows, each of its own length."""
    columns = tokenizer(list(texts), truncation=True, max_length=max_length)
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _documentation(*, tiny: bool) -> tuple[list[str], list[str]]:
    try:
        task = docstring_task(16, 8) if tiny else docstring_task()
    except NoTextsError as error:
        raise DataError(str(error).replace("--task and --data-dir", "--train-file")) from error
    train, held_out = ([example.text for example in side] for side in (task.train, task.validation))
    return train, held_out


def _split(folder: Path, stems: Sequence[str], *, needed: bool = True) -> Path | None:
    """The file of a split: of that very name, else the first that starts so."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS)
    for stem in stems:
        for match in (lambda file: file.stem == stem, lambda file: file.stem.startswith(stem)):  # noqa: B023
            found = next(filter(match, files), None)
            if found is not None:
                return found
    if needed:
        found_names = ", ".join(file.name for file in files[:6]) or "no data files"
        raise DataError(f"{folder} has no {stems[0]}.* ({', '.join(ENDINGS)}); in it: {found_names}")
    return None


def _texts_of(file: Path, columns: Sequence[str] | None, split: bool) -> list[str]:
    """The texts of a file: lines of plain text, or every text column of a table."""
    if file.suffix.lower() == ".txt":
        if columns:
            raise DataError(f"{file} is plain text, a text a line; --text-column is for tables")
        try:
            cells = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not text in UTF-8: {error.reason} at byte {error.start}") from error
    else:
        rows = read_rows(file)
        names = columns or [name for name in TEXT_COLUMNS if isinstance(rows[0].get(name), str)]
        for name in names:
            if name not in rows[0]:
                raise DataError(
                    f"{file} has no column {name!r}.{suggest(name, rows[0])} Its columns: {', '.join(rows[0])}"
                )
        if not names:
            raise DataError(
                f"{file} has no text column of a known name ({', '.join(TEXT_COLUMNS)}); its columns are "
                f"{', '.join(rows[0])}; name one by --text-column"
            )
        cells = [_text(row[name], name, file, number) for name in names for number, row in enumerate(rows, start=1)]
    return [part for cell in cells for part in (sentences(cell) if split else [cell.strip()]) if part]


def _text(value: Any, name: str, file: Path, number: int) -> str:
    if not isinstance(value, str):
        raise DataError(f"{file}, row {number}: there is no text in {name!r}, but {value!r}")
    return value


def sentences(text: str, fewest_words: int = 5) -> list[str]:
    """The sentences of a text, less headings and scraps.

    >>> sentences(" = A heading of a page = \\nA sentence of six words . Not one .")
    ['A sentence of six words .']
    """
    parts = [part for line in text.splitlines() for part in re.split(r"(?<=[.!?])\s+", line.strip())]
    return [part for part in parts if len(part.split()) >= fewest_words and not part.startswith("=")]


def _unique(texts: Iterable[str], less: set[str] | None = None) -> list[str]:
    return [text for text in dict.fromkeys(texts) if text not in (less or ())]
