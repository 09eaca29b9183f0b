"""Rows of the data sets that users have, under the names that a model takes, as arrays.

Rows of tokens are held as one int32 array per cell and padded when a batch is made: 76 MB for the 67,349 rows of SST-2.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cofiprune.data.cached import CACHED
from cofiprune.data.tasks import IGNORED, LABEL_COLUMNS, forward_names, main_input
from cofiprune.errors import DataError, located
from cofiprune.parts import encoder_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Array = NDArray[Any]
Row = dict[str, Array]
Batch = dict[str, Tensor]
_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_TOKENISE = (
    "Pass tokenizer=..., or tokenise the text first: dataset.map(lambda row: tokenizer(row['text'], truncation=True))"
)


class Source:
    """A data set with a length and an index: a list, a torch data set or a `datasets` Dataset."""

    def __init__(self, dataset: Any) -> None:
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
                f"a {kind} has no length and index; pass a torch or `datasets` Dataset, a list of dicts, or a "
                "DataLoader (a stream can be collected with list(...))"
            )
        if not len(dataset):
            raise DataError("there are no rows in it")
        self._rows = dataset
        self.in_memory = isinstance(dataset, list | tuple)
        """True where reading every row costs next to nothing."""
        # A transform that runs when a row is read may need columns that it does not return.
        stock = (getattr(dataset, "format", None) or {}).get("type") != "custom"
        self.columnar = hasattr(dataset, "select_columns") and stock
        """True where a column can be read without the others."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        with located(f"row {index}: "):
            row = self._rows[index]
        if not isinstance(row, Mapping):
            raise DataError(
                f"row {index} is a {type(row).__name__}; rows are dicts such as "
                "{'input_ids': [...], 'attention_mask': [...], 'labels': 1}"
            )
        return row

    def rows(self, names: Iterable[str]) -> Iterator[Mapping[str, Any]]:
        """Give the named columns of all rows, in order; other columns may be among them."""
        if self.columnar:
            yield from self._rows.select_columns(list(dict.fromkeys(names)))
        else:
            yield from (self[index] for index in range(len(self)))


def as_rows(dataset: Any) -> Any:
    """Return a list of texts as rows of one column, `text`; anything else as it is."""
    texts = isinstance(dataset, list | tuple) and bool(dataset) and all(isinstance(row, str) for row in dataset)
    return [{"text": row} for row in dataset] if texts else dataset


@dataclass(frozen=True)
class Padding:
    """Makes a batch of rows of arrays, each column padded at its end."""

    fills: Mapping[str, int]
    """Value that pads a column; 0 for those not named."""
    multiple: int = 1
    """The length of a batch of tokens is a multiple of it."""
    longest: int | None = None
    """Number of tokens that the model reads at most; None for no limit."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Padding:
        """Return the padding of a model: its padding id, and labels that no loss counts."""
        padding = getattr(encoder_config(model), "pad_token_id", None)
        return cls({"input_ids": 0 if padding is None else int(padding), "labels": IGNORED})

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Return the rows as tensors [rows, ...]: whole numbers and truth values as int64, others as float32."""
        rows, batch = self._lengthened(rows), {}
        for name in rows[0]:
            cells = pad([row[name] for row in rows], self.fills.get(name, 0))
            dtype = np.float32 if cells.dtype.kind == "f" else np.int64
            batch[name] = torch.from_numpy(cells.astype(dtype, copy=False))
        return batch

    def _lengthened(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Pad the first row of tokens, to which the others are padded, to the multiple."""
        axes = _token_axes(rows) if self.multiple > 1 else {}
        if not axes:
            return rows
        longest = max(row["input_ids"].shape[-1] for row in rows)
        length = longest + -longest % self.multiple
        if self.longest is not None and length > self.longest:
            return rows
        first = dict(rows[0])
        for name, axis in axes.items():
            cell = first[name]
            widths = [(0, 0)] * cell.ndim
            widths[axis] = (0, length - cell.shape[axis])
            first[name] = np.pad(cell, widths, constant_values=self.fills.get(name, 0))
        return [first, *rows[1:]]


def pad(cells: Sequence[Array], fill: int = 0) -> Array:
    """Stack arrays of different shapes, filled at the end of each dimension: [cells, ...]."""
    shape = tuple(max(sizes) for sizes in zip(*(cell.shape for cell in cells), strict=True))
    out = np.full((len(cells), *shape), fill, np.result_type(*{cell.dtype for cell in cells}))
    for index, cell in enumerate(cells):
        place: tuple[int | slice, ...] = (index, *map(slice, cell.shape))
        out[place] = cell
    return out


def find_columns(row: Mapping[str, Any], model: PreTrainedModel) -> dict[str, str]:
    """Return the columns of a row that a model's forward takes: its name for each, and the row's own name.

    Those with a teacher's outputs are among them.
    """
    forward = (*forward_names(model), *CACHED)
    columns = {name: name for name, value in row.items() if name in forward and value is not None}
    if "labels" in forward and "labels" not in columns:
        alias = next((name for name in LABEL_COLUMNS if row.get(name) is not None), None)
        columns.update({} if alias is None else {"labels": alias})
    return columns


def check_columns(columns: Mapping[str, str], row: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Make sure that what a model reads is among the columns found in a row.

    :raises DataError: when it is not.
    """
    wanted = main_input(model)
    if wanted not in columns and "inputs_embeds" not in columns:
        held = ", ".join(f"{name!r} ({type(value).__name__})" for name, value in row.items())
        raise DataError(
            f"{type(model).__name__} reads {wanted!r}, which the rows do not have; they have {held}. "
            + (_TOKENISE if wanted == "input_ids" else "Run the model's processor over the rows first")
        )


def read(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str], fills: Mapping[str, int]) -> list[Row]:
    """Read rows into memory, their columns under new names; padding at the end of a row is cut off.

    :param columns: the new name of each column that is read, and the one that it has.
    :raises DataError: when rows differ in their columns, or a value is not made of numbers.
    """
    found: list[Row] = []
    for index, raw in enumerate(rows):
        row = {new: raw[old] for new, old in columns.items() if raw.get(old) is not None}
        if found and row.keys() != found[0].keys():
            name = min(row.keys() ^ found[0].keys())
            differs = f"lacks {name!r}, which row 0 has" if name in found[0] else f"has {name!r}, which row 0 lacks"
            raise DataError(f"row {index} {differs}; every row needs the same columns")
        arrays: Row = {}
        for name, value in row.items():
            try:
                arrays[name] = as_array(value, fills.get(name, 0))
            except (TypeError, ValueError) as error:
                shown = f"{type(value).__name__} {reprlib.repr(value)}"
                raise DataError(f"row {index}: {name!r} must hold numbers; found {shown}") from error
        found.append(_trimmed(arrays))
    return found


def add_mask(rows: list[Row], model: PreTrainedModel) -> None:
    """Add an attention mask of ones where there is none: padding must not be read."""
    name = next((name for name in ("input_ids", "input_values") if name in rows[0]), None)
    if name is None or "attention_mask" in rows[0] or "attention_mask" not in forward_names(model):
        return
    if getattr(encoder_config(model), "feat_extract_norm", None) == "group":
        return  # such audio models were trained with zeros for padding and no mask
    for row in rows:
        row["attention_mask"] = np.ones(row[name].shape, np.bool_)


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
            array = np.asarray(value)
        except ValueError:
            array = pad([as_array(part, fill) for part in value], fill)
    if not array.size:
        return np.zeros(array.shape, np.int64)  # [] is not a float
    if array.dtype.kind not in "biuf":
        raise TypeError(f"not numbers: {type(value).__name__}")
    if array.dtype.itemsize <= 4:
        return array
    narrow = array.astype(np.float32 if array.dtype.kind == "f" else np.int32)
    return narrow if array.dtype.kind == "f" or np.array_equal(narrow, array) else array


def _trimmed(row: Row) -> Row:
    """Cut the padding off the end of a row of tokens, where nothing but padding is lost.

    Rows are often padded to a fixed length when they are tokenised; a batch needs no more than its longest row.
    """
    mask = row.get("attention_mask")
    if mask is None or not mask.size or not mask.ndim or mask[..., -1].any():
        return row
    axes, used = _token_axes([row]), mask != 0
    if "labels" in axes:
        used |= row["labels"] != IGNORED
    places = np.flatnonzero(used.reshape(-1, used.shape[-1]).any(axis=0))
    if not axes or not places.size:
        return row
    kept = slice(places[-1] + 1)
    cut = {-1: (..., kept), -2: (..., kept, slice(None))}
    return {name: cell[cut[axes[name]]] if name in axes else cell for name, cell in row.items()}


def _token_axes(rows: Sequence[Row]) -> dict[str, int]:
    """Return the axis of tokens, from the end, of columns with one; none where padding is not masked, or pads another
    column's axis."""
    first = rows[0]
    ids, mask = first.get("input_ids"), first.get("attention_mask")
    if ids is None or mask is None or not ids.ndim or mask.shape != ids.shape:
        return {}
    columns = (name for name in (*_PER_TOKEN, "labels") if name in first)
    axes = {name: -1 for name in columns if all(row[name].shape == row["input_ids"].shape for row in rows)}
    for name in set(CACHED).intersection(first):
        if all(row[name].shape[-2:-1] == row["input_ids"].shape[-1:] for row in rows):
            axes[name] = -2
    others = (cell.shape for name, cell in first.items() if name not in (*axes, *CACHED))
    return {} if any(ids.shape[-1] in shape for shape in others) else axes
