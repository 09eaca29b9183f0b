"""Reading rows from the data sets that users have: lists, torch data sets, `datasets` data sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cofiprune.errors import DataError

_CHUNK = 1000
"""Rows of a columnar data set that are read at a time."""


class Source:
    """Rows by index, from anything with a length and an index."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    @property
    def in_memory(self) -> bool:
        """Whether reading every row costs next to nothing."""
        return isinstance(self._rows, list | tuple)

    @property
    def has_columns(self) -> bool:
        """Whether a column can be read without the others."""
        return self.in_memory

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row = self._rows[index]
        if not isinstance(row, Mapping):
            raise DataError(
                f"row {index} is a {type(row).__name__}; rows are dicts such as "
                "{'input_ids': [...], 'attention_mask': [...], 'labels': 1}"
            )
        return row

    def rows(self, names: Iterable[str]) -> Iterator[Mapping[str, Any]]:
        """Give the named columns of all rows, in order; other columns may be among them."""
        return (self[index] for index in range(len(self)))


class ColumnarSource(Source):
    """A `datasets` Dataset, which is read a thousand rows at a time and only the columns asked for."""

    has_columns = True

    def rows(self, names: Iterable[str]) -> Iterator[Mapping[str, Any]]:
        chosen = list(dict.fromkeys(names))
        part = self._rows.select_columns(chosen)
        for start in range(0, len(part), _CHUNK):
            columns = part[start : start + _CHUNK]
            yield from (dict(zip(chosen, row, strict=True)) for row in zip(*(columns[c] for c in chosen), strict=True))


def open_source(dataset: Any) -> Source:
    """Make rows of a data set readable.

    :raises DataError: when it is none, or empty.
    """
    kind = type(dataset).__name__
    if isinstance(dataset, Mapping):
        parts = ", ".join(map(repr, list(dataset)[:6]))
        raise DataError(f"a {kind} is not a data set but several, or one by columns ({parts}); pass one, as rows")
    if hasattr(dataset, "iterrows"):
        raise DataError(f"a {kind} is not a data set of rows; pass frame.to_dict('records')")
    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not sized or isinstance(dataset, str | bytes):
        raise DataError(
            f"a {kind} has no length and index; pass a torch or `datasets` Dataset, a list of dicts, or a DataLoader "
            "(a stream can be collected with list(...))"
        )
    if not len(dataset):
        raise DataError("there are no rows in it")
    # A transform that runs when a row is read may need columns that it does not return.
    stock = (getattr(dataset, "format", None) or {}).get("type") != "custom"
    return ColumnarSource(dataset) if hasattr(dataset, "select_columns") and stock else Source(dataset)
