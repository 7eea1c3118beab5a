"""In which order images are learnt from, and which of them fall to a process.

The training order is a pure function of (seed, pass) and of how the source is laid out; which images a process sees at
a step follows from the step alone, so that a loader can start at any step.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from hardpatch.data.sources import Blocks
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.seeding import Stream, derive_seed
from hardpatch.runtime.signals import ignore_in_worker, signals_held


@dataclass(frozen=True)
class Position:
    """Which part of every global batch this process takes, and in how many micro-batches.

    Args:
        rank: Number of this process.
        world_size: Number of processes.
        num_micro_batches: Micro-batches of a step on each process.
    """

    rank: int = 0
    world_size: int = 1
    num_micro_batches: int = 1

    def slices(self, batch_size: int) -> list[slice]:
        """This process's micro-batches as slices of the global batch."""
        share = batch_size // self.world_size
        micro = share // self.num_micro_batches
        start = self.rank * share
        return [slice(start + i * micro, start + (i + 1) * micro) for i in range(self.num_micro_batches)]


class Window(NamedTuple):
    """Blocks that are shuffled together in a pass."""

    number: int
    """In the pass."""
    blocks: tuple[int, ...]
    start: int
    """Images of the pass before it."""
    end: int
    """Images of the pass up to its end."""


class TrainingOrder(Sampler[list[tuple[int, int]]]):
    """Micro-batches of (pass, index), from ``first_step`` to the end of the run.

    A pass goes through all images in a new order and leaves a last partial batch out; it is an epoch where every image
    has one view in a step. Where the images lie in blocks of which only some are at hand, a pass shuffles the blocks,
    takes so many of them at a time and shuffles the images of those; otherwise all images are shuffled at once.

    Args:
        num_images: Of the source.
        batch_size: Images of a step, over all processes.
        first_step: Where to start.
        total_steps: Where to end.
        seed: Of the order.
        position: Which part of a batch this process takes.
        blocks: What :meth:`hardpatch.data.sources.Source.blocks` says of the source.
    """

    def __init__(
        self,
        num_images: int,
        *,
        batch_size: int,
        first_step: int,
        total_steps: int,
        seed: int,
        position: Position,
        blocks: Blocks | None = None,
    ) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.first_step = first_step
        self.total_steps = total_steps
        self.seed = seed
        self.position = position
        self.blocks = blocks

    @property
    def steps_per_pass(self) -> int:
        """Whole batches of a pass."""
        return self.num_images // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        shuffled = lru_cache(maxsize=1)(self._shuffled)
        windows = lru_cache(maxsize=1)(self.windows)
        for step in range(self.first_step, self.total_steps):
            number, step_in_pass = divmod(step, self.steps_per_pass)
            start = step_in_pass * self.batch_size
            end = start + self.batch_size
            batch: list[int] = []
            for window in windows(number):
                if window.start < end and window.end > start:
                    images = shuffled(number, window)
                    batch += images[max(0, start - window.start) : end - window.start].tolist()
            for part in self.position.slices(self.batch_size):
                yield [(number, index) for index in batch[part]]

    def __len__(self) -> int:
        return (self.total_steps - self.first_step) * self.position.num_micro_batches

    def windows(self, number: int) -> list[Window]:
        """The windows of a pass in their order; all images in one where they do not lie in blocks."""
        if self.blocks is None:
            return [Window(0, (), 0, self.num_images)]
        order = torch.randperm(len(self.blocks.sizes), generator=self._generator(number)).tolist()
        windows: list[Window] = []
        start = 0
        for part in np.array_split(order, -(-len(order) // self.blocks.together)):  # of nearly equal size
            end = start + sum(self.blocks.sizes[block] for block in part)
            windows.append(Window(len(windows), tuple(int(block) for block in part), start, end))
            start = end
        return windows

    def _shuffled(self, number: int, window: Window) -> Tensor:
        """The images of a window of a pass in the order in which they come."""
        if self.blocks is None:
            return torch.randperm(self.num_images, generator=self._generator(number))
        ends = np.cumsum(self.blocks.sizes)
        parts = [torch.arange(int(ends[b]) - self.blocks.sizes[b], int(ends[b])) for b in window.blocks]
        images = torch.cat(parts)
        return images[torch.randperm(len(images), generator=self._generator(number, 1 + window.number))]

    def _generator(self, *place: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, Stream.ORDER, *place))


class Ahead:
    """While entered, a process of its own fetches the blocks of the current window and of the next one.

    A process, not a thread: connections live in threads, and a training process forks now and then.

    Args:
        order: Of the images.
        prepare: Fetches blocks.
    """

    def __init__(self, order: TrainingOrder, prepare: Callable[[Sequence[int]], None]) -> None:
        self.order = order
        self.prepare = prepare
        self._windows = lru_cache(maxsize=2)(order.windows)
        self._asked = (-1, -1)
        self._ask: Connection | None = None
        self._process: BaseProcess | None = None

    def __enter__(self) -> Ahead:
        if self.order.blocks is not None:
            hear, self._ask = multiprocessing.Pipe(duplex=False)
            self._process = multiprocessing.Process(target=_fetch, args=(hear, self.prepare), daemon=True)
            with signals_held():
                self._process.start()
            hear.close()
            self.reached(0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._ask is not None:
            self._process.kill()  # what it holds is let go of, and what it has written is not taken for whole
            self._process.join()
            self._process.close()
            self._ask.close()

    def reached(self, micro_batch: int) -> None:
        """So many micro-batches are done: are we in another window?"""
        if self._ask is None:
            return
        step = self.order.first_step + micro_batch // self.order.position.num_micro_batches
        if step >= self.order.total_steps:
            return
        number, step_in_pass = divmod(step, self.order.steps_per_pass)
        image = step_in_pass * self.order.batch_size
        here = next(window for window in self._windows(number) if window.end > image)
        if (number, here.number) != self._asked:
            self._asked = number, here.number
            self._ask.send(here.blocks)
            self._ask.send(self._after(number, here).blocks)

    def _after(self, number: int, window: Window) -> Window:
        """The next window; the last one's own where the run ends with it."""
        if window.number + 1 < len(self._windows(number)):
            return self._windows(number)[window.number + 1]
        is_last = (number + 1) * self.order.steps_per_pass >= self.order.total_steps
        return window if is_last else self._windows(number + 1)[0]


def _fetch(hear: Connection, prepare: Callable[[Sequence[int]], None]) -> None:
    """Of the process: fetch what is asked for, as long as the training process lives."""
    ignore_in_worker(0)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    while parent is not None and parent.is_alive():
        if hear.poll(5):
            with suppress(InputError):  # whoever needs one of the blocks will say so
                prepare(hear.recv())
