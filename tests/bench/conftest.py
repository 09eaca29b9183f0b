"""Benchmarks hand in the rows of their tables; those of the ones that passed are printed, and written on request."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_models
from bench_tables import Table, about, check_place, write

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
THREADS = 2
_CALL = pytest.StashKey[pytest.TestReport]()
_FOUND = pytest.StashKey[list[Table]]()

HandIn = Callable[[Sequence[str], Sequence[Sequence[str]]], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tables", type=Path, metavar="PAGE", help="write the tables of passed benchmarks into this page")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    if report.when == "call":
        item.stash[_CALL] = report
    return report


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Iterator[Callable[..., HandIn]]:
    """`hand_in = table("name")`, before anything is measured; then `hand_in(header, rows)`, which prints them.

    They are written if the test passes, unless `whole=False` says that less was measured than is to be published.
    """
    page: Path = request.config.getoption("--tables", default=None) or PAGE
    found: list[Table] = []

    def place(name: str, *, on: torch.device | None = None, whole: bool = True) -> HandIn:
        check_place(page.read_text(encoding="utf-8"), name)
        device = bench_models.device() if on is None else on
        kind = "gpu" if device.type == "cuda" else "cpu"

        def hand_in(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
            made = Table(name, kind, tuple(header), tuple(map(tuple, rows)), about(device, torch.get_num_threads()))
            print(f"\n\n{name}, {made}")
            if whole:
                found.append(made)

        return hand_in

    yield place
    call = request.node.stash.get(_CALL, None)
    if call is not None and call.passed:
        request.config.stash.setdefault(_FOUND, []).extend(found)


def pytest_sessionfinish(session: pytest.Session) -> None:
    page: Path | None = session.config.getoption("--tables", default=None)
    tables = session.config.stash.get(_FOUND, [])
    if page is not None and tables:
        write(page, tables)
