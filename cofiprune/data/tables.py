"""Files of rows that hold arrays: written in parts of bounded size, read back without a Python number for each value.

Parquet keeps the precision of the arrays, half precision among them, and needs pyarrow. JSON lines need nothing, and
are about five times as large.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cofiprune.data.cached import CACHED
from cofiprune.errors import DataError

Array = NDArray[Any]
Arrays = Mapping[str, Sequence[Array]]
"""By column: an array for each row, all of one number of dimensions."""
ENDINGS = (".parquet", ".jsonl")
_DIGITS = {2: 5, 4: 9, 8: 17}
"""Decimal digits from which a number of so many bytes is read back as it was."""


def package(name: str) -> Any:
    """Import what reads Parquet.

    :raises DataError: when it is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        root = name.partition(".")[0]
        raise DataError(f"it needs {root}: pip install {root} (or use csv, tsv, json or jsonl)") from None


def write_part(path: Path, rows: Sequence[Mapping[str, Any]], arrays: Arrays, ending: str) -> None:
    """Write some rows, with further columns of arrays, in the form that an ending says.

    :raises DataError: for values that such a file does not hold.
    """
    plain = [{name: _plain(value) for name, value in row.items() if name not in arrays} for row in rows]
    if ending == ".parquet":
        arrow, parquet = package("pyarrow"), package("pyarrow.parquet")
        table = arrow.Table.from_pylist(plain)
        for name, cells in arrays.items():
            table = table.append_column(name, _nested(cells, arrow))
        with path.open("wb") as file:
            parquet.write_table(table, file)
        return
    with path.open("w", encoding="utf-8") as file:
        for index, row in enumerate(plain):
            texts = (f"{json.dumps(name)}: {_text(cells[index])}" for name, cells in arrays.items())
            start = json.dumps(row)[:-1]
            file.write(f"{start}{', ' if row else ''}{', '.join(texts)}}}\n")


def join_parts(path: Path, parts: Sequence[Path], ending: str) -> None:
    """Write one file of several parts, one after the other."""
    if ending == ".parquet":
        arrow, parquet = package("pyarrow"), package("pyarrow.parquet")
        schema = arrow.unify_schemas([parquet.read_schema(part) for part in parts], promote_options="permissive")
        with path.open("wb") as file, parquet.ParquetWriter(file, schema) as writer:
            for part in parts:
                table = parquet.read_table(part)
                missing = [field for field in schema if field.name not in table.schema.names]
                for field in missing:
                    table = table.append_column(field, arrow.nulls(len(table), field.type))
                writer.write_table(table.select(schema.names).cast(schema))
        return
    with path.open("wb") as file:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file)


def parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Read the rows of a Parquet file, a group at a time; a teacher's outputs are arrays that share their memory."""
    for batch in package("pyarrow.parquet").ParquetFile(file).iter_batches():
        names = [name for name in CACHED if name in batch.schema.names and batch.column(name).null_count == 0]
        cached = {name: _cells(batch.column(name)) for name in names}
        others = batch.select([name for name in batch.schema.names if name not in cached]).to_pylist()
        for index in range(batch.num_rows):
            row = others[index] if others else {}
            yield {**row, **{name: cells[index] for name, cells in cached.items()}}


def _plain(value: Any) -> Any:
    """Return a value as Python's own: tensors and arrays as lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _nested(cells: Sequence[Array], arrow: Any) -> Any:
    """Return arrays as one Arrow array of lists, of lists of lists, ..."""
    offsets = arrow.array(np.cumsum([0, *map(len, cells)]), arrow.int32())
    if cells[0].ndim == 1:
        return arrow.ListArray.from_arrays(offsets, arrow.array(np.concatenate(cells)))
    return arrow.ListArray.from_arrays(offsets, _nested([part for cell in cells for part in cell], arrow))


def _cells(column: Any) -> list[Any]:
    """Return a column of lists as arrays; numbers as they are."""
    if not hasattr(column, "flatten") or not hasattr(column, "offsets"):
        return list(column.to_pylist())
    offsets, values = column.offsets.to_numpy(), column.values
    if not hasattr(values, "offsets"):
        flat = values.to_numpy(zero_copy_only=False)
        return [flat[begin:end] for begin, end in pairwise(offsets)]
    inner = values.offsets.to_numpy()
    widths = np.unique(np.diff(inner))
    if len(widths) == 1 and not hasattr(values.values, "offsets"):
        flat = values.values.to_numpy(zero_copy_only=False)[inner[0] : inner[-1]].reshape(-1, widths[0])
        return [flat[begin:end] for begin, end in pairwise(offsets)]
    parts = _cells(values)
    return [_stacked(parts[begin:end]) for begin, end in pairwise(offsets)]


def _stacked(parts: Sequence[Array]) -> Any:
    return np.stack(parts) if len({part.shape for part in parts}) == 1 else list(parts)


def _text(cell: Array) -> str:
    """Write an array as JSON, with as few digits as its precision has."""
    if cell.ndim > 1:
        return f"[{', '.join(map(_text, cell))}]"
    digits = _DIGITS[cell.dtype.itemsize]
    return f"[{', '.join(f'{value:.{digits}g}' for value in cell.astype(np.float64).tolist())}]"
