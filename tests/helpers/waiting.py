"""What must not wait for a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def never_waiting() -> Iterator[None]:
    """Fail where the host waits for the GPU within the block."""
    _watch("error")
    try:
        yield
    finally:
        _watch("default")


def _watch(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode is a prototype, torch says
        torch.cuda.set_sync_debug_mode(mode)
