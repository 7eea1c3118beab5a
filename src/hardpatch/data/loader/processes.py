"""Data processes, and the shared memory through which their batches come.

On Linux that is ``/dev/shm``. Containers have 64 MB of it by default, less than two batches of 256 images. PyTorch
notices too late that it is full: a thread of the data process drops the batch, and the main process waits for ever.
So it is looked at before the processes start, fewer batches are made ahead where it is small, and batches are moved
into it where an error still reaches the main process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import say
from hardpatch.runtime.signals import ignore_in_worker, signals_held

Item = TypeVar("Item")
Stacked = TypeVar("Stacked")

FOLDER = Path("/dev/shm")

_PLENTY = 2**30
"""With so much per training process nobody measures a batch first."""

_HELD = 2
"""Batches that the main process still holds, or copies, while the next ones are made."""


def batches_of(
    images: Dataset[Item],
    order: Iterable[Any],
    *,
    collate: Callable[[list[Item]], Stacked],
    workers: int,
    pin_memory: bool = False,
    ahead: int = 2,
) -> Generator[Stacked, None, None]:
    """Start data processes; what they make of each list of keys comes in order.

    Args:
        images: What is read.
        order: Lists of keys, one per batch.
        collate: Makes a batch.
        workers: Data processes; fewer where shared memory is small, which is said.
        pin_memory: For a device that copies from pinned memory.
        ahead: Batches that each process makes ahead, at most.

    Raises:
        InputError: Shared memory is full, or what a data process says.
    """
    free = free_shared_memory()
    if workers and free is not None and free < _PLENTY:
        workers, ahead = _fitting(_one(images, order, collate), free, workers, ahead)
    loader = DataLoader(
        images,
        batch_sampler=order,
        collate_fn=IntoSharedMemory(collate) if workers else collate,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=ahead if workers else None,
        worker_init_fn=ignore_in_worker,
    )
    try:
        with signals_held():
            batches = iter(loader)
    except (OSError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        raise shortage() from error
    return _in_plain_words(batches)


def _in_plain_words(batches: Iterator[Stacked]) -> Generator[Stacked, None, None]:
    """The batches; a data process's error comes with its traceback in front, which says nothing to a user."""
    try:
        yield from batches
        return
    except InputError as error:
        problem = InputError(str(error).rpartition("InputError: ")[2].strip())
        error.__traceback__ = None  # it holds on to the workers; collected as garbage, they keep torch waiting for 10 s
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        problem = shortage()
        error.__traceback__ = None
    finally:
        del batches
    raise problem


def free_shared_memory() -> int | None:
    """Bytes of shared memory for the batches of this process; None where they do not go through ``/dev/shm``."""
    try:
        about = os.statvfs(FOLDER)
    except OSError:
        return None
    return about.f_bavail * about.f_frsize // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_shortage(error: BaseException) -> bool:
    """Is this what PyTorch or the system says when shared memory is full?"""
    text = f"{error} {error.__cause__ or ''} {error.__context__ or ''}"
    return "No space left on device" in text or "shared memory" in text or "Bus error" in text


def shortage() -> InputError:
    """What to do where shared memory is full."""
    free, size = free_shared_memory() or 0, 0
    if FOLDER.is_dir():
        about = os.statvfs(FOLDER)
        size = about.f_blocks * about.f_frsize
    return InputError(
        f"workers: the shared memory that data processes hand their batches over in ({FOLDER}, {size / 1e6:,.0f} MB, "
        f"{free / 1e6:,.0f} MB free) is full; start the container with more (docker run --shm-size 8g), or give "
        "--workers 0"
    )


class IntoSharedMemory(Generic[Item, Stacked]):
    """Makes a batch and moves it into shared memory at once, as handing it over would do later.

    Args:
        collate: Makes the batch.
    """

    def __init__(self, collate: Callable[[list[Item]], Stacked]) -> None:
        self.collate = collate

    def __call__(self, items: list[Item]) -> Stacked:
        """What a data process hands over.

        Raises:
            InputError: Shared memory is full.
        """
        batch = self.collate(items)
        if get_worker_info() is not None:
            try:
                for tensor in tensors_in(batch):
                    if tensor.untyped_storage().nbytes():
                        tensor.share_memory_()
            except RuntimeError as error:
                if not is_shortage(error):
                    raise
                raise shortage() from None
        return batch


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """All tensors of a batch, in whatever tuples, lists and mappings they lie."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, list | tuple):
        for item in batch:
            yield from tensors_in(item)
    elif isinstance(batch, Mapping):
        yield from tensors_in(list(batch.values()))


def _one(images: Dataset[Item], order: Iterable[Any], collate: Callable[[list[Item]], Stacked]) -> int:
    """Bytes of the first batch in shared memory; 0 where there is none."""
    keys = next(iter(order), None)
    if keys is None:
        return 0
    many = getattr(images, "__getitems__", None)
    batch = collate([images[key] for key in keys] if many is None else many(keys))
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors_in(batch))


def _fitting(batch_bytes: int, free: int, workers: int, ahead: int) -> tuple[int, int]:
    """So many data processes, and batches ahead for each, that all batches fit that are there at a time."""
    fit = workers * ahead if not batch_bytes else max(0, int(0.9 * free / batch_bytes) - _HELD)
    if fit >= workers * ahead:
        return workers, ahead
    fewer = (min(workers, fit), max(1, fit // workers)) if fit else (0, ahead)
    made = f"{fewer[0]} data processes with {fewer[1]} batches ahead each" if fit else "no data processes"
    say(
        f"workers: {made} instead of {workers} with {ahead}: a batch takes {batch_bytes / 1e6:,.1f} MB and {FOLDER} "
        f"has {free / 1e6:,.0f} MB free; a container gets more by docker run --shm-size 8g"
    )
    return fewer
