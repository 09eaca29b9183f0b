"""Checks that rows fit a model, before anything is computed with them.

An id outside the vocabulary is an index error deep inside an embedding on the CPU, and on a GPU an
assertion that takes the process with it. Each message names the row, what is in it and what is possible.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from cofiprune.data.cached import cached_problems
from cofiprune.data.rows import Array, Row
from cofiprune.data.tasks import IGNORED, Task, classes_of, outputs_of
from cofiprune.errors import DataError
from cofiprune.parts import encoder_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check(rows: Sequence[Row], model: PreTrainedModel, task: Task) -> None:
    """Make sure that rows are within the range of a model.

    :raises DataError: naming the first row at fault.
    """
    limits = _Limits.of(model, task, tokens="input_ids" in rows[0])
    for index, row in enumerate(rows):
        for problem in _problems(row, rows[0], limits):
            raise DataError(f"row {index}: {problem}")


def any_label_counts(rows: Sequence[Row], task: Task) -> bool:
    """Return whether the loss counts any label of checked rows: none where all are -100, or past their row's end."""
    if task == "question-answering":
        ends = [row["input_ids"].shape[-1] if "input_ids" in row else np.inf for row in rows]
        return any((row["start_positions"] < end).any() for row, end in zip(rows, ends, strict=True))
    if task in ("classification", "multiple-choice", "token-classification", "masked-lm"):
        return any((row["labels"] != IGNORED).any() for row in rows)
    return True


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
    size = getattr(encoder_config(model), "vocab_size", None)
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
            stated = getattr(encoder_config(model), "max_position_embeddings", module.num_embeddings)
            return int(min(module.num_embeddings - begin, stated))
    return None


@dataclass(frozen=True)
class _Limits:
    """What a model reads, and the labels that its loss takes."""

    model: PreTrainedModel
    task: Task
    outputs: int
    classes: int
    """0 where labels are no classes, or the choices of their row."""
    vocabulary: int
    tokens: int | None
    token_types: int
    """0 where they do not matter."""

    @classmethod
    def of(cls, model: PreTrainedModel, task: Task, *, tokens: bool) -> _Limits:
        vocabulary = vocabulary_size(model) if tokens or task == "masked-lm" else 0
        classes = vocabulary if task == "masked-lm" else classes_of(model) if "classification" in task else 0
        has_types = any(name.endswith("token_type_embeddings") for name, _ in model.named_modules())
        types = getattr(encoder_config(model), "type_vocab_size", 0) or 0
        longest = longest_sequence(model)
        return cls(model, task, outputs_of(model), classes, vocabulary, longest, types if has_types else 0)

    @property
    def name(self) -> str:
        return type(self.model).__name__


def _problems(row: Row, first: Row, limits: _Limits) -> Iterator[str]:
    """Say what is wrong with a row."""
    for name, cell in row.items():
        if cell.ndim != first[name].ndim:
            yield f"{name!r} has {cell.ndim} dimensions and {first[name].ndim} in row 0"
        wrong = None if cell.dtype.kind != "f" else _first(cell, ~np.isfinite(cell))
        if wrong is not None:
            yield f"{name!r} holds {wrong}, which is not a finite number"
    if "input_ids" in row:
        yield from _token_problems(row, limits)
    images = row.get("pixel_values")
    if images is not None and images.shape != first["pixel_values"].shape:
        yield (
            f"'pixel_values' has shape {images.shape} and {first['pixel_values'].shape} in row 0; "
            "bring images to one size, or pass a data_collator"
        )
    if limits.task == "question-answering":
        for name in ("start_positions", "end_positions"):
            wrong = _first(row[name], row[name] < 0) if name in row else None
            if wrong is not None:
                yield (
                    f"{name!r} is {wrong}; a position counts from 0 over the tokens, "
                    "and one past the last leaves the row out of the loss"
                )
    elif "labels" in row:
        yield from _label_problems(row, limits)
    outputs = limits.classes if limits.task == "classification" else limits.outputs
    yield from cached_problems(row, first, limits.task, outputs, limits.name)


def _token_problems(row: Row, limits: _Limits) -> Iterator[str]:
    ids = row["input_ids"]
    if limits.task == "multiple-choice" and ids.ndim != 2:
        yield f"'input_ids' has {ids.ndim} dimensions; {limits.name} takes [choices, tokens]"
    if not ids.ndim:
        yield "'input_ids' is a single number; it takes a list of token ids"
    length, size = ids.shape[-1], limits.vocabulary
    if not length:
        yield "no tokens; leave such rows out"
    if ids.dtype.kind == "f":
        yield f"'input_ids' holds {ids.flat[0]}; token ids are whole numbers"
    wrong = _first(ids, (ids < 0) | (ids >= size))
    if wrong is not None:
        yield (
            f"token id {wrong} is outside the model's vocabulary of {size} (ids 0 to {size - 1}); "
            "tokenise with the tokenizer of this model, or call model.resize_token_embeddings for added tokens"
        )
    if limits.tokens is not None and length > limits.tokens:
        stated = getattr(encoder_config(limits.model), "max_position_embeddings", limits.tokens)
        yield (
            f"{length} tokens; {limits.name} reads at most {limits.tokens} (config.max_position_embeddings is "
            f"{stated}); tokenise with truncation=True, max_length={limits.tokens}"
        )
    for name in ("attention_mask", "token_type_ids"):
        if name in row and row[name].ndim == ids.ndim:
            yield from _misaligned(name, row)
    types = row.get("token_type_ids")
    if types is not None and limits.token_types:
        wrong = _first(types, (types < 0) | (types >= limits.token_types))
        if wrong is not None:
            yield (
                f"token type {wrong} is outside the {limits.token_types} that {limits.name} has; "
                "drop the column 'token_type_ids'"
            )


def _label_problems(row: Row, limits: _Limits) -> Iterator[str]:
    labels, task = row["labels"], limits.task
    if task in ("token-classification", "masked-lm"):
        yield from _misaligned("labels", row)
    per_row = {"regression": limits.outputs, "multi-label": limits.outputs, "classification": 1, "multiple-choice": 1}
    if labels.size != per_row.get(task, labels.size):
        yield f"{labels.size} labels; this model takes {per_row[task]} per row"
    wrong = _first(labels, (labels < 0) | (labels > 1))
    if task == "multi-label" and wrong is not None:
        yield f"label {wrong:g} must lie in [0, 1]: each class is there or not"
    classes, noun = limits.classes, "token ids" if task == "masked-lm" else "classes"
    if task == "multiple-choice" and "input_ids" in row:
        classes, noun = len(row["input_ids"]), "choices"
    if classes:
        yield from _class_problems(labels, classes, noun, limits)


def _class_problems(labels: Array, classes: int, noun: str, limits: _Limits) -> Iterator[str]:
    wrong = _first(labels, labels % 1 != 0)  # files often hold classes as 0.0 and 1.0
    if wrong is not None:
        yield (
            f"label {wrong:g} is not a class of this {limits.name} with {limits.outputs} labels; "
            "load the model with num_labels=1 to predict a number"
        )
    wrong = _first(labels, ((labels < 0) & (labels != IGNORED)) | (labels >= classes))
    if wrong is not None:
        hidden = " (test splits of public benchmarks hide their labels behind -1)"
        other = "; load the model with the num_labels of the data, or map the labels"
        yield (
            f"label {wrong:g} is not among the {classes} {noun} of {limits.name} "
            f"(0 to {classes - 1}, or {IGNORED} to leave it out){hidden if wrong == -1 else other}"
        )


def _misaligned(name: str, row: Row) -> Iterator[str]:
    found, ids = row[name].shape, row["input_ids"].shape if "input_ids" in row else row[name].shape
    if found != ids:
        yield f"{name!r} has shape {found} and 'input_ids' {ids}; it takes one value per token"


def _first(values: Array, wrong: Any) -> float | None:
    """Return the first value that is wrong."""
    return values[wrong][0].item() if wrong.any() else None
