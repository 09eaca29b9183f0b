"""Rows of different lengths in memory: each column one flat array, padded when a batch is made.

A tensor per cell would cost ten times the memory of short token sequences and be slower to batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cofiprune.data.tasks import IGNORED
from cofiprune.errors import DataError

Array = NDArray[Any]
_TRIMMED = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


@dataclass(frozen=True)
class Column:
    """One column: the values of all rows one after another, and where each row begins."""

    name: str
    values: Array
    """[elements]"""
    starts: NDArray[np.int64]
    """[rows + 1]"""
    shapes: NDArray[np.int64]
    """[rows, dimensions of a row]"""

    @classmethod
    def of(cls, name: str, cells: Sequence[Array]) -> Column:
        """Join cells, one per row, of one number of dimensions.

        :raises DataError: naming the first row that has another number of dimensions than the first.
        """
        dims = cells[0].ndim
        for row, cell in enumerate(cells):
            if cell.ndim != dims:
                raise DataError(f"row {row}: {name!r} has {cell.ndim} dimensions and {dims} in row 0")
        sizes = np.fromiter((cell.size for cell in cells), np.int64, len(cells))
        values = np.concatenate([cell.reshape(-1) for cell in cells]) if sizes.any() else np.zeros(0, np.int64)
        shapes = np.array([cell.shape for cell in cells], np.int64).reshape(len(cells), dims)
        return cls(name, _narrow(values), np.concatenate([[0], sizes.cumsum()]), shapes)

    def cell(self, row: int) -> Array:
        """The value of one row, in its shape."""
        return self.values[self.starts[row] : self.starts[row + 1]].reshape(self.shapes[row])

    def row_of(self, position: int) -> int:
        """The row that a position in `values` belongs to."""
        return int(np.searchsorted(self.starts, position, side="right")) - 1


@dataclass(frozen=True)
class Table:
    """Rows in memory, by column."""

    columns: Mapping[str, Column]
    fills: Mapping[str, int]
    """What a column is padded with; 0 for those not named."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())).shapes)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the rows, padded to the longest among them: tensors [rows, ...]."""
        return {
            name: pad([column.cell(index) for index in indices], self.fills.get(name, 0))
            for name, column in self.columns.items()
        }


def widened(
    batch: dict[str, Tensor], multiple: int, fills: Mapping[str, int], longest: int | None
) -> dict[str, Tensor]:
    """Pad a batch of token rows further, to a multiple of a length; one of anything else stays as it is.

    :param longest: what the model reads at most; None for no limit.
    """
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if multiple == 1 or ids is None or mask is None or mask.shape != ids.shape:
        return batch
    length = ids.shape[-1]
    more = -length % multiple
    names = [name for name in (*_TRIMMED, "labels") if name in batch and batch[name].shape == ids.shape]
    others = (value for name, value in batch.items() if name not in names)
    if (
        not more
        or (longest is not None and length + more > longest)
        or any(length in each.shape[1:] for each in others)
    ):
        return batch
    return {
        name: torch.nn.functional.pad(value, (0, more), value=fills.get(name, 0)) if name in names else value
        for name, value in batch.items()
    }


def pad(cells: Sequence[Array], fill: int = 0) -> Tensor:
    """Stack arrays of different shapes, filled at the end of each dimension: [cells, ...].

    Whole numbers and truth values become int64, other numbers float32.
    """
    shape = tuple(max(sizes) for sizes in zip(*(cell.shape for cell in cells), strict=True))
    dtype = np.float32 if np.issubdtype(cells[0].dtype, np.floating) else np.int64
    if all(cell.shape == shape for cell in cells):
        return torch.from_numpy(np.stack(cells).astype(dtype, copy=False))
    out = np.full((len(cells), *shape), fill, dtype)
    for index, cell in enumerate(cells):
        place: tuple[int | slice, ...] = (index, *map(slice, cell.shape))
        out[place] = cell
    return torch.from_numpy(out)


def as_array(value: Any, fill: int = 0) -> Array:
    """Turn what a row holds into an array of numbers; lists of lists may differ in length.

    :raises TypeError: when there are no numbers in it.
    """
    array: Array
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        array = value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    else:
        try:
            array = np.asarray(value) if np.size(value) else np.zeros(np.shape(value), np.int64)  # [] is not a float
        except ValueError:
            array = pad([as_array(part, fill) for part in value], fill).numpy()
    if array.dtype.kind not in "biuf":
        raise TypeError(f"not numbers: {type(value).__name__}")
    return array


def trimmed(cells: dict[str, Array]) -> dict[str, Array]:
    """Cut the padding off the end of a row of tokens, where nothing but padding is lost.

    Rows are often padded to a fixed length when they are tokenised; a batch needs no more than its longest row.
    """
    ids, mask = cells.get("input_ids"), cells.get("attention_mask")
    if ids is None or mask is None or mask.shape != ids.shape or not mask.size:
        return cells
    length = ids.shape[-1]
    used: Array = np.any(mask.reshape(-1, length), axis=0)
    names = list(_TRIMMED)
    labels = cells.get("labels")
    if labels is not None and labels.shape == ids.shape:
        names.append("labels")
        used |= np.any((labels != IGNORED).reshape(-1, length), axis=0)
    keep = length - int(used[::-1].argmax()) if used.any() else length
    others = (cell for name, cell in cells.items() if name not in names)
    if keep == length or any(length in cell.shape for cell in others):
        return cells
    return {name: cell[..., :keep] if name in names else cell for name, cell in cells.items()}


def table(rows: Iterable[Mapping[str, Any]], fills: Mapping[str, int]) -> Table:
    """Read rows into memory.

    :raises DataError: when rows differ in their columns, or a value is not made of numbers.
    """
    cells: dict[str, list[Array]] = {}
    for index, row in enumerate(rows):
        cells = cells or {name: [] for name in row}
        same_columns(row, cells, index)
        for name, array in trimmed(arrays(row, fills, index)).items():
            cells[name].append(array)
    return Table({name: Column.of(name, column) for name, column in cells.items()}, fills)


def arrays(row: Mapping[str, Any], fills: Mapping[str, int], index: int) -> dict[str, Array]:
    """Turn one row into arrays.

    :raises DataError: when a value is not made of numbers.
    """
    found = {}
    for name, value in row.items():
        try:
            found[name] = as_array(value, fills.get(name, 0))
        except (TypeError, ValueError) as error:
            raise DataError(f"row {index}: {name!r} must hold numbers; found {_shown(value)}") from error
    return found


def same_columns(row: Mapping[str, Any], first: Iterable[str], index: int) -> None:
    """Make sure that a row has the columns of the first one.

    :raises DataError: naming the first difference.
    """
    expected = list(first)
    for name in expected:
        if name not in row:
            raise DataError(f"row {index} lacks {name!r}, which row 0 has; every row needs the same columns")
    for name in row:
        if name not in expected:
            raise DataError(f"row {index} has {name!r}, which row 0 lacks; every row needs the same columns")


def _narrow(values: Array) -> Array:
    if np.issubdtype(values.dtype, np.floating):
        return values.astype(np.float32, copy=False)
    if values.dtype == np.bool_:
        return values
    small = values.size == 0 or (values.min() >= -(2**31) and values.max() < 2**31)
    return values.astype(np.int32 if small else np.int64, copy=False)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
