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
    rest = iter(range(0, count, _CHUNK))
    crew: list[_Worker[Answer]] = []
    try:
        for _ in range(min(workers, -(-count // _CHUNK))):
            crew.append(_Worker(look))
            _next_chunk(crew[-1], rest, count)
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
                        reason = _cause(worker.process.exitcode)
                elif worker.waiting and time.monotonic() - worker.since > timeout:
                    reason = f"not decoded after {timeout:g} s"
                if reason:
                    culprit, *others = worker.waiting
                    worker.end()
                    yield failed(culprit, reason)
                    crew[position] = worker = _Worker(look)
                    worker.ask(others)
                if not worker.waiting:
                    _next_chunk(worker, rest, count)
    finally:
        for worker in crew:
            worker.end()


def _next_chunk(worker: _Worker[Answer], rest: Iterator[int], count: int) -> None:
    if (first := next(rest, None)) is not None:
        worker.ask(range(first, min(first + _CHUNK, count)))


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


def _cause(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"the process that decoded it was killed by {name}"
    return f"the process that decoded it died with exit code {exit_code}"
