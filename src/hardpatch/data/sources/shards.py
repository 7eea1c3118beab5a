"""Shards: files that hold many images each. On the disk they are read in place; from far away they come as a whole.

A shard from far away lies in the folder of downloads while it is used (:mod:`hardpatch.data.sources.downloads`). What
is in it is found once and kept there, so that a set larger than the disk can be numbered too: from an ``index.json``
beside the shards, which ``hardpatch data pack`` writes, or by going through all of them once.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from hardpatch.data.images.decode import Decoder, Sample
from hardpatch.data.sources.base import Source
from hardpatch.data.sources.compact import Labels
from hardpatch.data.sources.shard_index import COMPRESSED, DamagedShardError, ShardIndex, index_tar, unpack
from hardpatch.runtime.errors import InputError


class Shard(ABC):
    """One file with many images."""

    name: str
    """What to call it: its path or URL."""

    @property
    @abstractmethod
    def num_images(self) -> int:
        """Images in it."""

    @abstractmethod
    def index(self) -> ShardIndex:
        """What lies where in it."""

    @abstractmethod
    def known_index(self) -> ShardIndex | None:
        """:meth:`index` if that takes no fetching."""

    @abstractmethod
    def read(self, offset: int, size: int) -> bytes:
        """Some bytes of it."""


class LocalShard(Shard):
    """A tar file on the disk; a compressed one is unpacked into memory.

    Args:
        path: Where.
        field: What to call the argument in a message.

    Raises:
        InputError: It cannot be read to its end.
    """

    def __init__(self, path: Path, *, field: str = "data") -> None:
        self.name = str(path)
        self._unpacked: bytes | None = None
        try:
            if self.name.endswith(COMPRESSED):
                plain = io.BytesIO()
                unpack(path, plain)
                self._unpacked = plain.getvalue()
                self._index = index_tar(io.BytesIO(self._unpacked))
            else:
                with path.open("rb") as file:
                    self._index = index_tar(file)
        except (OSError, DamagedShardError) as error:
            raise InputError(f"{field}: cannot read the shard {path}: {error}") from error

    @property
    def num_images(self) -> int:
        """Images in it."""
        return len(self._index.offsets)

    def index(self) -> ShardIndex:
        """What lies where in it."""
        return self._index

    def known_index(self) -> ShardIndex:
        """What lies where in it."""
        return self._index

    def read(self, offset: int, size: int) -> bytes:
        """Some bytes of it."""
        if self._unpacked is not None:
            return self._unpacked[offset : offset + size]
        with open(self.name, "rb") as file:  # noqa: PTH123  (a Path takes longer to make)
            return os.pread(file.fileno(), size, offset)


class ShardSource(Source):
    """Images of many shards: WebDataset, or parquet files with images inside.

    Args:
        shards: Of which the images are numbered one after another.
        decoder: How they are read.
    """

    def __init__(self, shards: Sequence[Shard], *, decoder: Decoder) -> None:
        self.shards = shards
        self.decoder: Decoder = decoder
        self._starts = np.cumsum([0, *(shard.num_images for shard in shards)])
        self._labels: Labels | None = None
        indexes = [shard.known_index() for shard in shards]
        if known := [index for index in indexes if index is not None and len(index.labels)]:
            labels = Labels.join([index.labels for index in known])
            if len(labels) == len(self):
                self._labels = self._only_complete(labels)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, index: int) -> tuple[Shard, int]:
        """Shard of an image and its number there."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.shards[number], index - int(self._starts[number])

    def read(self, index: int) -> Sample:
        """Read and decode one member."""
        return self.decoder(self.content(index))

    def content(self, index: int) -> bytes:
        """The member's bytes."""
        shard, position = self._find(index)
        members = shard.index()
        return shard.read(int(members.offsets[position]), int(members.sizes[position]))

    def num_bytes(self, index: int) -> int | None:
        """Of the member, where it is known what the shard holds."""
        shard, position = self._find(index)
        members = shard.known_index()
        return None if members is None else int(members.sizes[position])

    def name(self, index: int) -> str:
        """Shard and key."""
        shard, position = self._find(index)
        members = shard.known_index()
        return f"{shard.name}:{position if members is None else members.keys[position]}"

    def names(self) -> Iterator[str]:
        """Shards and keys."""
        for shard in self.shards:
            members = shard.known_index()
            for key in range(shard.num_images) if members is None else members.keys:
                yield f"{shard.name}:{key}"

    def left_out(self) -> str:
        """Members of the shards that are called images and cannot be read; nothing where there are none."""
        indexes = ((shard, index) for shard in self.shards if (index := shard.known_index()) is not None)
        members = [f"{shard.name}:{member}" for shard, index in indexes for member in index.left_out]
        some = ", ".join(members[:3]) + (", ..." if len(members) > 3 else "")
        return (
            f"{len(members):,} members are links to what is not in their archive and left out: {some}" if some else ""
        )

    @property
    def labels(self) -> Sequence[str] | None:
        """Content of the ``.cls`` members, if every image has one."""
        return self._labels
