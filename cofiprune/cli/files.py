"""Rows from data files: tables, JSON and Parquet, each row a dict."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from cofiprune.errors import DataError, suggest

Row = dict[str, Any]


def read_rows(path: str | Path) -> list[Row]:
    """Read a data file; its ending says how.

    :raises DataError: when it is missing, of another kind, empty or damaged.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise DataError(f"{file} is a directory; name a data file ({', '.join(_READERS)})")
    if not file.exists():
        near = suggest(file.name, [other.name for other in file.parent.iterdir()]) if file.parent.is_dir() else ""
        raise DataError(f"there is no file {file}.{near}")
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"{file} has an ending that is not known; data files end in {', '.join(_READERS)}")
    try:
        rows = reader(file)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not text in UTF-8: {error.reason} at byte {error.start}") from error
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read {file}: {' '.join(str(error).split())}") from error
    if not rows:
        raise DataError(f"{file} has no rows")
    return rows


def _table(file: Path, **dialect: Any) -> list[Row]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, **dialect)
        rows: list[Row] = []
        for row in reader:
            if None in row or None in row.values():
                found = sum(value is not None for value in row.values()) + len(row.get(None) or ()) - (None in row)
                header = len(reader.fieldnames or ())
                raise ValueError(f"line {reader.line_num} has {found} fields, the header has {header}")
            rows.append(row)
    return rows


def _comma_separated(file: Path) -> list[Row]:
    return _table(file, strict=True)


def _tab_separated(file: Path) -> list[Row]:
    """As GLUE was published: quotes are text."""
    return _table(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _json(file: Path) -> list[Row]:
    """A list of objects, or one object a line."""
    text = file.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        return _json_lines(text)
    return [_object(row, f"entry {number}") for number, row in enumerate(json.loads(text), start=1)]


def _json_lines(text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(_object(json.loads(line), f"line {number}"))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not a JSON object ({error.msg})") from error
    return rows


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no JSON object; the file holds a list of objects, or one object a line")
    return row


def _parquet(file: Path) -> list[Row]:
    try:
        table = import_module("pyarrow.parquet").read_table(file)
        return list(table.to_pylist())
    except ImportError:
        pass
    try:
        return list(import_module("pandas").read_parquet(file).to_dict("records"))
    except ImportError:
        raise DataError(f"reading {file} needs pyarrow: pip install pyarrow (or use csv, tsv or json)") from None


_READERS: Mapping[str, Callable[[Path], list[Row]]] = {
    ".csv": _comma_separated,
    ".tsv": _tab_separated,
    ".json": _json,
    ".jsonl": _json,
    ".parquet": _parquet,
}
