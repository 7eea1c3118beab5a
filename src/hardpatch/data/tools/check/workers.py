"""Processes that may die: the file that killed one is named, and the others are still looked at."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

from hardpatch.runtime.signals import ignore_in_worker, signals_held

Answer = TypeVar("Answer")

_CHUNK = 16
"""Numbers that are handed out at once."""


class _Worker(Generic[Answer]):
    """One process and what it was asked for and has not answered yet.

    Args:
        look: What it does.
    """

    def __init__(self, look: Callable[[int], Answer]) -> None:
        context = multiprocessing.get_context()
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(look, theirs), daemon=True)
        with signals_held():
            self.process.start()
        theirs.close()
        self.waiting: list[int] = []
        self.since = time.monotonic()

    def ask(self, numbers: Sequence[int]) -> None:
        """Hand out more work."""
        self.waiting = list(numbers)
        self.since = time.monotonic()
        if numbers:
            self.connection.send(self.waiting)

    def end(self) -> None:
        """Make it leave."""
        self.connection.close()
        self.process.kill()
        self.process.join()


def look_at_all(
    look: Callable[[int], Answer],
    count: int,
    *,
    workers: int,
    timeout: float,
    failed: Callable[[int, str], Answer],
) -> Iterator[Answer]:
    """``look(0)`` to ``look(count - 1)``, in any order, by several processes.

    Args:
        look: Runs in a worker; must not raise.
        count: How many numbers there are.
        workers: Processes; 0: none, and nothing that dies is caught.
        timeout: Seconds for one number.
        failed: The answer for a number whose process died or took too long, and why.
    """
    if workers == 0:
        yield from map(look, range(count))
        return
    rest = (range(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK))
    crew: list[_Worker[Answer]] = []
    try:
        for _ in range(min(workers, -(-count // _CHUNK))):
            crew.append(_Worker(look))
            crew[-1].ask(next(rest, ()))
        while any(worker.waiting for worker in crew):
            ready = wait([worker.connection for worker in crew if worker.waiting], timeout=min(1.0, timeout))
            for position, worker in enumerate(crew):
                reason = None
                if worker.connection in ready:
                    try:
                        yield worker.connection.recv()
                        worker.waiting.pop(0)
                        worker.since = time.monotonic()
                    except (EOFError, OSError):
                        worker.process.join()
                        code = worker.process.exitcode or 0
                        end = (
                            f"was killed by {signal.Signals(-code).name}" if code < 0 else f"died with exit code {code}"
                        )
                        reason = f"the process that decoded it {end}"
                elif worker.waiting and time.monotonic() - worker.since > timeout:
                    reason = f"not decoded after {timeout:g} s"
                if reason:
                    culprit, *others = worker.waiting
                    worker.end()
                    yield failed(culprit, reason)
                    crew[position] = worker = _Worker(look)
                    worker.ask(others)
                if not worker.waiting:
                    worker.ask(next(rest, ()))
    finally:
        for worker in crew:
            worker.end()


def _serve(look: Callable[[int], Answer], connection: Connection) -> None:
    """The worker: answers one by one, so that the first without an answer is the one that killed it."""
    import torch

    ignore_in_worker(0)
    torch.set_num_threads(1)
    while True:
        try:
            numbers = connection.recv()
        except (EOFError, OSError):  # the parent is gone
            return
        for number in numbers:
            connection.send(look(number))
