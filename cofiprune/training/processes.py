"""Several processes that train one model: what each must know of the others."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from torch import Tensor

from cofiprune.errors import SettingsError, TrainingError, one_line

T = TypeVar("T")


def check_processes(found: int) -> None:
    """Make sure that processes that were started together know of one another: else each would train its own model.

    :param found: number of processes that share the work.
    :raises SettingsError: when more were started, as by torchrun.
    """
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started > found:
        raise SettingsError(
            f"{started} processes were started (WORLD_SIZE={started}), and this one works with {found}: each would "
            "train a model of its own, in the same folder. On CPUs set ACCELERATE_USE_CPU=true, with a Trainer "
            "TrainingArguments(use_cpu=True), before anything else uses Accelerate; or start them with `accelerate "
            "launch`. For one process alone, unset WORLD_SIZE"
        )


def by_first(compute: Callable[[], T]) -> T:
    """Have the first process compute something, and every process return it, or raise what the first one raised."""
    outcome: list[T | Exception] = []
    try:
        outcome = [compute()] if PartialState().is_main_process else [cast("T", None)]
    except Exception as error:
        if PartialState().num_processes == 1:
            raise
        outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


@contextmanager
def together() -> Iterator[None]:
    """Do something in every process; where one fails, all of them do, so that none waits for it.

    :raises TrainingError: in those that did not fail.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    if PartialState().num_processes > 1:
        count = reduce(torch.tensor(float(failed is not None), device=PartialState().device), "sum")
        if failed is None and float(count):
            raise TrainingError("another process of this run failed; its message says why")
    if failed is not None:
        raise failed


@contextmanager
def noticing(folder: Path | None) -> Iterator[None]:
    """Say in plain words that another process has died, where the connection to it breaks.

    :param folder: of the checkpoints.
    :raises TrainingError: when it does.
    """
    try:
        yield
    except RuntimeError as error:
        broken = isinstance(error, torch.distributed.DistError) or re.search(r"gloo|nccl|by peer", str(error), re.I)
        if PartialState().num_processes == 1 or not broken:
            raise
        advice = "" if folder is None else f" What was saved is in {folder}: start all of them again with resume=True."
        raise TrainingError(f"another process of this run is gone ({one_line(error)}).{advice}") from error


def averaged(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean of each value over the processes."""
    if PartialState().num_processes == 1:
        return dict(values)
    return {name: reduce(value, "mean") for name, value in values.items()}


def shares_of(counts: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Return the weight of each batch of a step in each part of the loss.

    With them the sum over the batches, averaged over the processes, is the mean over all that counts in the step.

    :param counts: by batch of this process: how many rows or tokens each part of the loss is a mean of, by its name.
    """
    processes = PartialState().num_processes
    totals = torch.tensor([[*count.values()] for count in counts], dtype=torch.float64).sum(0)
    if processes > 1:
        totals = reduce(totals.float().to(PartialState().device), "sum").cpu().double()
    by_name = dict(zip(counts[0], totals.tolist(), strict=True))
    return [{name: processes * value / max(by_name[name], 1.0) for name, value in each.items()} for each in counts]
