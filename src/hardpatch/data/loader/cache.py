"""Decoded images in memory that all processes of a machine share: filled on first use, read by later epochs.

A cache never changes what is learnt: it holds images at full size, as they were decoded, and leaves out those that are
decoded at a fraction of their size without it (:mod:`hardpatch.data.images.jpeg`).
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import tempfile
from contextlib import suppress
from typing import Literal, NamedTuple

import numpy as np
import torch

from hardpatch.data.images.decode import DecodeError, Sample
from hardpatch.data.images.jpeg import choose_scale
from hardpatch.data.sources import Source
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import say
from hardpatch.runtime.machine import free_memory

SHARE_OF_MEMORY = 0.5
"""``auto`` takes at most this share of the free memory."""

_ALIGNMENT = 64
_FIELDS = 5
"""Of an image in the table: 1 + offset (0: not there), height, width, channels, and the sum of the flags below."""
_IS_FLOAT, _HAS_VALID = 1, 2


class SharedImages:
    """Room for the decoded images of a source. Forked and spawned data processes, and other training processes of the
    machine, use the same.

    Args:
        num_images: Of the source.
        capacity: Bytes for pixels; memory is taken only as images come in. What does not fit is not kept.
        path: Of a room that another process made; None makes one.
    """

    def __init__(self, num_images: int, capacity: int, *, path: str | None = None) -> None:
        self.num_images, self.capacity = num_images, capacity
        table = 8 * (1 + num_images * _FIELDS)
        self._first = math.ceil(table / _ALIGNMENT) * _ALIGNMENT
        if path is None:
            self._file, self.path = _new_file()
            os.ftruncate(self._file, self._first + capacity)
        else:
            self._file, self.path = os.open(path, os.O_RDWR), path
        self._memory = mmap.mmap(self._file, self._first + capacity)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # where the system has them: fewer, larger pages
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        words = np.frombuffer(self._memory, np.int64, table // 8)
        self._used, self._table = words[:1], words[1:].reshape(num_images, _FIELDS)

    def __reduce__(self) -> tuple[type[SharedImages], tuple[int, int], dict[str, str]]:
        return _reopen, (self.num_images, self.capacity, self.path)  # type: ignore[return-value]

    def get(self, index: int) -> Sample | None:
        """An image, or None where it is not there (yet). Its pixels lie interleaved, the quick layout to resize."""
        place, height, width, channels, flags = self._table[index].tolist()
        if not place:
            return None
        offset = self._first + place - 1
        dtype = torch.float32 if flags & _IS_FLOAT else torch.uint8
        count = height * width * channels
        pixels = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset)
        valid = None
        if flags & _HAS_VALID:
            offset += count * dtype.itemsize
            valid = torch.frombuffer(self._memory, dtype=torch.bool, count=height * width, offset=offset)
            valid = valid.view(height, width)
        return Sample(pixels.view(height, width, channels).permute(2, 0, 1), None, valid)

    def put(self, index: int, sample: Sample) -> None:
        """Keep an image, if there is room for it."""
        image = sample.image
        channels, height, width = image.shape
        parts = [image.permute(1, 2, 0).contiguous().numpy().reshape(-1).view(np.uint8)]
        flags = _IS_FLOAT if image.is_floating_point() else 0
        if sample.valid is not None:
            parts.append(sample.valid.contiguous().numpy().reshape(-1).view(np.uint8))
            flags |= _HAS_VALID
        size = sum(part.size for part in parts)
        place = self._reserve(math.ceil(size / _ALIGNMENT) * _ALIGNMENT)
        if place is None:
            return
        offset = self._first + place
        for part in parts:
            np.frombuffer(self._memory, np.uint8, part.size, offset)[:] = part
            offset += part.size
        entry = self._table[index]
        entry[1:] = height, width, channels, flags
        entry[0] = 1 + place  # last: from now on it is read

    def _reserve(self, size: int) -> int | None:
        """Where the next ``size`` bytes may be written; two processes never get the same."""
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            place = int(self._used[0])
            if place + size > self.capacity:
                return None
            self._used[0] = place + size
            return place
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)


def _reopen(num_images: int, capacity: int, path: str) -> SharedImages:
    return SharedImages(num_images, capacity, path=path)


def _new_file() -> tuple[int, str]:
    """A file in memory that is gone with its last user (Linux), or a temporary one that the system pages."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("hpm-cache")
        return file, f"/proc/{os.getpid()}/fd/{file}"
    named = tempfile.NamedTemporaryFile(prefix="hpm-cache-")  # noqa: SIM115  (deleted when the process ends)
    _TEMPORARY.append(named)
    return named.fileno(), named.name


_TEMPORARY: list[object] = []


class Need(NamedTuple):
    """What a cache of a source would take."""

    bytes: int
    """Estimated, of all images that would be kept."""
    kept: float
    """Share of the images that would be kept: the others are large JPEGs, decoded at a fraction of their size."""
    largest: int
    """Bytes of the largest of those looked at."""


def estimate(source: Source, *, size: tuple[int, int], jpeg_scaling: bool, num_read: int = 64) -> Need:
    """What a cache would take, from images spread over the source.

    Args:
        source: The images.
        size: Height and width of the crops, pixels.
        jpeg_scaling: Are large JPEGs decoded at a fraction of their size?
        num_read: How many images to look at, at most.
    """
    sizes, looked = [], 0
    for index in source.spread(num_read):
        try:
            sample = source.read(index)
        except (DecodeError, OSError):
            continue
        looked += 1
        is_jpeg = source.decoder is not None and source.content(index).startswith(b"\xff\xd8")
        if not (jpeg_scaling and is_jpeg and is_scalable(sample, size)):
            pixels = sample.image.numel() * sample.image.element_size()
            sizes.append(pixels + (0 if sample.valid is None else sample.valid.numel()) + _ALIGNMENT)
    if not sizes:
        return Need(0, 0.0, 0)
    kept = len(sizes) / looked
    return Need(round(sum(sizes) / len(sizes) * kept * len(source)), kept, max(sizes))


def is_scalable(sample: Sample, size: tuple[int, int]) -> bool:
    """Could a crop of this image be large enough to be decoded at a fraction?"""
    return choose_scale((sample.image.shape[1], sample.image.shape[2]), size) > 1


def open_cache(
    source: Source, cache: Literal["auto", "ram", "device", "none"], *, size: tuple[int, int], jpeg_scaling: bool
) -> SharedImages | None:
    """A cache in RAM, where it is asked for, or fits and pays.

    Every process has to ask; those of one machine get the same.

    Args:
        source: The images.
        cache: Of the run; nothing is made for "device".
        size: Height and width of the crops, pixels.
        jpeg_scaling: Are large JPEGs decoded at a fraction of their size?

    Raises:
        InputError: The decoded images do not fit into the memory that is free.
    """
    if cache in ("none", "device"):
        return None
    need, free = estimate(source, size=size, jpeg_scaling=jpeg_scaling), free_memory()
    if cache == "ram" and need.bytes > 0.9 * free:
        raise InputError(
            f"cache: the decoded images take about {need.bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "hardpatch data pack makes them smaller, or give --cache auto"
        )
    if cache == "ram" and need.kept < 1:
        say(
            f"cache: {1 - need.kept:.0%} of the images are large JPEGs that are decoded at a fraction of their size "
            f"and so not kept; hardpatch data pack with a --size below {2 * min(size)} makes them smaller once, "
            "--no-jpeg-scaling keeps them whole"
        )
    fits = need.kept > 0 and need.bytes <= SHARE_OF_MEMORY * free
    wanted = distributed.any_process(cache == "ram" and need.kept > 0) or not distributed.any_process(not fits)
    if not wanted:
        return None
    limit = SHARE_OF_MEMORY * free if cache == "auto" else 0.9 * free
    capacity = int(min(limit, 1.5 * need.bytes + 16 * need.largest + 2**20))
    return _one_for_the_machine(len(source), capacity)


def _one_for_the_machine(num_images: int, capacity: int) -> SharedImages:
    """The first training process of each machine makes the room, the others open it."""
    if distributed.world_size() == 1:
        return SharedImages(num_images, capacity)
    machine = os.uname().nodename
    leads = int(os.environ.get("LOCAL_RANK", "0")) == 0
    mine = SharedImages(num_images, capacity) if leads else None
    offers = distributed.gather_objects((machine, capacity, mine.path) if mine is not None else None)
    if mine is None:
        there = [offer for offer in offers if offer is not None and offer[0] == machine]
        try:
            mine = SharedImages(num_images, there[0][1], path=there[0][2])
        except (IndexError, OSError):  # another container on the same machine
            mine = SharedImages(num_images, capacity)
    distributed.barrier()
    return mine
