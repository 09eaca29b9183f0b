"""Batches of rows in an order that depends on (seed, epoch) alone and can be taken up anywhere.

Rows of similar length share a batch, so that little padding is computed: the shuffled rows are cut
into megabatches, each is sorted by length and cut into batches, and the batches are shuffled again.
What is shuffled are the rows of an optimiser step. They are the same whether one process takes them in one batch, in
several after one another, or several processes share them: `shard` gives each its part, of about the same lengths.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from cofiprune.data.cached import CACHED
from cofiprune.data.rows import Batch as Batch
from cofiprune.data.rows import Padding
from cofiprune.data.tasks import LABELS, Task, label_names
from cofiprune.errors import located

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = "__rows__"
"""Key of the numbers of a batch's rows, [rows], where `with_rows` asks for them."""
REPEATED = "__repeated__"
"""Key in a batch that only keeps a process in step with the others: its rows were given already, and count nothing."""
LARGE = 64
"""Rows of a batch that is larger than a process's own; more may not fit into memory."""
_MEGABATCH = 50
"""Batches that are sorted together; the value of transformers' LengthGroupedSampler."""


@dataclass(kw_only=True, eq=False, repr=False)
class Batches(ABC):
    """Batches on the CPU, epoch after epoch; iterating gives the first epoch."""

    task: Task
    """Of the model's head: it says what the labels mean."""
    labelled: bool
    """True for batches with labels, from which the model computes its loss."""
    partly: bool = False
    """Some rows have no labels among others that do."""
    taught: bool = False
    """Set to True for batches that carry what a teacher has put out for their rows, where they have such columns."""
    seed: int
    rank: int = 0
    processes: int = 1

    @property
    @abstractmethod
    def total(self) -> int:
        """Number of batches of an epoch over all processes."""

    @abstractmethod
    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Give the batches of an epoch in this process, from position `start` on; both count from 0."""

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def __len__(self) -> int:
        """Number of batches of a whole epoch in this process."""
        return -(-self.total // self.processes)

    def shard(self, rank: int, processes: int) -> Self:
        """Return the part of one of several processes; every part has the same number of batches.

        Where the batches do not divide evenly, some are given a second time, with the key `REPEATED`.
        """
        if not 0 <= rank < processes:
            raise ValueError(f"rank {rank} is not among {processes} processes")
        return replace(self, rank=rank, processes=processes)

    def whole(self) -> Self:
        """Return the batches of all processes, the same in each of them."""
        return self.shard(0, 1)

    def _given(self, batch: Batch) -> Batch:
        return batch if self.taught else {name: value for name, value in batch.items() if name not in CACHED}


@dataclass(kw_only=True, eq=False, repr=False)
class RowBatches(Batches):
    """Batches made of rows that can be read in any order."""

    rows: Sequence[Any]
    collate: Callable[[list[Any]], Batch]
    """Makes a batch of rows."""
    batch_size: int
    shuffle: bool
    accumulated: int = 1
    """Batches of an optimiser step in each process."""
    lengths: NDArray[np.int64] | None = None
    """Of each row, to group rows by; None to take them in order or shuffled."""
    with_rows: bool = False
    """Set to True for batches that carry the numbers of their rows."""

    @property
    def step_rows(self) -> int:
        """Rows of an optimiser step over all processes."""
        return self.batch_size * self.accumulated * self.processes

    @property
    def total(self) -> int:
        return -(-len(self.rows) // self.step_rows) * self.accumulated * self.processes

    def whole(self) -> Self:
        """Return all rows in the same order with a step in one batch, as long as that is not far too large."""
        size = min(self.step_rows, max(self.batch_size, LARGE))
        return replace(self, rank=0, processes=1, accumulated=1, batch_size=size)

    @property
    def in_memory(self) -> bool:
        """True for rows that are held in memory, so that no code of the user's runs when a batch is made."""
        return isinstance(self.collate, Padding)

    def pad_to(self, multiple: int, longest: int | None) -> None:
        """Pad batches of tokens to a multiple of a length, as long as the model reads so many: `longest`."""
        if isinstance(self.collate, Padding):
            self.collate = replace(self.collate, multiple=multiple, longest=longest)

    def indices(self, epoch: int = 0) -> list[list[int]]:
        """Return the rows of each batch of an epoch in this process; of a repeated one, the first of its step."""
        return [own or step[:1] for own, step in self._parts(epoch)]

    def _parts(self, epoch: int) -> Iterator[tuple[list[int], list[int]]]:
        """Give the rows of each batch in this process, which may be none, and those of its step."""
        if self.shuffle:
            steps = shuffled(len(self.rows), self.step_rows, self.lengths, self.seed, epoch)
        else:
            # The longest first: what does not fit into memory fails at once, not at the end.
            order = np.arange(len(self.rows)) if self.lengths is None else np.argsort(-self.lengths, kind="stable")
            steps = _cut(order, self.step_rows)
        together = self.batch_size * self.processes
        for step in (rows.tolist() for rows in steps):
            for start in range(0, self.accumulated * together, together):
                yield step[start : start + together][self.rank :: self.processes], step

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        for own, step in itertools.islice(self._parts(number), start, None):
            indices = own or step[:1]
            with located(f"among the rows {indices[:8]}: "):
                batch = self._given(self.collate([self.rows[index] for index in indices]))
            more = {} if own else {REPEATED: torch.tensor(True)}
            yield {**batch, **({ROWS: torch.tensor(indices)} if self.with_rows else {}), **more}


@dataclass(kw_only=True, eq=False, repr=False)
class LoaderBatches(Batches):
    """Batches of a DataLoader of the user's, in the loader's own order.

    The order is drawn from (seed, epoch), unless the loader has a generator or a sampler that goes its own way.
    """

    loader: DataLoader[Any]
    accept: Callable[[Mapping[str, Any]], Batch]

    @property
    def total(self) -> int:
        return len(self.loader)

    def shard(self, rank: int, processes: int) -> Self:
        """Return the part of one process; a loader with a DistributedSampler is one part already."""
        alone = isinstance(getattr(self.loader, "sampler", None), DistributedSampler)
        return super().shard(*((0, 1) if alone else (rank, processes)))

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        set_epoch = getattr(getattr(self.loader, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(number)
        # Past its end an epoch begins again, so that every process has the same number of batches.
        endless = itertools.chain.from_iterable(self._drawn(number) for _ in itertools.repeat(None))
        own = itertools.islice(endless, self.rank + start * self.processes, None, self.processes)
        for position in range(start, len(self)):
            with located(f"in batch {position}: "):
                accepted = self._given(self.accept(next(own)))
            repeated = position * self.processes + self.rank >= self.total
            yield {**accepted, REPEATED: torch.tensor(True)} if repeated else accepted

    def _drawn(self, epoch: int) -> Iterator[Mapping[str, Any]]:
        # Samplers draw their order from the global generator when the first batch is asked for.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_mixed(self.seed, epoch))
            iterator = iter(self.loader)
            first = list(itertools.islice(iterator, 1))
        yield from first
        yield from iterator


def shuffled(
    rows: int, batch_size: int, lengths: NDArray[np.int64] | None, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """Return the rows of each batch of an epoch; the batch with the longest row comes first.

    :param lengths: [rows], to group rows by; None to shuffle alone.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(rows)
    if lengths is None:
        return _cut(order, batch_size)
    # Small sets would otherwise be one sorted megabatch, the same in every epoch.
    megabatch = max(1, min(_MEGABATCH, rows // (batch_size * 4))) * batch_size
    batches = []
    for part in _cut(order, megabatch):
        batches += _cut(part[np.argsort(-lengths[part], kind="stable")], batch_size)
    mixed = [batches[index] for index in generator.permutation(len(batches))]
    longest = max(range(len(mixed)), key=lambda index: lengths[mixed[index]].max())
    return [mixed.pop(longest), *mixed]


def to_model(batch: Mapping[str, torch.Tensor], model: nn.Module) -> Batch:
    """Move a batch to a model's device, inputs that are not whole numbers in the model's own precision."""
    weight = next(value for value in model.parameters() if value.is_floating_point())
    moved = {}
    for name, value in batch.items():
        cast = value.is_floating_point() and name not in LABELS
        moved[name] = value.to(weight.device, weight.dtype if cast else value.dtype, non_blocking=True)
    return moved


def model_inputs(batch: Mapping[str, torch.Tensor], model: PreTrainedModel) -> Batch:
    """Return the inputs of a batch: all but the labels, the numbers of the rows and a teacher's outputs."""
    left_out = {ROWS, REPEATED, *CACHED, *label_names(model)}
    return {name: value for name, value in batch.items() if name not in left_out}


def _cut(order: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def _mixed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
