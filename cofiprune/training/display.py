"""Progress of a run on a terminal or in a notebook, and Ctrl-C and SIGTERM, after which a step is finished."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SHOWN = (
    ("loss", "loss {:.2f}"),
    ("expected_sparsity", " sparsity {:.2f}"),
    ("target_sparsity", "/{:.2f}"),
)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Display:
    """A progress line with loss, expected and target sparsity, metric and time left."""

    def __init__(self, *, enabled: bool) -> None:
        self.console = Console(stderr=True)
        shown = enabled and (self.console.is_terminal or self.console.is_jupyter or "ipykernel" in sys.modules)
        self.progress = Progress(
            # Fits into 80 columns.
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[info]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not shown,
        )
        self.latest: dict[str, float] = {}
        self.metric = ""
        self.task: Any = None

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def begin(self, phase: str, *, total: int, done: int) -> None:
        """Start the line of a phase."""
        self.task = self.progress.add_task(phase, total=total, completed=done, info="")

    def advance(self) -> None:
        """One optimiser step done."""
        self.progress.advance(self.task)

    def reach(self, done: int) -> None:
        """So many steps of the phase are done."""
        self.progress.update(self.task, completed=done)

    def show(self, entry: Mapping[str, Any]) -> None:
        """Show the figures of a history entry."""
        metric = next((name for name in entry if name.startswith("eval_") and name != "eval_loss"), None)
        if metric is not None:
            self.metric = f" {metric.removeprefix('eval_')} {entry[metric]:.3f}"
        self.latest.update({name: value for name, value in entry.items() if isinstance(value, int | float)})
        if "expected_sparsity" not in entry and "loss" in entry:
            self.latest.pop("expected_sparsity", None)
            self.latest.pop("target_sparsity", None)
        info = "".join(text.format(self.latest[name]) for name, text in _SHOWN if name in self.latest)
        self.progress.update(self.task, info=info + self.metric)


class Interrupt:
    """While it is entered, the first signal only sets `requested`; a second one acts at once."""

    def __init__(self) -> None:
        self.requested: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Signal handlers can be set in the main thread only; elsewhere signals act as they always do.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and scripts leave it for background jobs
                    self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
        self._previous.clear()
        if kind is None and self.requested is not None:
            signal.raise_signal(self.requested)  # it came when there was no step left to stop after

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = number

    def stop(self, message: str) -> None:
        """Raise what the signal stands for: KeyboardInterrupt, or SystemExit for SIGTERM."""
        if self.requested == signal.SIGTERM:
            raise SystemExit(f"stopped by SIGTERM. {message}")
        raise KeyboardInterrupt(message)
