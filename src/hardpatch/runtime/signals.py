"""Signals that ask a run to save and stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hardpatch.runtime.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """While entered, SIGTERM, SIGINT and SIGUSR1 leave a note, and are answered; the run looks at it between two steps.

    Schedulers repeat their signals, so a repeated one changes nothing; only a second Ctrl-C, at least a second after
    the first, ends the process at once.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        """Name of the signal that arrived, or None."""
        self._at_once = False
        self._before: dict[signal.Signals, Any] = {}
        self._since = 0.0

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self, what: str) -> Iterator[None]:
        """While entered, a signal ends the work where it is, since nothing would be lost.

        Args:
            what: What is true then, for the message.

        Raises:
            Interrupted: One came, also before this was entered.
        """
        before, self._at_once = self._at_once, True
        try:
            if self.name is not None:
                raise KeyboardInterrupt
            yield
        except KeyboardInterrupt:
            if self.name is None:
                raise
            raise Interrupted(f"stopped by {self.name} {what}") from None
        finally:
            self._at_once = before

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.name is None:
            self.name, self._since = signal.Signals(number).name, time.monotonic()
            if self._at_once:
                raise KeyboardInterrupt
            if os.environ.get("RANK", "0") == "0":
                again = "; Ctrl-C again: stop now, and lose what is not saved" if number == signal.SIGINT else ""
                os.write(2, f"\n{self.name}: stopping after this step, and saving{again}\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self._since >= 1:
            raise KeyboardInterrupt


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """While entered, SIGTERM, SIGINT and SIGUSR1 end the work where it is; for what is kept piece by piece.

    Raises:
        Interrupted: One came.
    """
    came: list[str] = []

    def stop(number: int, _: FrameType | None) -> None:
        if not came:  # once: what unwinds is not to be torn by a scheduler that repeats itself
            came.append(signal.Signals(number).name)
            raise KeyboardInterrupt  # unlike an exception, nobody on the way takes it for a damaged image

    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, stop) for number in SIGNALS} if in_main else {}
    try:
        yield
    except KeyboardInterrupt:
        if not came:
            raise
        raise Interrupted(
            f"stopped by {came[0]}; what is done is kept, and the same command goes on from there"
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def signals_held() -> Iterator[None]:
    """While entered, the signals wait. Data workers started in here are born deaf to them, and so outlive one that goes
    to the whole process group before :func:`ignore_in_worker` has run in them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_in_worker(_: int) -> None:
    """For data workers: signals often go to the whole process group, and the run needs its workers to stop well.

    A worker told to terminate goes a minute later at the latest, should nobody end it before.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave_soon)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _leave_soon(*_: object) -> None:
    last_resort = threading.Timer(60, os._exit, args=(0,))
    last_resort.daemon = True
    last_resort.start()
