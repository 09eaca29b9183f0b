"""Checks that rows fit a model, before anything is computed with them.

An id outside the vocabulary is an index error deep inside an embedding on the CPU, and on a GPU an
assertion that takes the process with it. Each message names the row, what is in it and what is possible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import nn

from cofiprune.data.rows import Array, Row
from cofiprune.data.tasks import IGNORED, Task, classes_of, outputs_of
from cofiprune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Column:
    """All values of a column, one row after another."""

    name: str
    values: Array
    """[elements]"""
    shapes: NDArray[np.int64]
    """[rows, dimensions of a cell]"""
    sizes: NDArray[np.int64]
    """[rows], elements of each cell"""

    @classmethod
    def of(cls, name: str, rows: Sequence[Row]) -> Column:
        """Join the cells of a column, which must all have one number of dimensions.

        :raises DataError: naming the first row that has another number of dimensions than the first.
        """
        cells = [row[name] for row in rows]
        dims = cells[0].ndim
        for index, cell in enumerate(cells):
            if cell.ndim != dims:
                raise DataError(f"row {index}: {name!r} has {cell.ndim} dimensions and {dims} in row 0")
        shapes = np.array([cell.shape for cell in cells], np.int64).reshape(len(cells), dims)
        return cls(name, np.concatenate([cell.reshape(-1) for cell in cells]), shapes, shapes.prod(axis=1))

    def first(self, wrong: NDArray[np.bool_]) -> tuple[int, float] | None:
        """Return row and value of the first element that is wrong."""
        if not wrong.any():
            return None
        position = int(wrong.argmax())
        return int(np.searchsorted(self.sizes.cumsum(), position, side="right")), self.values[position].item()


Columns = Mapping[str, Column]


def check(rows: Sequence[Row], model: PreTrainedModel, task: Task) -> None:
    """Make sure that rows are within the range of a model.

    :raises DataError: naming the first row at fault.
    """
    columns = {name: Column.of(name, rows) for name in rows[0]}
    for column in columns.values():
        _check_finite(column)
    if "input_ids" in columns:
        check_tokens(columns["input_ids"], model)
        _check_alignment(columns, model)
    if "pixel_values" in columns:
        _check_images(columns["pixel_values"])
    if task == "question-answering":
        _check_spans(columns)
    else:
        _check_labels(columns, model, task)


def check_tokens(ids: Column, model: PreTrainedModel) -> None:
    """Make sure that token ids are in the vocabulary and rows not longer than the position embeddings.

    :raises DataError: naming the first row at fault.
    """
    if np.issubdtype(ids.values.dtype, np.floating):
        raise DataError(f"row 0: 'input_ids' holds {ids.values[0]}; token ids are whole numbers")
    size = vocabulary_size(model)
    found = ids.first((ids.values < 0) | (ids.values >= size))
    if found is not None:
        raise DataError(
            f"row {found[0]}: token id {found[1]} is outside the model's vocabulary of {size} (ids 0 to {size - 1}); "
            "tokenise with the tokenizer of this model, or call model.resize_token_embeddings for added tokens"
        )
    if not ids.shapes.shape[1]:
        raise DataError("row 0: 'input_ids' is a single number; it takes a list of token ids")
    lengths = ids.shapes[:, -1]
    if not lengths.all():
        raise DataError(f"row {int(np.argmin(lengths))} has no tokens; leave such rows out")
    limit = longest_sequence(model)
    if limit is not None and lengths.max() > limit:
        row = int(np.argmax(lengths > limit))
        raise DataError(
            f"row {row} has {lengths[row]} tokens; {type(model).__name__} reads at most {limit} "
            f"(config.max_position_embeddings is {getattr(model.config, 'max_position_embeddings', limit)}); "
            f"tokenise with truncation=True, max_length={limit}"
        )


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of token ids that a model knows.

    :raises DataError: when neither its input embeddings nor its configuration say so.
    """
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # a model of one's own may keep its table where transformers does not look
        table = None
    if isinstance(table, nn.Embedding):
        return table.num_embeddings
    size = getattr(model.config, "vocab_size", None)
    if size is None:
        raise DataError(
            f"{type(model).__name__} does not say how many token ids it knows: give its configuration a vocab_size, or "
            "the model a get_input_embeddings that returns its table"
        )
    return int(size)


def longest_sequence(model: PreTrainedModel) -> int | None:
    """Number of tokens that a model's position embeddings reach; None for a model without such a table.

    Models in RoBERTa's line begin to count positions after the padding id.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            begin = 0 if module.padding_idx is None else module.padding_idx + 1
            stated = getattr(model.config, "max_position_embeddings", module.num_embeddings)
            return int(min(module.num_embeddings - begin, stated))
    return None


def _check_finite(column: Column) -> None:
    if np.issubdtype(column.values.dtype, np.floating):
        found = column.first(~np.isfinite(column.values))
        if found is not None:
            raise DataError(f"row {found[0]}: {column.name!r} holds {found[1]}, which is not a finite number")


def _check_alignment(columns: Columns, model: PreTrainedModel) -> None:
    ids = columns["input_ids"]
    for name in ("attention_mask", "token_type_ids"):
        if name in columns and columns[name].shapes.shape == ids.shapes.shape:
            _same_length(columns[name], ids, "values")
    types = columns.get("token_type_ids")
    size = getattr(model.config, "type_vocab_size", 0) or 0
    has_table = any(name.endswith("token_type_embeddings") for name, _ in model.named_modules())
    if types is not None and size > 0 and has_table:
        found = types.first((types.values < 0) | (types.values >= size))
        if found is not None:
            raise DataError(
                f"row {found[0]}: token type {found[1]} is outside the {size} that {type(model).__name__} has; "
                "drop the column 'token_type_ids'"
            )


def _same_length(column: Column, ids: Column, noun: str) -> None:
    if column.shapes.shape != ids.shapes.shape:
        raise DataError(
            f"row 0: {column.name!r} has shape {tuple(column.shapes[0].tolist())}; it takes one of the {noun} per token"
        )
    wrong = (column.shapes != ids.shapes).any(axis=1)
    if wrong.any():
        row = int(wrong.argmax())
        found, tokens = column.shapes[row, -1], ids.shapes[row, -1]
        raise DataError(f"row {row}: {column.name!r} has {found} {noun} for {tokens} tokens")


def _check_images(images: Column) -> None:
    wrong = (images.shapes != images.shapes[0]).any(axis=1)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"row {row}: 'pixel_values' has shape {tuple(images.shapes[row].tolist())} and "
            f"{tuple(images.shapes[0].tolist())} in row 0; bring images to one size, or pass a data_collator"
        )


def _check_labels(columns: Columns, model: PreTrainedModel, task: Task) -> None:
    labels, ids = columns.get("labels"), columns.get("input_ids")
    if task == "multiple-choice" and ids is not None and ids.shapes.shape[1] != 2:
        dims = ids.shapes.shape[1]
        raise DataError(f"row 0: 'input_ids' has {dims} dimensions; {type(model).__name__} takes [choices, tokens]")
    if labels is None:
        return
    if task in ("token-classification", "masked-lm"):
        if ids is not None:
            _same_length(labels, ids, "labels")
    elif task in ("regression", "multi-label"):
        _check_count(labels, outputs_of(model))
    elif task in ("classification", "multiple-choice"):
        _check_count(labels, 1)
    if task in ("classification", "token-classification"):
        _check_classes(labels, model, classes_of(model), "classes")
    elif task == "masked-lm":
        _check_classes(labels, model, vocabulary_size(model), "token ids")
    elif task == "multiple-choice" and ids is not None:
        _check_classes(labels, model, int(ids.shapes[:, 0].min()), "choices")
    elif task == "multi-label":
        found = labels.first((labels.values < 0) | (labels.values > 1))
        if found is not None:
            raise DataError(f"row {found[0]}: label {found[1]:g} must lie in [0, 1]: each class is there or not")


def _check_count(labels: Column, size: int) -> None:
    wrong = labels.sizes != size
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(f"row {row} has {labels.sizes[row]} labels; this model takes {size} per row")


def _check_classes(labels: Column, model: PreTrainedModel, classes: int, noun: str) -> None:
    name, values = type(model).__name__, labels.values
    found = labels.first(values != np.round(values))  # files often hold classes as 0.0 and 1.0
    if found is not None:
        raise DataError(
            f"row {found[0]}: label {found[1]:g} is not a class of this {name} with {model.config.num_labels} labels; "
            "load the model with num_labels=1 to predict a number"
        )
    found = labels.first(((values < 0) & (values != IGNORED)) | (values >= classes))
    if found is not None:
        hint = (
            " (test splits of public benchmarks hide their labels behind -1)"
            if found[1] == -1
            else "; load the model with the num_labels of the data, or map the labels"
        )
        raise DataError(
            f"row {found[0]}: label {found[1]:g} is not among the {classes} {noun} of {name} "
            f"(0 to {classes - 1}, or {IGNORED} to leave it out){hint}"
        )


def _check_spans(columns: Columns) -> None:
    for name in ("start_positions", "end_positions"):
        found = columns[name].first(columns[name].values < 0) if name in columns else None
        if found is not None:
            raise DataError(
                f"row {found[0]}: {name!r} is {found[1]}; a position counts from 0 over the tokens, "
                "and one past the last leaves the row out of the loss"
            )
