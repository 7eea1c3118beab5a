"""Which image every data worker is reading, so that one that dies is named with it."""

from __future__ import annotations

import multiprocessing
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset, get_worker_info

from hardpatch.data.loader.processes import shortage
from hardpatch.runtime.errors import InputError

Item = TypeVar("Item", covariant=True)

LOADER_ERRORS = (RuntimeError, ConnectionError, EOFError)
"""What reaches the main process when a worker dies: PyTorch's own word, or a connection that breaks while a batch is
handed over."""


class LastRead(Dataset[Item]):
    """Images that are asked for by (pass, index), with a note, in memory that all processes share, of the last one.

    Args:
        images: What is read.
        workers: How many processes read it.
    """

    def __init__(self, images: Dataset[Item], workers: int) -> None:
        self.images = images
        self._notes = torch.full((max(1, workers), 2), -1, dtype=torch.int64).share_memory_()

    def __getitem__(self, key: Any) -> Item:
        self.note(key[1])
        return self.images[key]

    def __getitems__(self, keys: list[Any]) -> list[Item]:
        many = getattr(self.images, "__getitems__", None)  # images that offer this note each themselves
        return [self[key] for key in keys] if many is None else many(keys)

    def note(self, index: int) -> None:
        """This process begins to read an image."""
        worker = get_worker_info()
        if worker is not None:
            self._notes[worker.id] = torch.tensor((os.getpid(), index))

    @contextmanager
    def naming(self) -> Iterator[None]:
        """While entered, a worker that dies is named: PyTorch says so wherever the main process happens to be.

        Raises:
            InputError: With the image that it was reading.
        """
        try:
            yield
        except LOADER_ERRORS as error:
            if (told := self.explained(error)) is error:
                raise
            raise told from error

    def _no_longer_running(self) -> set[int]:
        """The workers that have ended, or do so within two seconds: a connection breaks before its process is gone."""
        noted = {pid for pid in self._notes[:, 0].tolist() if pid > 0}
        until = time.monotonic() + 2
        while not (ended := noted - {child.pid for child in multiprocessing.active_children()}):
            if time.monotonic() > until:
                break
            time.sleep(0.01)
        return ended

    def explained(self, error: Exception) -> Exception:
        """What to raise in place of the loader's error: if a worker died, with the image that it was reading."""
        found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
        if found is not None:
            dead = {int(number) for number in re.findall(r"\d+", found[1])}
        elif isinstance(error, (ConnectionError, EOFError)):
            try:
                dead = self._no_longer_running()
            except RuntimeError as told:  # by the loader's signal handler, which noticed the death meanwhile
                return self.explained(told)
        else:
            dead = set()
        if not dead:
            return error
        numbers = [index for pid, index in self._notes.tolist() if pid in dead and index >= 0]
        source = getattr(self.images, "source", None)
        names = [f"#{number}" if source is None else source.name(number) for number in numbers]
        killed = re.search(r"killed by signal: ([^.]+)", f"{error} {error.__cause__} {error.__context__}")
        cause = killed[1] if killed else "exited unexpectedly"
        if "Bus error" in cause:  # how the system says that shared memory is full; no image does that
            return shortage()
        return InputError(
            f"data: a data worker died ({cause}) while it read {', '.join(names) or 'its first image'}; look at it "
            "with hardpatch data check, and leave it out if it is damaged "
            "(if many workers die, memory is short: --workers)"
        )
