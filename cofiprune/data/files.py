"""Rows from data files, each row a dict: comma and tab separated values, JSON, Parquet, plain text."""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cofiprune.data.tables import package, parquet_rows
from cofiprune.errors import DataError, explained, suggest

RawRow = dict[str, Any]


def load_rows(path: str | Path, *splits: str) -> list[RawRow]:
    """Read the rows of a file, or of a split in a folder.

    The ending of a file says how it is read: csv and tsv have a line of names, json holds a list of objects (or the
    articles of SQuAD), jsonl an object a line, txt a text a line. A folder may also be one that `datasets` saved.

    :param splits: names that the split may have in a folder, `("validation", "dev")`; the first one that there are
        files for is read, with all its shards (`validation-00000-of-00002.parquet`, ...).
    :raises DataError: when there is nothing to read, or it is damaged.
    """
    place = Path(path).expanduser()
    for folder in (place, *(place / name for name in splits)):
        if (folder / "state.json").is_file():
            return list(package("datasets").load_from_disk(str(folder)))
    if place.is_dir() and not splits:
        raise DataError(f"{place} is a directory; name a data file ({', '.join(_READERS)})")
    if splits and not place.is_dir():
        raise DataError(f"the data folder {place} does not exist")
    rows = [row for file in (_files(place, splits) if splits else [place]) for row in _read(file)]
    if not rows:
        raise DataError(f"{place} has no rows")
    return rows


def _files(folder: Path, splits: tuple[str, ...]) -> list[Path]:
    """Return the file of a split, of that very name, else the one that begins so, with its shards."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _READERS)
    for name in splits:
        shards: dict[str, list[Path]] = {}
        exact = [file for file in files if file.stem == name]
        for file in exact or [file for file in files if file.stem.startswith(name)]:
            shards.setdefault(re.sub(r"-\d+-of-", "-of-", file.name), []).append(file)
        if len(shards) > 1:
            found = ", ".join(series[0].name for series in shards.values())
            raise DataError(f"{folder} has more than one file for {name} ({found}); give one of them the name alone")
        if shards:
            return next(iter(shards.values()))
    held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    wanted = " or ".join(f"{name}.*" for name in splits)
    raise DataError(f"there is no {wanted} ({', '.join(_READERS)}) in {folder}, which has {held}")


def _read(file: Path) -> list[RawRow]:
    if not file.exists():
        near = suggest(file.name, [other.name for other in file.parent.iterdir()]) if file.parent.is_dir() else ""
        raise DataError(f"there is no file {file}.{near}")
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"{file} has an ending that is not known; data files end in {', '.join(_READERS)}")
    with explained(DataError, f"cannot read {file}", Exception):
        return list(reader(file))


def _csv(file: Path) -> list[RawRow]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        rows: list[RawRow] = []
        for row in reader:
            if None in row or None in row.values():
                found = sum(value is not None for value in row.values()) + len(row.get(None) or ()) - (None in row)
                header = len(reader.fieldnames or ())
                raise ValueError(f"line {reader.line_num} has {found} fields, the header has {header}")
            rows.append(row)
    return rows


def _tsv(file: Path) -> list[RawRow]:
    """Tab separated values as GLUE was published: quotes are text, and a few lines are broken."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    whole = [row for row in rows if None not in row and None not in row.values()]
    if len(whole) < len(rows):
        left_out = len(rows) - len(whole)
        warnings.warn(f"{file}: {left_out} lines have not as many fields as the header; left out", stacklevel=4)
    return whole


def _json(file: Path) -> list[RawRow]:
    text = file.read_text(encoding="utf-8-sig")
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return [_line(line, number) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        return list(_questions(whole["data"]))
    entries = whole if isinstance(whole, list) else [whole]
    return [_object(row, f"entry {number}") for number, row in enumerate(entries, start=1)]


def _line(line: str, number: int) -> RawRow:
    try:
        return _object(json.loads(line), f"line {number}")
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is not a JSON object ({error.msg})") from error


def _object(row: Any, where: str) -> RawRow:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no JSON object; the file holds a list of objects, or one object a line")
    return row


def _questions(articles: list[Any]) -> Iterator[RawRow]:
    """Questions that are nested in paragraphs and articles, as SQuAD was published."""
    try:
        for paragraph in (paragraph for article in articles for paragraph in article["paragraphs"]):
            for entry in paragraph["qas"]:
                answers = {name: [answer[name] for answer in entry["answers"]] for name in ("text", "answer_start")}
                row = {"id": entry["id"], "question": entry["question"], "context": paragraph["context"]}
                yield {**row, "answers": answers}
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is not nested as SQuAD is: {type(error).__name__} {error}") from error


def stream_rows(path: str | Path) -> Iterator[RawRow]:
    """Give the rows of a file one after the other; of JSON lines, text and Parquet no more is in memory at a time.

    :raises DataError: as `load_rows`.
    """
    place = Path(path).expanduser()
    reader = _STREAMS.get(place.suffix.lower())
    if reader is None or not place.is_file():
        yield from load_rows(place)
        return
    with explained(DataError, f"cannot read {place}", Exception):
        yield from reader(place)


def _json_lines(file: Path) -> Iterator[RawRow]:
    with file.open(encoding="utf-8-sig") as lines:
        yield from (_line(line, number) for number, line in enumerate(lines, start=1) if line.strip())


def _lines(file: Path) -> Iterator[RawRow]:
    with file.open(encoding="utf-8-sig") as lines:
        yield from ({"text": line.rstrip("\r\n")} for line in lines if line.strip())


_STREAMS: Mapping[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _json_lines,
    ".txt": _lines,
    ".parquet": parquet_rows,
}
_READERS: Mapping[str, Callable[[Path], Iterable[RawRow]]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".json": _json,
    **_STREAMS,
    ".jsonl": _json,  # which may hold one list as well
}
