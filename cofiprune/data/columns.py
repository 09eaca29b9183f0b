"""Which columns of a row a model takes, under which name, and what they are made into for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cofiprune.data.table import Column, Table
from cofiprune.data.tasks import IGNORED, Task, forward_names, label_names
from cofiprune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LABEL_ALIASES = ("label", "label_ids")
"""Other names under which data sets hold what the models call `labels`."""
_TOKENISE = "Tokenise the text first: dataset.map(lambda row: tokenizer(row['text'], truncation=True))"
_OUT_OF_REACH = np.iinfo(np.int32).max
"""A span position past every row, which transformers leaves out of the loss."""


def usable(row: Mapping[str, Any], model: PreTrainedModel) -> dict[str, str]:
    """Return the columns that a model's forward takes: its name for each, and the row's own name.

    :raises DataError: when what the model reads is not among them.
    """
    forward = forward_names(model)
    present = {name for name, value in row.items() if value is not None}
    columns = {name: name for name in row if name in forward and name in present}
    if "labels" in forward and "labels" not in columns:
        alias = next((alias for alias in LABEL_ALIASES if alias in present), None)
        columns.update({} if alias is None else {"labels": alias})
    inputs = (model.main_input_name, "inputs_embeds")
    if not any(name in columns for name in inputs):
        held = ", ".join(f"{name!r} ({type(value).__name__})" for name, value in row.items())
        raise DataError(
            f"{type(model).__name__} reads {model.main_input_name!r}, which the rows do not have; they have {held}. "
            + (_TOKENISE if model.main_input_name == "input_ids" else "Run the model's processor over the rows first")
        )
    return columns


def is_labelled(columns: Mapping[str, Any], model: PreTrainedModel) -> bool:
    """Whether columns hold every label from which a model computes its loss."""
    names = label_names(model)
    return bool(names) and all(name in columns for name in names)


def fills_of(model: PreTrainedModel) -> dict[str, int]:
    """What each column is padded with."""
    padding = getattr(model.config, "pad_token_id", None)
    return {"input_ids": 0 if padding is None else int(padding), "labels": IGNORED}


def unlabelled(model: PreTrainedModel, row: Mapping[str, Any]) -> str:
    names = label_names(model)
    if not names:
        return (
            f"{type(model).__name__} has no head and computes no loss; pass a teacher whose outputs it is to match, "
            "or a model with a head"
        )
    return (
        f"the rows have no {' and '.join(map(repr, names))}; they have {', '.join(map(repr, row))}. "
        "Add labels, or pass a teacher whose answers take their place"
    )


def renamed(rows: Iterator[Mapping[str, Any]], columns: Mapping[str, str]) -> Iterator[Mapping[str, Any]]:
    """Give rows the names that the model's forward takes; what a row lacks is left out."""
    return ({new: row[old] for new, old in columns.items() if row.get(old) is not None} for row in rows)


def with_mask(rows: Table, model: PreTrainedModel) -> Table:
    """Add an attention mask of ones where there is none: padding must not be read."""
    name = next((name for name in ("input_ids", "input_values") if name in rows.columns), None)
    if name is None or "attention_mask" in rows.columns or "attention_mask" not in forward_names(model):
        return rows
    if getattr(model.config, "feat_extract_norm", None) == "group":
        return rows  # such audio models were trained with zeros for padding and no mask
    like = rows.columns[name]
    ones = Column("attention_mask", np.ones(len(like.values), np.bool_), like.starts, like.shapes)
    return Table({**rows.columns, "attention_mask": ones}, rows.fills)


def typed(rows: Table, task: Task) -> Table:
    """Give labels the type that the loss takes; a span past the end of its row is put out of every reach."""
    columns = dict(rows.columns)
    for name in ("labels", "start_positions", "end_positions"):
        column = columns.get(name)
        if column is None or task == "other":
            continue
        numbers = name == "labels" and task in ("regression", "multi-label")
        values = column.values.astype(np.float32 if numbers else np.int64)
        if name != "labels" and "input_ids" in columns:
            lengths = columns["input_ids"].shapes[:, -1]
            values = np.where(np.less(values, lengths), values, _OUT_OF_REACH)
        columns[name] = Column(name, values, column.starts, column.shapes)
    return Table(columns, rows.fills)
