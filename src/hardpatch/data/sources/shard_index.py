"""What lies where in a shard: found once, and kept in the folder of downloads where the shard came from far away."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hardpatch.data.images.decode import EXTENSIONS
from hardpatch.data.sources.compact import Labels, Strings
from hardpatch.runtime.text import as_bytes, as_text

COMPRESSED = (".tar.gz", ".tgz")
ARCHIVES = (".tar", *COMPRESSED)

_BEST_FIRST = (".jpg", ".jpeg", ".webp", ".png", ".tif", ".tiff")
"""Which member is the image where a key has several: photographs before what is laid beside them, such as masks."""


class DamagedShardError(Exception):
    """A shard that cannot be read to its end; the message is the reason."""


class ShardIndex(NamedTuple):
    """The images of one shard."""

    offsets: np.ndarray
    """Where each begins, bytes."""
    sizes: np.ndarray
    """Bytes of each."""
    keys: Strings
    labels: Labels
    """Negative codes where an image has none."""

    def save(self, file: Path) -> None:
        """Write it as an ``.npz``."""
        content, ends = self.keys.arrays()
        np.savez(
            file, offsets=self.offsets, sizes=self.sizes, keys=content, ends=ends,
            codes=self.labels.codes, classes=np.frombuffer(as_bytes("\0".join(self.labels.classes)), np.uint8),
            num_classes=len(self.labels.classes),
        )  # fmt: skip

    @classmethod
    def load(cls, file: Path) -> ShardIndex:
        """What :meth:`save` wrote."""
        with np.load(file, allow_pickle=False) as saved:
            names = as_text(saved["classes"].tobytes()).split("\0") if saved["num_classes"] else []
            keys = Strings.from_arrays(saved["keys"], saved["ends"])
            return cls(saved["offsets"], saved["sizes"], keys, Labels(saved["codes"], names))


class _Found(NamedTuple):
    key: str
    rank: int
    offset: int
    size: int


def index_tar(file: BufferedIOBase) -> ShardIndex:
    """List the images of a plain tar file: one per key, as WebDataset names its samples.

    A key is a member's path up to the first dot of its file name, the rest is its kind. Where a key has several
    images, the one of the best kind counts (``x.jpg`` before ``x.png`` before ``x.mask.png``); where it has only
    compound kinds (``photo.1.png``, ``photo.2.png``) each is an image.

    Raises:
        DamagedShardError: Cut off or damaged.
    """
    found: list[_Found] = []
    best: dict[str, int] = {}
    classes: dict[str, str] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in _members(archive):
                folder, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                key = f"{folder}/{stem}"
                if kind.lower() == "cls":
                    handle = archive.extractfile(member)
                    classes[key] = as_text(handle.read()).strip() if handle else ""
                    if "\0" in classes[key]:
                        raise tarfile.ReadError(f"the label {member.name} is no text")
                elif not stem.startswith("._") and f".{kind.lower().rpartition('.')[2]}" in EXTENSIONS:
                    rank = _rank(kind)
                    best[key] = min(rank, best.get(key, rank))
                    found.append(_Found(key, rank, member.offset_data, member.size))
            if any(_rest(archive)):
                raise tarfile.ReadError(f"damaged header at byte {archive.offset}")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DamagedShardError(str(error)) from error
    images = [image for image in found if image.rank == best[image.key]]
    return ShardIndex(
        np.array([image.offset for image in images], np.int64),
        np.array([image.size for image in images], np.int64),
        Strings(image.key.removeprefix("/") for image in images),
        Labels.of(classes.get(image.key) for image in images),
    )


def _rank(kind: str) -> int:
    """Smaller: rather the image of its key."""
    plain = f".{kind.lower()}"
    if plain in EXTENSIONS:
        return _BEST_FIRST.index(plain) if plain in _BEST_FIRST else len(_BEST_FIRST)
    return len(_BEST_FIRST) + 1


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of an archive, without keeping what was seen."""
    for member in archive:
        archive.members.clear()  # type: ignore[attr-defined]  # or a million members take a gigabyte
        if member.isfile():
            yield member


def _rest(archive: tarfile.TarFile) -> bytes:
    """The next block after the last member, zeros in a whole archive."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    return archive.fileobj.read(tarfile.BLOCKSIZE)


def unpack(shard: Path, file: BufferedIOBase) -> None:
    """Write the plain tar of a compressed one; its checksum is checked.

    Raises:
        DamagedShardError: Cut off or damaged.
    """
    try:
        with gzip.open(shard) as packed:
            while block := packed.read(1 << 20):
                file.write(block)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamagedShardError(str(error)) from error
