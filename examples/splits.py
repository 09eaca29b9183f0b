"""The files of a data set's splits in a folder, and data sets from the hub."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cofiprune.cli.files import read_rows
from cofiprune.errors import DataError

Row = dict[str, Any]
ENDINGS = (".parquet", ".json", ".jsonl")


def find_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The file of a split: the one with the first of these names, else the one that begins so, with all its shards.

    :return: empty when there is none.
    :raises DataError: when there is no such folder, or several files begin so and none has the name alone.
    """
    if not folder.is_dir():
        raise DataError(f"the data folder {folder} does not exist")
    files = sorted(file for file in folder.iterdir() if file.suffix in ENDINGS)
    for name in names:
        exact = [file for file in files if file.stem == name]
        series: dict[str, list[Path]] = {}
        for file in exact or [file for file in files if file.stem.startswith(name)]:
            series.setdefault(re.sub(r"-\d+-of-", "-of-", file.name), []).append(file)
        if len(series) > 1:
            found = ", ".join(files[0].name for files in series.values())
            raise DataError(f"{folder} has more than one file for {name} ({found}); rename one to {name}{ENDINGS[0]}")
        if series:
            return next(iter(series.values()))
    return []


def contents(folder: Path) -> str:
    """What is in a folder, for messages."""
    found = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir())
    more = ", ..." if len(found) > 8 else ""
    return f"which has {', '.join(found[:8])}{more}" if found else "which is empty"


def read_split(
    folder: Path, names: Sequence[str], reader: Callable[[Path], list[Row]] = read_rows, *, required: bool = True
) -> list[tuple[str, Row]]:
    """The rows of a split, each with where it is from, for messages.

    :param names: of the split, such as validation and dev; the first that there is a file for is read.
    :raises DataError: when there is no file, though one is required, or one that cannot be read.
    """
    files = find_files(folder, names)
    if required and not files:
        wanted = " or ".join(f"{name}.*" for name in names)
        raise DataError(f"no {wanted} ({', '.join(ENDINGS)}) in {folder}, {contents(folder)}")
    rows = [entry for file in files for entry in numbered(reader(file), str(file))]
    if files and not rows:
        raise DataError(f"{files[0]} has no rows")
    return rows


def hub_splits(name: str) -> Mapping[str, Any]:
    """The splits of a data set of the hub, each a `datasets.Dataset`.

    :raises DataError: when it cannot be had.
    """
    try:
        import datasets

        splits: Mapping[str, Any] = datasets.load_dataset(name)
    except Exception as error:  # whatever is between here and the hub, the remedy is the same
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"cannot load {name} from the hub ({reason}); --data-dir reads files of your own") from error
    return splits


def numbered(rows: Any, where: str) -> list[tuple[str, Row]]:
    """Rows, each with where it is from, for messages."""
    return [(f"{where}, row {number} (from 0)", dict(row)) for number, row in enumerate(rows)]


def need_columns(row: Row, names: Sequence[str], where: str) -> None:
    """Make sure that a row has these columns.

    :raises DataError: naming those that are missing and those that are there.
    """
    missing = [name for name in names if name not in row]
    if missing:
        raise DataError(
            f"{where}: there is no column {' or '.join(map(repr, missing))}; it takes {', '.join(names)} and "
            f"has {', '.join(map(str, row)) or 'none'}"
        )
