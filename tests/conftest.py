"""What every test may ask for, and garbage that is not looked through."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from cofiprune import Adapter, register_adapter
from cofiprune import adapter as adapters


@pytest.fixture(scope="module", autouse=True)
def _what_was_imported_is_not_collected() -> None:
    # Each run ends with a collection of garbage, which takes longer than the run where it looks through all libraries.
    gc.collect()
    gc.freeze()


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[Adapter], None]:
    """`cofiprune.register_adapter` until the end of a test."""
    monkeypatch.setattr("cofiprune.adapter._registered", dict(adapters._registered))
    return register_adapter


@pytest.fixture
def started_by_hand() -> Iterator[None]:
    """Signals act as in a program that was started by hand; jobs in the background of a script ignore Ctrl-C."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def example() -> Iterator[Callable[[str], ModuleType]]:
    """Import a program of the examples by name, without a network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "examples")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield import_module
