"""From what users pass as a data set to checked, padded batches.

Rows of tokens are read into memory once, checked against the model, and padded batch by batch to the
longest row of the batch. Images, audio and rows for a collator of the user's are read when their
batch is made; of those, what can be known beforehand is checked beforehand and the rest batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cofiprune.data.batches import Batch, Batches, LoaderBatches, RowBatches
from cofiprune.data.checks import check, check_tokens
from cofiprune.data.columns import LABEL_ALIASES, fills_of, is_labelled, renamed, typed, unlabelled, usable, with_mask
from cofiprune.data.sources import Source, open_source
from cofiprune.data.table import Table, table
from cofiprune.data.tasks import Task, forward_names, label_names, task_of
from cofiprune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Collator = Callable[[list[Any]], Mapping[str, Any]]
_PEEK = 32
"""Rows of a set that is not in memory that are read to find mistakes early."""


def prepare(
    dataset: Any,
    model: PreTrainedModel,
    *,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    collator: Collator | None = None,
    need_labels: bool = True,
    group_by_length: bool = True,
    name: str = "dataset",
) -> Batches:
    """Check a data set against a model and cut it into batches.

    :param dataset: a torch or `datasets` Dataset or a list, of rows that are dicts of tensors, arrays or lists; or a
        DataLoader, whose batches are then taken as they are (`batch_size`, `shuffle` and `collator` are its own).
    :param collator: makes a batch from a list of rows; without it rows are padded with the model's padding id.
    :param need_labels: False when something else than labels gives the loss (a teacher).
    :param group_by_length: let rows of similar length share a batch.
    :param name: what the messages call the data set.
    :raises DataError: when it is empty, has nothing that the model reads, lacks labels that are needed, or holds
        something out of the model's range. The message names the row.
    """
    with _named(name):
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, not {batch_size}")
        if isinstance(dataset, DataLoader):
            return _from_loader(dataset, model, seed, need_labels)
        source = open_source(dataset)
        rows: Table | LazyRows
        if collator is not None:
            rows, task, labelled, lengths = _collated(source, model, collator)
        else:
            rows, task, labelled, lengths = _read(source, model)
        if need_labels and not labelled:
            raise DataError(unlabelled(model, source[0]))
    return RowBatches(
        rows,
        task,
        batch_size=batch_size,
        shuffle=shuffle,
        labelled=labelled,
        seed=seed,
        lengths=lengths if group_by_length else None,
    )


class LazyRows:
    """Rows that are read from their source when a batch is made."""

    def __init__(self, source: Source, make: Callable[[list[Any], str], Batch]) -> None:
        self.source = source
        self.make = make

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the rows as tensors [rows, ...].

        :raises DataError: when one is out of the model's range.
        """
        return self.make([self.source[index] for index in indices], f"among the rows {list(indices)[:8]}: ")


def _read(source: Source, model: PreTrainedModel) -> tuple[Table | LazyRows, Task, bool, Sequence[int] | None]:
    """Rows without a collator: token rows into memory, others to be read batch by batch."""
    first = source[0]
    columns = usable(first, model)
    task = task_of(model, {new: first[old] for new, old in columns.items()})
    labelled = is_labelled(columns, model)
    fills = fills_of(model)
    if "input_ids" in columns:
        rows = table(renamed(source.rows(columns.values()), columns), fills)
        check(rows, model, task)
        rows = typed(with_mask(rows, model), task)
        return rows, task, labelled, rows.columns["input_ids"].shapes[:, -1].tolist()

    def make(raw: list[Any], where: str) -> Batch:
        part = table(renamed(iter(raw), columns), fills)
        with _named(where, ""):
            check(part, model, task)
        part = typed(with_mask(part, model), task)
        return part.batch(range(len(raw)))

    _check_labels(source, model, columns, task)
    ahead = len(source) if source.in_memory else min(_PEEK, len(source))
    for start in range(0, ahead, _PEEK):
        make([source[index] for index in range(start, min(start + _PEEK, ahead))], f"from row {start} on: ")
    return LazyRows(source, make), task, labelled, None


def _collated(
    source: Source, model: PreTrainedModel, collator: Collator
) -> tuple[LazyRows, Task, bool, Sequence[int] | None]:
    """Rows for a collator of the user's; columns it could not use are dropped, as the Trainer does."""
    first = source[0]
    lengths, labels = None, None
    known = [name for name in first if name in forward_names(model) or name in LABEL_ALIASES]
    kept = known if "input_ids" in known else list(first)
    if "input_ids" in known:
        # Labels per token may be the collator's to make or to align; one number per row is what it seems.
        scalars = [name for name in ("labels", *LABEL_ALIASES) if isinstance(first.get(name), int | float)]
        columns = dict(zip(("input_ids", "labels"), ("input_ids", *scalars), strict=False))
        read = table(renamed(source.rows(columns.values()), columns), {})
        check_tokens(read.columns["input_ids"], model)
        lengths, labels = read.columns["input_ids"].shapes[:, -1].tolist(), read.columns.get("labels")

    def make(raw: list[Any], where: str) -> Batch:
        rows = [{name: row[name] for name in kept if name in row} for row in raw]
        return accepted(collator(rows), model, where)

    with torch.random.fork_rng(devices=[]):  # a collator that draws masks must not shift the training's draws
        sample = make([source[index] for index in range(min(_PEEK, len(source)))], "in the first rows: ")
    task = task_of(model, _first_row(sample))
    if labels is not None and task == "classification":
        check(Table({"labels": labels}, {}), model, task)
    return LazyRows(source, make), task, is_labelled(sample, model), lengths


def _from_loader(loader: DataLoader[Any], model: PreTrainedModel, seed: int, need_labels: bool) -> Batches:
    try:
        total = len(loader)
    except TypeError:
        raise DataError("a DataLoader over an iterable data set has no length; pass a data set with one") from None
    if not total:
        raise DataError("the DataLoader has no batches; the data set is empty, or smaller than one batch and dropped")
    with torch.random.fork_rng(devices=[]):
        sample = accepted(next(iter(loader)), model, "in the first batch: ")
    labelled = is_labelled(sample, model)
    if need_labels and not labelled:
        raise DataError(unlabelled(model, sample))
    return LoaderBatches(
        loader,
        task_of(model, _first_row(sample)),
        accept=lambda batch, number: accepted(batch, model, f"in batch {number}: "),
        labelled=labelled,
        seed=seed,
    )


def accepted(batch: Mapping[str, Any], model: PreTrainedModel, where: str = "") -> Batch:
    """Check a batch that somebody else made, and keep of it what the model's forward takes.

    :raises DataError: when it is no mapping, or out of the model's range.
    """
    if not isinstance(batch, Mapping):
        raise DataError(f"{where}a batch must be a dict of tensors for the model; found {type(batch).__name__}")
    columns = usable(batch, model)
    try:
        tensors = {new: torch.as_tensor(batch[old]) for new, old in columns.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{where}a batch must be a dict of tensors for the model: {error}") from error
    cells = {name: [row.detach().cpu() for row in value] for name, value in tensors.items() if value.dim()}
    rows = table(({name: column[n] for name, column in cells.items()} for n in range(_height(cells))), {})
    task = task_of(model, _first_row(tensors))
    with _named(where, ""):
        check(rows, model, task)
    labels = tensors.get("labels")
    if labels is not None:
        numbers = task in ("regression", "multi-label")
        tensors["labels"] = labels.float() if numbers else labels if task == "other" else labels.long()
    return tensors


def _check_labels(source: Source, model: PreTrainedModel, columns: Mapping[str, str], task: Task) -> None:
    """Check the labels of all rows where they can be had without reading the inputs."""
    chosen = {new: old for new, old in columns.items() if new in label_names(model)}
    if chosen and source.has_columns:
        check(table(renamed(source.rows(chosen.values()), chosen), {}), model, task)


def _first_row(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[0] for name, value in batch.items() if value.dim()}


def _height(cells: Mapping[str, Sequence[Any]]) -> int:
    return min((len(column) for column in cells.values()), default=0)


@contextmanager
def _named(name: str, colon: str = ": ") -> Iterator[None]:
    """Begin the message of a data error with where it was found."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{name}{colon}{error}") from None
