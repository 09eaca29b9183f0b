"""Whether rows fit a model, found out before anything is computed with them.

An id outside the vocabulary is an index error deep inside an embedding on the CPU, and on a GPU an
assertion that takes the process with it. Each message names the row, what is in it and what is possible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import nn

from cofiprune.data.table import Array, Column, Table
from cofiprune.data.tasks import IGNORED, Task, classes_of, outputs_of
from cofiprune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check(table: Table, model: PreTrainedModel, task: Task) -> None:
    """Make sure that rows are within the range of a model.

    :raises DataError: naming the first row at fault.
    """
    for column in table.columns.values():
        _check_finite(column)
    if "input_ids" in table.columns:
        check_tokens(table.columns["input_ids"], model)
        _check_alignment(table, model)
    if "pixel_values" in table.columns:
        _check_images(table.columns["pixel_values"])
    _LABEL_CHECKS.get(task, _check_nothing)(table, model)


def check_tokens(ids: Column, model: PreTrainedModel) -> None:
    """Make sure that token ids are in the vocabulary and rows not longer than the position embeddings.

    :raises DataError: naming the first row at fault.
    """
    if np.issubdtype(ids.values.dtype, np.floating):
        raise DataError(f"row 0: 'input_ids' holds {ids.values[0]}; token ids are whole numbers")
    size = vocabulary_size(model)
    found = _first(ids, (ids.values < 0) | (ids.values >= size))
    if found is not None:
        raise DataError(
            f"row {found[0]}: token id {found[1]} is outside the model's vocabulary of {size} (ids 0 to {size - 1}); "
            "tokenise with the tokenizer of this model, or call model.resize_token_embeddings for added tokens"
        )
    lengths = ids.shapes[:, -1] if ids.shapes.shape[1] else np.zeros(0, np.int64)
    if not lengths.size:
        raise DataError("row 0: 'input_ids' is a single number; it takes a list of token ids")
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


def _first(column: Column, wrong: NDArray[np.bool_]) -> tuple[int, float] | None:
    """Row and value of the first element that is wrong."""
    if not wrong.any():
        return None
    position = int(wrong.argmax())
    return column.row_of(position), column.values[position].item()


def _check_finite(column: Column) -> None:
    if not np.issubdtype(column.values.dtype, np.floating):
        return
    found = _first(column, ~np.isfinite(column.values))
    if found is not None:
        raise DataError(f"row {found[0]}: {column.name!r} holds {found[1]}, which is not a finite number")


def _check_alignment(table: Table, model: PreTrainedModel) -> None:
    ids = table.columns["input_ids"]
    for name in ("attention_mask", "token_type_ids"):
        other = table.columns.get(name)
        if other is not None and other.shapes.shape == ids.shapes.shape:
            _same_length(other, ids, "values")
    types = table.columns.get("token_type_ids")
    size = getattr(model.config, "type_vocab_size", 0) or 0
    has_table = any(name.endswith("token_type_embeddings") for name, _ in model.named_modules())
    if types is not None and size > 0 and has_table:
        found = _first(types, (types.values < 0) | (types.values >= size))
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


def _check_nothing(table: Table, model: PreTrainedModel) -> None:
    """The labels are the model's business."""


def _whole(labels: Column, model: PreTrainedModel) -> Array:
    """Class labels as whole numbers; files often hold them as 0.0 and 1.0."""
    if np.issubdtype(labels.values.dtype, np.floating):
        found = _first(labels, labels.values != np.round(labels.values))
        if found is not None:
            raise DataError(
                f"row {found[0]}: label {found[1]:g} is not a class of this {type(model).__name__} with "
                f"{model.config.num_labels} labels; load the model with num_labels=1 to predict a number"
            )
    return labels.values.astype(np.int64)


def _check_classes(labels: Column, model: PreTrainedModel, classes: int, noun: str = "classes") -> None:
    values = _whole(labels, model)
    found = _first(labels, ((values < 0) & (values != IGNORED)) | (values >= classes))
    if found is not None:
        hint = (
            " (test splits of public benchmarks hide their labels behind -1)"
            if found[1] == -1
            else "; load the model with the num_labels of the data, or map the labels"
        )
        raise DataError(
            f"row {found[0]}: label {found[1]:g} is not among the {classes} {noun} of {type(model).__name__} "
            f"(0 to {classes - 1}, or {IGNORED} to leave it out){hint}"
        )


def _check_classification(table: Table, model: PreTrainedModel) -> None:
    labels = table.columns.get("labels")
    if labels is not None:
        _one_per_row(labels, 1)
        _check_classes(labels, model, classes_of(model))


def _check_tokens_classified(table: Table, model: PreTrainedModel) -> None:
    labels = table.columns.get("labels")
    if labels is not None:
        if "input_ids" in table.columns:
            _same_length(labels, table.columns["input_ids"], "labels")
        _check_classes(labels, model, classes_of(model))


def _check_masked_lm(table: Table, model: PreTrainedModel) -> None:
    labels = table.columns.get("labels")
    if labels is not None:
        if "input_ids" in table.columns:
            _same_length(labels, table.columns["input_ids"], "labels")
        _check_classes(labels, model, vocabulary_size(model), "token ids")


def _check_numbers(table: Table, model: PreTrainedModel) -> None:
    if (labels := table.columns.get("labels")) is not None:
        _one_per_row(labels, outputs_of(model))


def _check_multi_label(table: Table, model: PreTrainedModel) -> None:
    labels = table.columns.get("labels")
    if labels is None:
        return
    _one_per_row(labels, outputs_of(model))
    found = _first(labels, (labels.values < 0) | (labels.values > 1))
    if found is not None:
        raise DataError(f"row {found[0]}: label {found[1]:g} must lie in [0, 1]: each class is there or not")


def _one_per_row(labels: Column, size: int) -> None:
    sizes = np.diff(labels.starts)
    wrong = sizes != size
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(f"row {row} has {sizes[row]} labels; this model takes {size} per row")


def _check_spans(table: Table, model: PreTrainedModel) -> None:
    for name in ("start_positions", "end_positions"):
        positions = table.columns.get(name)
        found = None if positions is None else _first(positions, positions.values < 0)
        if found is not None:
            raise DataError(
                f"row {found[0]}: {name!r} is {found[1]}; a position counts from 0 over the tokens, "
                "and one past the last leaves the row out of the loss"
            )


def _check_choices(table: Table, model: PreTrainedModel) -> None:
    labels, ids = table.columns.get("labels"), table.columns.get("input_ids")
    if ids is not None and ids.shapes.shape[1] != 2:
        found = ids.shapes.shape[1]
        raise DataError(f"row 0: 'input_ids' has {found} dimensions; {type(model).__name__} takes [choices, tokens]")
    if labels is not None and ids is not None:
        _one_per_row(labels, 1)
        _check_classes(labels, model, int(ids.shapes[:, 0].min()), "choices")


_LABEL_CHECKS: dict[Task, Callable[[Table, PreTrainedModel], None]] = {
    "classification": _check_classification,
    "regression": _check_numbers,
    "multi-label": _check_multi_label,
    "token-classification": _check_tokens_classified,
    "masked-lm": _check_masked_lm,
    "question-answering": _check_spans,
    "multiple-choice": _check_choices,
}
