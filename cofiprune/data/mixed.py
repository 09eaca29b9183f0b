"""Rows with labels and rows without, in one data set.

A row without a label carries one that no loss counts: a class of -100, a span past every row, or, where labels are
numbers, the least number there is. So a batch holds rows of both kinds, and labels count for the one kind alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cofiprune.data.batches import Batches, RowBatches
from cofiprune.data.rows import Batch, Padding, Row, Source, pad
from cofiprune.data.tasks import IGNORED, LABEL_COLUMNS, LABELS, Task, label_names
from cofiprune.errors import DataError, SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OUT_OF_REACH = np.iinfo(np.int32).max
"""A span position past every row, which transformers leaves out of the loss."""
UNLABELLED = float(np.finfo(np.float32).min)
"""What stands for the label of a row that has none, where labels are numbers."""
_TYPES = "token_type_ids"
_PER_TOKEN: tuple[Task, ...] = ("token-classification", "masked-lm")
NUMBERS: tuple[Task, ...] = ("regression", "multi-label")
"""Tasks whose labels are numbers, whose losses in transformers count every row."""


@dataclass(frozen=True)
class Mixed:
    """Rows of a data set, and further ones whose labels, if they have any, are not looked at."""

    labelled: Any
    unlabelled: Any

    @classmethod
    def of(cls, labelled: Any, unlabelled: Any) -> Any:
        """Return the rows of both, or those of the first where there is no second.

        :raises SettingsError: for a second one alone.
        """
        if unlabelled is not None and labelled is None:
            raise SettingsError(
                "unlabelled_dataset adds to the rows of a train_dataset; rows without labels alone are a train_dataset"
            )
        return labelled if unlabelled is None else cls(labelled, unlabelled)

    def read(self, reading: Any, rows: Callable[[Any, Any, str], Any], name: str) -> Mixed:
        """Return both as rows of tokens.

        :param reading: how rows are read, a dataclass with a field `labelled`.
        :param rows: turns a data set of the name that messages give it into such rows.
        :param name: of the first one.
        """
        return Mixed(
            rows(reading, self.labelled, name),
            rows(replace(reading, labelled=False), self.unlabelled, "unlabelled_dataset"),
        )


class Bare(Sequence[Mapping[str, Any]]):
    """The rows of a data set without their labels, read when they are asked for."""

    def __init__(self, dataset: Any) -> None:
        self._rows = Source(dataset)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return {name: cell for name, cell in self._rows[index].items() if name not in (*LABELS, *LABEL_COLUMNS)}


class _Joined(Sequence[tuple[bool, Any]]):
    """The rows of two data sets, each with whether it is of the second."""

    def __init__(self, first: Sequence[Any], second: Sequence[Any]) -> None:
        self._parts = (first, second)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, index: Any) -> Any:
        beyond = index - len(self._parts[0])
        return (True, self._parts[1][beyond]) if beyond >= 0 else (False, self._parts[0][index])


def mix(labelled: Batches, unlabelled: Batches, model: PreTrainedModel) -> RowBatches:
    """Return batches of the rows of both, in one order.

    :param unlabelled: of the same form, without labels.
    :raises DataError: for batches that somebody else makes, rows of different columns, and heads whose labels cannot
        be left out of the loss.
    """
    if not (isinstance(labelled, RowBatches) and isinstance(unlabelled, RowBatches)):
        raise DataError("they are mixed into the rows of train_dataset: pass both as rows, not as a DataLoader")
    if labelled.labelled and labelled.task == "other":
        raise DataError(f"the loss of a {type(model).__name__} cannot leave the labels of some rows out")
    lengths = (
        None
        if labelled.lengths is None or unlabelled.lengths is None
        else np.concatenate([labelled.lengths, unlabelled.lengths])
    )
    merged = replace(labelled, lengths=lengths, partly=labelled.labelled)
    if labelled.in_memory and unlabelled.in_memory:
        own, bare = _typed(labelled.rows, unlabelled.rows[0]), _typed(unlabelled.rows, labelled.rows[0])
        labelled = replace(labelled, rows=own)
        return replace(merged, rows=[*own, *_filled(labelled, bare, model)])
    with torch.random.fork_rng(devices=[]):
        like = labelled.collate([labelled.rows[0]])
    rows = _Joined(labelled.rows, unlabelled.rows)
    return replace(merged, rows=rows, collate=_collator(labelled, unlabelled.collate, like, model))


def _typed(rows: Sequence[Row], other: Row) -> Sequence[Row]:
    """Return rows with the token types that models take where there are none, where other rows have some."""
    if _TYPES not in other or _TYPES in rows[0] or "input_ids" not in rows[0]:
        return rows
    return [{**row, _TYPES: np.zeros_like(row["input_ids"])} for row in rows]


def _filled(labelled: RowBatches, rows: Sequence[Row], model: PreTrainedModel) -> Iterator[Row]:
    """Give the rows with labels that no loss counts; the columns are those of the rows with labels."""
    first, task = labelled.rows[0], labelled.task
    names = [name for name in label_names(model) if name in first]
    _check_same(set(first) - set(names), rows[0])
    for row in rows:
        shape = row["input_ids"].shape if task in _PER_TOKEN else None
        blank = {
            name: np.full(first[name].shape if shape is None else shape, _blank(task, name), first[name].dtype)
            for name in names
        }
        yield {**row, **blank}


def _check_same(wanted: set[str], row: Mapping[str, Any]) -> None:
    if wanted != set(row):
        name = min(wanted ^ set(row))
        differs = f"lack {name!r}, which" if name in wanted else f"have {name!r}, which not"
        raise DataError(f"its rows {differs} those of train_dataset have; both need the same columns")


def _blank(task: Task, name: str) -> float:
    """Return the label that no loss counts."""
    if name in ("start_positions", "end_positions"):
        return OUT_OF_REACH
    return UNLABELLED if task in NUMBERS else IGNORED


def _collator(
    labelled: RowBatches, collate: Callable[[list[Any]], Batch], like: Batch, model: PreTrainedModel
) -> Callable[[list[Any]], Batch]:
    """Make what makes one batch of rows of both kinds, each kind by its own collator.

    :param like: a batch of one row with labels.
    """
    fills, names = Padding.of(model).fills, [name for name in label_names(model) if name in like]

    def blank(batch: Batch) -> Batch:
        rows, found = len(next(iter(batch.values()))), dict(batch)
        for name in names:
            per_token = labelled.task in _PER_TOKEN and "input_ids" in batch
            shape = batch["input_ids"].shape if per_token else (rows, *like[name].shape[1:])
            found[name] = torch.full(shape, _blank(labelled.task, name), dtype=like[name].dtype)
        return found

    def merged(rows: list[tuple[bool, Any]]) -> Batch:
        own, bare = ([row for beyond, row in rows if beyond is kind] for kind in (False, True))
        parts = [*([labelled.collate(own)] if own else []), *([blank(collate(bare))] if bare else [])]
        if len(parts) == 1:
            return parts[0]
        _check_same(set(parts[0]), parts[1])
        order = torch.tensor([beyond for beyond, _ in rows], dtype=torch.int8).argsort(stable=True).argsort()
        return {name: _stacked([part[name] for part in parts], fills.get(name, 0))[order] for name in parts[0]}

    return merged


def _stacked(parts: Sequence[Tensor], fill: int) -> Tensor:
    """Join batches whose rows differ in length."""
    return torch.from_numpy(pad([row for part in parts for row in part.numpy()], fill))
