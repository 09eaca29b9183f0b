"""Checked, padded batches from what users pass as a data set.

Rows of tokens are read into memory once, checked against the model, and padded batch by batch to the
longest row of the batch. Images, audio and rows for a collator of the user's are read when their
batch is made; of those, what can be known beforehand is checked beforehand and the rest batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cofiprune.data.batches import Batches, LoaderBatches, RowBatches
from cofiprune.data.cached import CACHED, LOGITS
from cofiprune.data.checks import any_label_counts, check
from cofiprune.data.mixed import OUT_OF_REACH, Bare, Mixed, mix
from cofiprune.data.rows import Batch, Padding, Row, Source, add_mask, check_columns, find_columns, read
from cofiprune.data.streams import Stream, StreamBatches, is_stream
from cofiprune.data.tasks import IGNORED, Task, label_names, task_of
from cofiprune.errors import DataError, explained, located
from cofiprune.hooks import same_random_state

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
    name: str = "dataset",
) -> Batches:
    """Check a data set against a model and cut it into batches.

    :param dataset: a torch or `datasets` Dataset, a list, or any iterable, whose first rows are taken, of rows that are
        dicts of tensors, arrays or lists; or a DataLoader, whose batches are then taken as they are (`batch_size`,
        `shuffle` and `collator` are its own); `Mixed` for rows of which some have no labels; an endless `Stream`.
    :param collator: makes a batch from a list of rows; without it rows are padded with the model's padding id.
    :param need_labels: False when something else than labels gives the loss (a teacher).
    :param name: what the messages call the data set.
    :raises DataError: when it is empty, has nothing that the model reads, lacks labels that are needed, or holds
        something out of the model's range. The message names the row.
    """
    if isinstance(dataset, Mixed):
        settings: dict[str, Any] = {"batch_size": batch_size, "shuffle": shuffle, "seed": seed, "collator": collator}
        return _mixed(dataset, model, partial(prepare, need_labels=need_labels, name=name, **settings))
    with located(f"{name}: "):
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, not {batch_size}")
        batches: Batches
        first: Mapping[str, Any]
        if isinstance(dataset, DataLoader):
            batches, first = _from_loader(dataset, model, seed)
        elif isinstance(dataset, Stream) and dataset.endless:
            batches, first = _streamed(dataset, model, collator, batch_size)
        else:
            stream = dataset if isinstance(dataset, Stream) else Stream(dataset) if is_stream(dataset) else None
            source = Source(dataset if stream is None else stream.first())
            first = source[0]
            cut = partial(RowBatches, batch_size=batch_size, shuffle=shuffle, seed=seed)
            batches = _padded(source, model, cut) if collator is None else _collated(source, model, collator, cut)
        if need_labels and not batches.labelled:
            raise DataError(_unlabelled(model, first))
    return batches


def _mixed(dataset: Mixed, model: PreTrainedModel, prepared: Callable[..., Batches]) -> Batches:
    """Return the batches of rows with labels and without."""
    name = "unlabelled_dataset"
    with located(f"{name}: "):
        if isinstance(dataset.labelled, Stream) or is_stream(dataset.unlabelled):
            raise DataError("a stream cannot be mixed with other rows: mix the streams before you pass one")
        bare = dataset.unlabelled if isinstance(dataset.unlabelled, DataLoader) else Bare(dataset.unlabelled)
    labelled = prepared(dataset.labelled, model)
    unlabelled = prepared(bare, model, need_labels=False, name=name)
    with located(f"{name}: "):
        return mix(labelled, unlabelled, model)


def cached_in(dataset: Any) -> tuple[str, ...]:
    """Return the columns with a teacher's outputs that the first row of a data set, or its first batch, has."""
    first: Any = None
    if isinstance(dataset, Mixed):
        return cached_in(dataset.labelled)
    if isinstance(dataset, DataLoader):
        with same_random_state():
            first = next(iter(dataset), None)
    elif isinstance(dataset, Stream):
        first = dataset.first(1)[0]
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset):
        first = dataset[0]
    return tuple(name for name in CACHED if name in first) if isinstance(first, Mapping) else ()


def _padded(source: Source, model: PreTrainedModel, cut: Callable[..., RowBatches]) -> RowBatches:
    """Batches of rows without a collator: token rows are read into memory, others batch by batch."""
    first = source[0]
    columns = find_columns(first, model)
    check_columns(columns, first, model)
    task = task_of(model, {new: first[old] for new, old in columns.items()})
    labelled = _is_labelled(columns, model)
    padding = Padding.of(model)

    def checked(raw: Iterable[Mapping[str, Any]]) -> list[Row]:
        rows = read(raw, columns, padding.fills)
        check(rows, model, task)
        add_mask(rows, model)
        for row in rows if task != "other" else ():
            _type_labels(row, task)
        return rows

    if "input_ids" in columns:
        rows = checked(source.rows(columns.values()))
        labelled = labelled and any_label_counts(rows, task)
        lengths = np.array([row["input_ids"].shape[-1] for row in rows])
        return cut(rows=rows, collate=padding, task=task, labelled=labelled, lengths=lengths)
    chosen = {new: old for new, old in columns.items() if new in label_names(model)}
    known = bool(chosen and source.columnar)  # all labels can be had without reading the inputs
    if known:
        labels = read(source.rows(chosen.values()), chosen, {})
        check(labels, model, task)
        labelled = labelled and any_label_counts(labels, task)
    ahead, counted = len(source) if source.in_memory else min(_PEEK, len(source)), known or not source.in_memory
    for start in range(0, ahead, _PEEK):
        with located(f"from row {start} on: "):
            rows = checked(source[index] for index in range(start, min(start + _PEEK, ahead)))
            counted = counted or (labelled and any_label_counts(rows, task))
    labelled = labelled and counted
    return cut(rows=source, collate=lambda raw: padding(checked(raw)), task=task, labelled=labelled)


def _collated(source: Source, model: PreTrainedModel, collator: Collator, cut: Callable[..., RowBatches]) -> RowBatches:
    """Batches by a collator of the user's, of the columns it can use, as the Trainer hands them over."""
    first = source[0]
    columns = find_columns(first, model)
    kept = list(columns.values()) if "input_ids" in columns else list(first)

    def collate(raw: list[Any]) -> Batch:
        return accepted(collator([{name: row[name] for name in kept if name in row} for row in raw]), model)

    lengths, rows, chosen = None, [], {}
    if "input_ids" in columns:
        # Labels per token may be the collator's to make or to align; one number per row is what it seems.
        numbers = isinstance(first.get(columns.get("labels", "")), int | float)
        chosen = {name: columns[name] for name in ("input_ids", "labels") if name == "input_ids" or numbers}
        rows = read(source.rows(chosen.values()), chosen, {})
        check(rows, model, "other")
        lengths = np.array([row["input_ids"].shape[-1] for row in rows])
    # A collator that draws masks must not shift the training's draws.
    with torch.random.fork_rng(devices=[]), located("in the first rows: "):
        sample = collate([source[index] for index in range(min(_PEEK, len(source)))])
    task = task_of(model, _first_row(sample))
    if task == "masked-lm" and LOGITS in sample:
        raise DataError(f"{LOGITS!r} is of inputs that a collator may mask anew: leave it, or the collator, out")
    labelled = _is_labelled(sample, model)
    if "labels" in chosen and task == "classification":
        check(rows, model, task)
        labelled = labelled and any_label_counts(rows, task)
    return cut(rows=source, collate=collate, task=task, labelled=labelled, lengths=lengths)


def _streamed(
    stream: Stream, model: PreTrainedModel, collator: Collator | None, batch_size: int
) -> tuple[Batches, Mapping[str, Any]]:
    """Return the batches of a stream, and its first row; what can be known of it is known from its first rows."""

    def batches(rows: list[Any]) -> Batches:
        size = max(len(rows), 1)
        return prepare(rows, model, batch_size=size, collator=collator, need_labels=False, name="its rows")

    def collate(rows: list[Any]) -> Batch:
        made = batches(rows)
        made.taught = True  # which of its columns are given is said further out
        return next(iter(made))

    head = stream.first(_PEEK)
    known = batches(head)
    return StreamBatches(
        stream=stream, collate=collate, batch_size=batch_size, head=head, task=known.task, labelled=known.labelled,
        seed=0,
    ), head[0]  # fmt: skip


def _from_loader(loader: DataLoader[Any], model: PreTrainedModel, seed: int) -> tuple[Batches, Batch]:
    """Return the batches of a loader, and the first of them."""
    try:
        total = len(loader)
    except TypeError:
        raise DataError(
            "a DataLoader over an iterable data set has no length; pass the data set itself, with max_steps"
        ) from None
    if not total:
        raise DataError("the DataLoader has no batches; the data set is empty, or smaller than one batch and dropped")
    with torch.random.fork_rng(devices=[]), located("in the first batch: "):
        sample = accepted(next(iter(loader)), model)
    task, labelled = task_of(model, _first_row(sample)), _is_labelled(sample, model)
    accept = partial(accepted, model=model)
    return LoaderBatches(loader=loader, accept=accept, task=task, labelled=labelled, seed=seed), sample


def accepted(batch: Mapping[str, Any], model: PreTrainedModel) -> Batch:
    """Check a batch that somebody else made, and keep of it what the model's forward takes.

    :raises DataError: when it is no mapping, or out of the model's range.
    """
    if not isinstance(batch, Mapping):
        raise DataError(f"a batch must be a dict of tensors for the model; found {type(batch).__name__}")
    columns = find_columns(batch, model)
    check_columns(columns, batch, model)
    with explained(DataError, "a batch must be a dict of tensors for the model", TypeError, ValueError, RuntimeError):
        tensors = {new: torch.as_tensor(batch[old]) for new, old in columns.items()}
    task = task_of(model, _first_row(tensors))
    per_row = {name: value.detach().cpu() for name, value in tensors.items() if value.dim()}
    rows = [dict(zip(per_row, cells, strict=True)) for cells in zip(*per_row.values(), strict=False)]
    if rows:
        check(read(rows, {name: name for name in per_row}, {}), model, task)
    labels = tensors.get("labels")
    if labels is not None and task != "other":
        tensors["labels"] = labels.float() if task in ("regression", "multi-label") else labels.long()
    return tensors


def _type_labels(row: Row, task: Task) -> None:
    """Give labels the type that the loss takes, and put a span past the end of its row out of every reach."""
    if "labels" in row:
        dtype = np.float32 if task in ("regression", "multi-label") else np.int32
        row["labels"] = row["labels"].astype(dtype, copy=False)
    for name in ("start_positions", "end_positions"):
        if name in row and "input_ids" in row:
            inside = row[name] < row["input_ids"].shape[-1]
            row[name] = np.where(inside, row[name], OUT_OF_REACH)


def _is_labelled(columns: Mapping[str, Any], model: PreTrainedModel) -> bool:
    """Tell whether columns hold every label from which a model computes its loss."""
    names = label_names(model)
    return bool(names) and all(name in columns for name in names)


def _unlabelled(model: PreTrainedModel, row: Mapping[str, Any]) -> str:
    names = label_names(model)
    if not names:
        return (
            f"{type(model).__name__} has no head and computes no loss; pass a teacher whose outputs it is to match, "
            "or a model with a head"
        )
    if _is_labelled(find_columns(row, model), model):
        return (
            f"no row has a label that the loss counts: all {' and '.join(map(repr, names))} are {IGNORED}, or past the "
            "end of their row; label some rows, or pass a teacher whose outputs take the labels' place"
        )
    return (
        f"the rows have no {' and '.join(map(repr, names))}; they have {', '.join(map(repr, row))}. "
        "Add labels, or pass a teacher whose outputs take their place"
    )


def _first_row(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[0] for name, value in batch.items() if value.dim()}
