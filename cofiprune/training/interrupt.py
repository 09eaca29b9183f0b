"""Ctrl-C and SIGTERM: finish the step, so that a checkpoint can be written, then stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
