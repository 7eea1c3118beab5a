"""Shards that lie in the folder of downloads while they are used: from far away, or parquet files with images inside.

Where all of them fit, they are fetched before anything else, and the set is as one on the disk. Where they do not, the
set is numbered (from an ``index.json`` beside the shards, the ends of parquet files, or by going through all shards
once) and read in windows of shards: those of one window lie in the folder, the next are fetched meanwhile.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from hardpatch.data.images.decode import Decoder
from hardpatch.data.sources import remote
from hardpatch.data.sources.base import Blocks
from hardpatch.data.sources.downloads import Downloads
from hardpatch.data.sources.parquet import index_parquet
from hardpatch.data.sources.remote import UnreachableError
from hardpatch.data.sources.shard_index import COMPRESSED, DamagedShardError, ShardIndex, index_tar, unpack
from hardpatch.data.sources.shards import Shard, ShardSource
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import tracked

_THREADS = 8
"""Shards that are fetched at the same time."""

_FEW = 8
"""So many shards are looked at for statistics of a set that the disk cannot hold."""

_FORM = "2"
"""Of what is kept, index and labels: another one is fetched anew rather than misread."""

SIDECAR = "index.json"
"""Beside the shards: ``{"shards": [{"name", "samples", "bytes"}, ...]}``."""

Item = TypeVar("Item")
Made = TypeVar("Made")


class Listed(NamedTuple):
    """What is known of a shard before it is fetched."""

    url: str
    size: int | None
    """Bytes."""
    version: str
    """Changes with its content."""
    num_images: int | None


class CachedShard(Shard):
    """A shard that lies in the folder of downloads while it is used.

    A compressed tar is kept unpacked, and of a parquet file only the images are kept, one after another: whatever
    it was, an image is read in place.

    Args:
        listed: What is known of it.
        downloads: The folder.
        field: What to call the argument in a message.
    """

    def __init__(self, listed: Listed, downloads: Downloads, *, field: str) -> None:
        self.name = listed.url
        self.listed = listed
        self.downloads = downloads
        self.field = field
        self._file = remote.ending(listed.url)
        self.key = downloads.key(_FORM, listed.url, str(listed.size), listed.version)
        self._index: ShardIndex | None = None

    @property
    def size(self) -> int:
        """Bytes that it takes on the disk, nearly: a compressed one is larger than it was."""
        if self.listed.size is not None:
            return self.listed.size
        index = self.index()
        return int((index.offsets + index.sizes).max(initial=0))

    @property
    def num_images(self) -> int:
        """Images in it."""
        return len(self.index().offsets) if self.listed.num_images is None else self.listed.num_images

    def index(self) -> ShardIndex:
        """What lies where in it; it is fetched where that is not known."""
        if self._index is None:
            if not (file := self.downloads.index_path(self.key)).exists():
                self.fetch()
            self._index = self._checked(ShardIndex.load(file))
        return self._index

    def known_index(self) -> ShardIndex | None:
        """:meth:`index`, unless it would have to be fetched."""
        known = self._index is not None or self.downloads.index_path(self.key).exists()
        return self.index() if known else None

    def _checked(self, index: ShardIndex) -> ShardIndex:
        if self.listed.num_images not in (None, len(index.offsets)):
            raise InputError(
                f"{self.field}: {self.name} holds {len(index.offsets)} images and {SIDECAR} says "
                f"{self.listed.num_images}; write it anew"
            )
        return index

    def read(self, offset: int, size: int) -> bytes:
        """Some bytes of it; it is fetched where it is not there (any more)."""
        descriptor = self.downloads.open(self.key, self._fill, size=self.listed.size or 0)
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def fetch(self) -> None:
        """Make sure that it lies in the folder, and its index too.

        Raises:
            InputError: It cannot be had, or is damaged.
        """
        self.downloads.ensure(self.key, self._fill, size=self.listed.size or 0)
        if not self.downloads.index_path(self.key).exists():  # removed by hand
            self.downloads.path(self.key).unlink(missing_ok=True)
            self.downloads.ensure(self.key, self._fill, size=self.listed.size or 0)

    def _fill(self, file: Path) -> None:
        """Fetch it to a path, in the form in which it is read, and keep its index."""
        raw = file.with_suffix(".raw.part") if remote.is_url(self.name) else Path(self.name)
        try:
            if remote.is_url(self.name):
                remote.download(self.name, raw, size=self.listed.size)
            if self._file.endswith(COMPRESSED):
                with file.open("w+b") as plain:
                    unpack(raw, plain)
                    plain.seek(0)
                    index = index_tar(plain)
            elif self._file.endswith(".parquet"):
                with file.open("wb") as images:
                    index = index_parquet(raw, images, folder=None if remote.is_url(self.name) else raw.parent)
            else:
                with raw.open("rb") as plain:
                    index = index_tar(plain)
                raw.replace(file)
        except UnreachableError as error:
            raise InputError(f"{self.field}: cannot fetch the shard {error}") from error
        except DamagedShardError as error:
            raise InputError(f"{self.field}: cannot read the shard {self.name}: {error}") from error
        finally:
            if remote.is_url(self.name):
                raw.unlink(missing_ok=True)
        self.downloads.save_index(self.key, index.save)


class FarShardSource(ShardSource):
    """Shards of which the disk holds a window at a time.

    Args:
        shards: Of which the images are numbered one after another.
        decoder: How they are read.
        together: Shards of a window.
    """

    def __init__(self, shards: Sequence[CachedShard], *, decoder: Decoder, together: int) -> None:
        super().__init__(shards, decoder=decoder)
        self.far = shards
        self.together = together

    def blocks(self) -> Blocks:
        """The shards."""
        return Blocks(tuple(shard.num_images for shard in self.far), self.together)

    def prepare(self, blocks: Iterable[int]) -> None:
        """Fetch shards."""
        _in_threads(CachedShard.fetch, [self.far[number] for number in blocks], "fetching shards", quiet=True)

    def spread(self, count: int) -> list[int]:
        """Images of a few shards only, spread over the set."""
        few = np.unique(np.linspace(0, len(self.far) - 1, _FEW).astype(int))
        starts, sizes = np.cumsum([0, *self.blocks().sizes]), self.blocks().sizes
        each = max(1, count // len(few))
        chosen = [starts[b] + np.linspace(0, sizes[b] - 1, min(sizes[b], each)).astype(int) for b in few if sizes[b]]
        return [int(index) for index in np.concatenate(chosen)][:count]

    def outline(self) -> Iterator[str]:
        """File name, bytes and images of every shard."""
        return (f"{remote.ending(shard.name)} {shard.size} {shard.num_images}" for shard in self.far)


def open_shards(urls: Sequence[str], *, decoder: Decoder, downloads: Downloads, field: str) -> ShardSource:
    """Shards that go through the folder of downloads.

    Args:
        urls: Of tar or parquet files; paths of parquet files too.
        decoder: How the images are read.
        downloads: The folder.
        field: What to call the argument in a message.

    Raises:
        InputError: A shard cannot be had or is damaged, or the folder is too small for two of them.
    """
    try:
        listed = _list([url if remote.is_url(url) else str(Path(url).absolute()) for url in urls], field)
    except UnreachableError as error:
        raise InputError(f"{field}: cannot reach {error}") from error
    shards = [CachedShard(each, downloads, field=field) for each in listed]
    unknown = [shard for shard in shards if shard.listed.num_images is None or shard.listed.size is None]
    if sum(shard.listed.size or 0 for shard in shards) <= downloads.max_bytes:
        _in_threads(CachedShard.fetch, shards, "fetching shards")
    else:
        unknown = [shard for shard in unknown if shard.known_index() is None]
        _in_threads(CachedShard.index, unknown, "going through the shards, once")
    if sum(shard.size for shard in shards) <= downloads.max_bytes:
        return ShardSource(shards, decoder=decoder)
    largest = max(shard.size for shard in shards)
    together = downloads.max_bytes // (2 * largest)
    if not together:
        raise InputError(
            f"download_gigabytes: must hold two shards, the largest of {largest / 1e9:.3g} GB, or all of the "
            f"{sum(shard.size for shard in shards) / 1e9:.3g} GB; got {downloads.max_bytes / 1e9:g}"
        )
    return FarShardSource(shards, decoder=decoder, together=together)


def _list(urls: Sequence[str], field: str) -> list[Listed]:
    """What is known of shards without fetching them; every shard has one name, a URL or an absolute path."""
    listed: dict[str, Listed] = {}
    first = _describe(urls[0])  # so that what is wrong with all of them is said of what the user named
    for folder in sorted({remote.folder(url) for url in urls if remote.is_url(url)}):
        listed |= _read_sidecar(folder, field)
    missing = [url for url in urls if url not in listed]
    if (promised := listed.get(urls[0], first)).size not in (None, first.size or promised.size):
        raise InputError(f"{field}: {urls[0]} has {first.size} bytes and {SIDECAR} says {promised.size}; write it anew")
    found = _in_threads(_describe, missing, "looking at the shards")
    listed |= dict(zip(missing, found, strict=True))  # by the words that name them
    return [listed[url] for url in urls]


def _describe(url: str) -> Listed:
    if not remote.is_url(url):
        status = Path(url).stat()
        return Listed(url, status.st_size, str(status.st_mtime_ns), None)
    about = remote.describe(url)
    footer = remote.parquet_footer(url) if remote.ending(url).endswith(".parquet") else None
    return Listed(url, about.size, about.version, None if footer is None else footer[1])


def _read_sidecar(folder: str, field: str) -> dict[str, Listed]:
    """What ``index.json`` says of the shards of a folder; nothing where there is none.

    Raises:
        InputError: It cannot be understood.
    """
    url = remote.join(folder, SIDECAR)
    try:
        content = remote.fetch(url)
    except remote.RefusedError:  # not there; object stores that may not be listed say: not allowed
        return {}
    try:
        listed = [
            Listed(remote.join(folder, str(row["name"])), int(row["bytes"]), "", int(row["samples"]))
            for row in json.loads(content)["shards"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{field}: {url} must be {{"shards": [{{"name", "samples", "bytes"}}, ...]}}, got {type(error).__name__}: '
            f"{error}"
        ) from error
    return {each.url: each for each in listed}


def _in_threads(work: Callable[[Item], Made], items: Sequence[Item], what: str, *, quiet: bool = False) -> list[Made]:
    """Do it to all, several at a time, with a bar; the first error ends it."""
    if not items:
        return []
    with ThreadPoolExecutor(min(_THREADS, len(items))) as pool:
        done: Iterable[Made] = pool.map(work, items)
        try:
            return list(done if quiet else tracked(done, what, total=len(items)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
