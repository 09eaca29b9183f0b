"""Batches that are cut and padded while the device computes, in memory that it can copy from without waiting."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Empty, Full, Queue
from threading import Event, Thread

import torch

from cofiprune.data.batches import Batches
from cofiprune.data.rows import Batch

_DEPTH = 2
"""Batches that wait, ready."""
_PATIENCE = 0.1
"""Seconds after which a thread that waits looks whether it is still wanted."""

_Item = tuple[Batch | None, BaseException | None]


def loaded(batches: Batches, device: torch.device) -> Iterator[Batch]:
    """Give the batches of an epoch for a device.

    They are made ahead for a GPU, unless code of the user's makes them, which may draw random numbers: those must come
    in step with the training, so that a run can be resumed.
    """
    if device.type == "cuda" and batches.in_memory:
        return ahead(iter(batches), pin=True)
    return iter(batches)


def ahead(batches: Iterator[Batch], *, pin: bool) -> Iterator[Batch]:
    """Give batches that a thread makes ahead, in their order; an error of theirs comes in its place.

    :param pin: put them into page-locked memory.
    """
    ready: Queue[_Item] = Queue(_DEPTH)
    unwanted = Event()

    def hand_over(item: _Item) -> bool:
        while not unwanted.is_set():
            try:
                ready.put(item, timeout=_PATIENCE)
                return True
            except Full:
                continue
        return False

    def make() -> None:
        try:
            for batch in batches:
                if not hand_over(({name: value.pin_memory() for name, value in batch.items()} if pin else batch, None)):
                    return
            hand_over((None, None))
        except BaseException as error:  # whatever it is, it belongs to the thread that asks for batches
            hand_over((None, error))

    worker = Thread(target=make, name="cofiprune-batches", daemon=True)
    worker.start()
    try:
        while True:
            try:
                batch, error = ready.get(timeout=_PATIENCE)
            except Empty:
                continue
            if error is not None:
                raise error
            if batch is None:
                return
            yield batch
    finally:
        unwanted.set()
        worker.join()
