"""The nine tasks of GLUE: their classes, metrics and files, and a few made-up rows of each for `--tiny`."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickstart_data import DataError
from quickstart_glue import LABEL_COLUMNS, LABEL_NAMES, TEXT_COLUMNS, find_files, load_hub, read_file

Row = dict[str, Any]


@dataclass(frozen=True)
class GlueTask:
    """A task of GLUE."""

    labels: tuple[str, ...]
    """Names of the classes in the order of their ids in the data; empty where the label is a number."""
    metrics: tuple[str, ...]
    """The official ones, the first of which compares runs."""
    large: bool
    """Which of the recipes is for it: "glue-large" or "glue-small"."""

    @property
    def preset(self) -> str:
        return "glue-large" if self.large else "glue-small"


TASKS: Mapping[str, GlueTask] = {
    "cola": GlueTask(LABEL_NAMES["cola"], ("matthews_correlation",), large=False),
    "mnli": GlueTask(LABEL_NAMES["mnli"], ("accuracy",), large=True),
    "mrpc": GlueTask(LABEL_NAMES["mrpc"], ("accuracy", "f1"), large=False),
    "qnli": GlueTask(LABEL_NAMES["qnli"], ("accuracy",), large=True),
    "qqp": GlueTask(LABEL_NAMES["qqp"], ("accuracy", "f1"), large=True),
    "rte": GlueTask(LABEL_NAMES["rte"], ("accuracy",), large=False),
    "sst2": GlueTask(LABEL_NAMES["sst2"], ("accuracy",), large=True),
    "stsb": GlueTask((), ("pearson", "spearman"), large=False),
    "wnli": GlueTask(LABEL_NAMES["wnli"], ("accuracy",), large=False),
}
PAIRS = {"mnli", "mrpc", "qnli", "qqp", "rte", "stsb", "wnli"}
"""Tasks with two texts a row."""
_COLA_COLUMNS = ("source", "label", "mark", "sentence")  # its published files have no line with names


@dataclass
class Splits:
    """Rows with `text`, `pair` (where there are two) and `label`: the name of a class, or a number."""

    train: list[Row]
    validation: dict[str, list[Row]]
    """By the ending that their metrics' names get: "" and, for MNLI, "_mismatched"."""


def read_glue(name: str, folder: Path, *, train: bool = True) -> Splits:
    """Read a task from a folder with `train.*` and `validation.*` or `dev.*`, the published files or Parquet.

    MNLI has two validation files, `*_matched*` and `*_mismatched*`; the second one may be missing.

    :param train: whether the training rows are wanted; without, there are none.
    :raises DataError: when files, columns or labels are missing, saying which.
    """
    if not folder.is_dir():
        raise DataError(f"the data folder {folder} does not exist")
    places = {"train": find_files(folder, ("train",))} if train else {}
    if name == "mnli":
        places[""] = find_files(folder, ("validation_matched", "dev_matched", "validation", "dev"))
        if any("mismatched" in file.stem for file in folder.iterdir()):
            places["_mismatched"] = find_files(folder, ("validation_mismatched", "dev_mismatched"))
    else:
        places[""] = find_files(folder, ("validation", "dev"))
    found = {split: [row for file in files for row in _published(name, file)] for split, files in places.items()}
    return _splits(name, found)


def hub_glue(name: str) -> Splits:
    """Download a task from the hub.

    :raises DataError: when it cannot be had.
    """
    sets = load_hub(name)
    if name == "mnli":
        chosen = {"": "validation_matched", "_mismatched": "validation_mismatched"}
    else:
        chosen = {"": "validation"}
    return _splits(name, {split: list(sets[source]) for split, source in {"train": "train", **chosen}.items()})


def tiny_glue(name: str, count: int = 128) -> Splits:
    """Made-up rows: a word of the text says the label."""
    labels: Sequence[Any] = TASKS[name].labels or (0.0, 1.5, 2.5, 4.0, 5.0)
    words = ("red", "green", "blue", "yellow", "white")

    def rows(begin: int) -> list[Row]:
        found = []
        for index in range(begin, begin + count):
            kind = index % len(labels)
            row = {"text": f"the {words[kind]} thing has number {index}", "label": labels[kind]}
            found.append({**row, "pair": f"a thing that is {words[kind]}"} if name in PAIRS else row)
        return found

    validation = {"": rows(count), **({"_mismatched": rows(2 * count)} if name == "mnli" else {})}
    return Splits(rows(0), validation)


def _published(name: str, file: Path) -> list[Row]:
    """The rows of a file, less the few of the published tables that are broken."""
    rows = read_file(file)
    if name == "cola" and file.suffix == ".tsv" and rows and "sentence" not in rows[0]:
        with file.open(encoding="utf-8") as lines:
            parts = [line.rstrip("\n").split("\t") for line in lines]
        return [dict(zip(_COLA_COLUMNS, part, strict=True)) for part in parts if len(part) == len(_COLA_COLUMNS)]
    return [row for row in rows if None not in row and None not in row.values()]


def _splits(name: str, found: Mapping[str, Iterable[Row]]) -> Splits:
    splits = {split: _rows(name, list(rows), split) for split, rows in found.items()}
    return Splits(splits.pop("train", []), splits)


def _rows(name: str, rows: list[Row], split: str) -> list[Row]:
    """The same rows with our names of columns, and labels by name."""
    where = "train" if split == "train" else f"validation{split}"
    if not rows:
        raise DataError(f"{where} of {name} has no rows")
    texts = next((columns for columns in TEXT_COLUMNS if rows[0].keys() >= set(columns)), None)
    label = next((column for column in (*LABEL_COLUMNS, "score") if column in rows[0]), None)
    if texts is None or label is None or (name in PAIRS) != (len(texts) == 2):
        raise DataError(
            f"{where} of {name} needs {'two text columns' if name in PAIRS else 'a text column'} and a label; its "
            f"columns are {', '.join(map(str, rows[0]))}"
        )
    task = TASKS[name]
    result = []
    for number, row in enumerate(rows):
        made = dict(zip(("text", "pair"), (row[column] for column in texts), strict=False))
        if not all(isinstance(text, str) for text in made.values()):
            raise DataError(f"{where} of {name}, row {number} (from 0) has no text in {' or '.join(texts)}")
        result.append({**made, "label": _label(row[label], task.labels, f"{where} of {name}, row {number} (from 0)")})
    return result


def _label(label: Any, names: Sequence[str], where: str) -> Any:
    text = str(label)
    try:
        if not names:
            return float(text)
        return text if text in names else names[int(re.fullmatch(r"\d+", text)[0])]  # type: ignore[index]
    except (ValueError, TypeError, IndexError):
        known = ", ".join(f"{index} {label}" for index, label in enumerate(names)) or "a number"
        raise DataError(f"{where}: label {text!r} is not among {known}") from None
