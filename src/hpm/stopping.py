"""Signals that ask a run to save and stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """While entered, SIGTERM, SIGINT and SIGUSR1 only leave a note; the run looks at it between two steps.

    A second signal is not caught any more: it ends the process at once.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        """Name of the signal that arrived, or None."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        for other, handler in self._before.items():
            signal.signal(other, handler)
