"""Text classification data for the quickstart from files, or from the hub: the tasks of GLUE.

`read_task` takes a folder with the files `train.*` and `validation.*` (or `dev.*`): Parquet,
tab-separated as GLUE was published, comma-separated, or JSON. Which columns hold the texts and the
label is found from their names, so that any task with one or two texts a row can be read.
"""

import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from quickstart_data import DataError, Example, TextTask
from splits import contents

TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("#1 String", "#2 String"),
    ("sentence",),
    ("text",),
)
LABEL_COLUMNS = ("gold_label", "label", "is_duplicate", "Quality")
"""What the published files call them. The first that a file has are taken."""

LABEL_NAMES = {
    "cola": ("unacceptable", "acceptable"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qnli": ("entailment", "not_entailment"),
    "qqp": ("not_duplicate", "duplicate"),
    "rte": ("entailment", "not_entailment"),
    "sst2": ("negative", "positive"),
    "wnli": ("not_entailment", "entailment"),
}
"""Classes of the tasks in the order of their ids."""

Row = dict[str, Any]


def read_task(name: str, folder: Path) -> TextTask:
    """A task from the files `train.*` and `validation.*` (or `dev.*`) of a folder."""
    if not folder.is_dir():
        raise DataError(f"the data folder {folder} does not exist")
    splits = (find_files(folder, ("train",)), find_files(folder, ("validation", "dev")))
    train, validation = ([row for file in files for row in read_file(file)] for files in splits)
    return _text_task(name, train, validation)


def hub_task(name: str) -> TextTask:
    """A task of GLUE, downloaded from the hub."""
    if name not in LABEL_NAMES:
        known = ", ".join(LABEL_NAMES)
        raise DataError(f"the hub's GLUE has no task {name!r} that this script knows ({known})")
    glue = load_hub(name)
    validation = "validation_matched" if name == "mnli" else "validation"
    return _text_task(name, glue["train"], glue[validation])


def load_hub(name: str) -> Any:
    """The data sets of a task of GLUE by the names of their splits, downloaded from the hub."""
    try:
        import datasets

        return datasets.load_dataset("nyu-mll/glue", name)
    except Exception as error:  # whatever is between here and the hub, the remedy is the same
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"cannot load {name} from the hub ({reason})") from error


def find_files(folder: Path, stems: Sequence[str]) -> list[Path]:
    """The file of a split: of that very name, else the first that starts so, with its shards."""
    files = sorted(file for file in folder.iterdir() if file.suffix in READERS)
    exact = [file for stem in stems for file in files if file.stem == stem]
    if exact:
        return exact[:1]
    near = [file for stem in stems for file in files if file.stem.startswith(stem)]
    if not near:
        wanted = " or ".join(f"{stem}.*" for stem in stems)
        raise DataError(f"no {wanted} ({', '.join(READERS)}) in {folder}, {contents(folder)}")
    series = [re.sub(r"-\d+-of-", "-of-", file.name) for file in near]
    return [file for file, kind in zip(near, series, strict=True) if kind == series[0]]


def read_file(file: Path) -> list[Row]:
    """The rows of a data file, as they stand there."""
    try:
        return READERS[file.suffix](file)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read {file}: {str(error).splitlines()[0]}") from error


def _read_parquet(file: Path) -> list[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"pyarrow, which is not installed, is needed to read {file}") from error
    rows: list[Row] = pyarrow.parquet.read_table(file).to_pylist()
    return rows


def _read_table(file: Path) -> list[Row]:
    """Comma-separated, or tab-separated as GLUE was published, where quotes are text."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        if file.suffix == ".csv":
            return list(csv.DictReader(lines))
        return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def _read_json(file: Path) -> list[Row]:
    """A list of objects, or one object a line."""
    text = file.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        rows: list[Row] = json.loads(text)
        return rows
    return [json.loads(line) for line in text.splitlines() if line.strip()]


READERS = {
    ".parquet": _read_parquet,
    ".tsv": _read_table,
    ".csv": _read_table,
    ".json": _read_json,
    ".jsonl": _read_json,
}


def _text_task(name: str, train: Iterable[Row], validation: Iterable[Row]) -> TextTask:
    sides = [_columns(name, list(rows)) for rows in (train, validation)]
    names, ids = _labels(name, [label for _, labels in sides for label in labels])
    splits = [
        tuple(
            Example(texts[0], ids[label], texts[1] if len(texts) == 2 else None)
            for texts, label in zip(text_rows, labels, strict=True)
        )
        for text_rows, labels in sides
    ]
    return TextTask(names, *splits)


def _columns(name: str, rows: list[Row]) -> tuple[list[list[str]], list[Any]]:
    """The texts and the label of each row."""
    found = set(rows[0]) if rows else set()
    texts = next((columns for columns in TEXT_COLUMNS if found.issuperset(columns)), None)
    label = next((column for column in LABEL_COLUMNS if column in found), None)
    if texts is None or label is None:
        wanted = ", ".join("+".join(columns) for columns in TEXT_COLUMNS)
        raise DataError(
            f"{name} needs text columns ({wanted}) and one for the label "
            f"({', '.join(LABEL_COLUMNS)}); found {sorted(map(str, found)) or 'no rows'}"
        )
    text_rows = [[row[column] for column in texts] for row in rows]
    for number, row in enumerate(text_rows, start=1):
        if not all(isinstance(text, str) for text in row):
            raise DataError(f"row {number} of {name} has no text in {' or '.join(texts)}")
    return text_rows, [row[label] for row in rows]


def _labels(name: str, found: list[Any]) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Names of the classes, and the id of every label as the files may write it."""
    if name in LABEL_NAMES:
        names = LABEL_NAMES[name]
    else:
        names = tuple(sorted({str(label) for label in found}, key=lambda word: (len(word), word)))
        if all(word.isdecimal() for word in names) and len(names) >= 2:
            names = tuple(str(index) for index in range(int(names[-1]) + 1))
    ids: dict[Any, int] = {label: names.index(str(label)) for label in found if str(label) in names}
    if name in LABEL_NAMES:
        ids |= {label: index for index in range(len(names)) for label in (index, str(index))}
    unknown = sorted({str(label) for label in found if label not in ids})
    if unknown:
        raise DataError(f"labels {unknown[:5]} of {name} are not among {', '.join(names)}")
    return names, ids
