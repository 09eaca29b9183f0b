"""Rows that come one after the other: iterables without a length, read no further than they are needed.

A stream is read anew from its beginning for each purpose, and again when it ends. It has no epochs; a number of
optimiser steps is cut into some. A batch is made of the rows at its place in the stream, so that a run goes on at the
same row after those before it have been read and dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from torch.utils.data import DataLoader, IterableDataset

from cofiprune.data.batches import LARGE, Batches
from cofiprune.data.rows import Batch
from cofiprune.errors import DataError, SettingsError, located

FIRST_ROWS = 10_000
"""Rows of a stream that one shot, calibration and evaluations take at most."""


def is_stream(dataset: Any) -> bool:
    """Return whether a data set has rows one after the other, and no length and index."""
    if isinstance(dataset, IterableDataset | Stream):
        return True
    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    others = isinstance(dataset, DataLoader | Mapping | str | bytes) or hasattr(dataset, "iterrows")
    return hasattr(dataset, "__iter__") and not sized and not others


@dataclass(eq=False)
class Stream:
    """Rows of an iterable, and what turns some of them into rows of tokens."""

    source: Any
    read: Callable[[list[Any]], Any] = lambda rows: rows
    endless: bool = False
    """Its batches are those of all rows, over and over; else its first rows stand for it."""
    _again: Any = field(init=False, default=None)
    """Of an iterator, which gives its rows once: those that were looked at, and then itself."""

    def __post_init__(self) -> None:
        if self.gives_rows_once:
            self._again = iter(self.source)

    @property
    def gives_rows_once(self) -> bool:
        """True for generators and the like."""
        return iter(self.source) is self.source

    def raw(self) -> Iterator[Any]:
        """Give the rows as they come, from the first one on."""
        if self._again is None:
            return iter(self.source)
        self._again, rows = itertools.tee(self._again)
        return rows

    def first(self, number: int = FIRST_ROWS) -> list[Any]:
        """Return the first rows of tokens.

        :raises DataError: when there are none.
        """
        rows = list(itertools.islice(self.raw(), number))
        if not rows:
            raise DataError("there are no rows in it")
        return list(self.read(rows))


def checked_stream(dataset: Any, *, trains: bool, steps: int | None) -> Any:
    """Return a data set as a run takes it: of a stream that trains nothing the first rows, others as they are.

    :param steps: optimiser steps that are asked for.
    :raises SettingsError: for a stream whose end nobody states, or that gives its rows only once.
    """
    if not isinstance(dataset, Stream):
        return dataset
    with located("train_dataset: "):
        first = dataset.first(1 if trains else FIRST_ROWS)
    if not trains:
        return first
    kind = type(dataset.source).__name__
    if dataset.gives_rows_once:
        raise SettingsError(
            f"train_dataset is a {kind}, which gives its rows only once, and they are read more often: pass an "
            "iterable that begins anew each time, such as a torch IterableDataset, or list(...) of it"
        )
    if steps is None:
        raise SettingsError(f"train_dataset, a {kind}, has no length: say how long to train by max_steps=...")
    return replace(dataset, endless=True)


@dataclass(kw_only=True, eq=False, repr=False)
class StreamBatches(Batches):
    """Batches of the rows of a stream, in its own order; an epoch is a number of them."""

    stream: Stream
    collate: Callable[[list[Any]], Batch]
    """Makes a batch of rows of tokens."""
    batch_size: int
    head: list[Any] = field(default_factory=list)
    """The first rows of tokens."""
    steps: int = 1
    """Optimiser steps of an epoch."""
    accumulated: int = 1
    """Batches of an optimiser step in each process."""
    _live: tuple[int, Iterator[Any]] | None = field(init=False, default=None)
    """An iterator, and the position of this process's next batch in it."""

    @property
    def total(self) -> int:
        return self.steps * self.accumulated * self.processes

    def whole(self) -> Self:
        """Return the batches of all processes, a step in one batch unless that is far too large, and no fewer than
        statistics may need."""
        size = min(self.batch_size * self.accumulated * self.processes, max(self.batch_size, LARGE))
        enough = max(self.total * self.batch_size, FIRST_ROWS)
        return replace(self, rank=0, processes=1, accumulated=1, batch_size=size, steps=-(-enough // size))

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        for position in range(number * len(self) + start, (number + 1) * len(self)):
            rows = self._rows_from(position)
            chosen = list(itertools.islice(rows, self.batch_size * self.processes))
            own = chosen[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
            self._live = (position + 1, rows)
            with located(f"in batch {position}: "):
                yield self._given(self.collate(self.stream.read(own)))

    def _rows_from(self, position: int) -> Iterator[Any]:
        """Return an iterator of rows that stands before a batch of all processes."""
        if self._live is not None and self._live[0] == position:
            return self._live[1]
        rows = itertools.chain.from_iterable(self.stream.raw() for _ in itertools.repeat(None))
        skipped = position * self.batch_size * self.processes
        next(itertools.islice(rows, skipped, skipped), None)
        return rows
