"""Fair timing on a device: in turn, from an idle device to an idle device, in medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

_LEAST_RUNS = 5
_MOST_RUNS = 500


def in_turn(
    passes: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    runs: int | None = None,
    warmup: int = 3,
    seconds: float = 5.0,
    own_time: bool = False,
) -> list[list[float]]:
    """Time several computations in rounds, each once per round.

    Changes on the machine thus affect all of them alike. Every other round goes backwards, so that none always follows
    the same other.

    :param runs: rounds; by default at least 5, and more within `seconds`.
    :param own_time: measure the processor time of this thread, which excludes other programs; for computations without
        other threads.
    :return: seconds of every run of each.
    """
    clock = time.thread_time if own_time else time.perf_counter
    for _ in range(warmup):
        for one in passes:
            _seconds(one, device, clock)
    times: list[list[float]] = [[] for _ in passes]
    begin = clock()
    least, most = (_LEAST_RUNS, _MOST_RUNS) if runs is None else (runs, runs)
    done = 0
    while done < least or (done < most and clock() - begin < seconds):
        order = range(len(passes)) if done % 2 == 0 else reversed(range(len(passes)))
        for index in order:
            times[index].append(_seconds(passes[index], device, clock))
        done += 1
    return times


def _seconds(compute: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    _wait(device)
    begin = clock()
    compute()
    _wait(device)
    return clock() - begin


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Set torch's number of CPU threads; None keeps it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
