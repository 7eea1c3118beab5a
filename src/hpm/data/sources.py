"""Sources: what ``--data`` may name. Each is a numbered list of images that can be read in any order.

A numbered list is all that shuffling over the whole set, splitting over processes and resuming in the middle of an
epoch need. Tar shards get one too: plain ``.tar`` files are indexed once and read in place; ``.tar.gz`` cannot be
read in place and is unpacked into memory.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from braceexpand import braceexpand

from hpm.data.decode import EXTENSIONS, RGB, Decoder, Sample
from hpm.data.shapes import CLASSES, LEVELS, make_shape
from hpm.errors import InputError


class Source(ABC):
    """A numbered list of images."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def read(self, index: int) -> Sample:
        """Read and decode one image.

        Raises:
            DecodeError: The image is damaged.
            OSError: It cannot be read at all.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call an image in a message or a table."""

    @abstractmethod
    def content(self, index: int) -> bytes:
        """What an image is made from: its bytes, not decoded.

        Raises:
            OSError: It cannot be read at all.
        """

    @property
    @abstractmethod
    def labels(self) -> Sequence[str] | None:
        """Class of every image, or None where the source has none."""

    def groups(self) -> Sequence[str] | None:
        """A name per image by which results may be split, or None."""
        return None


class FileSource(Source):
    """Image files of a folder, a list or a table.

    Args:
        paths: The files.
        decoder: How the files are read.
        labels: Class of every file, if known.
    """

    def __init__(self, paths: Sequence[Path], *, decoder: Decoder, labels: Sequence[str] | None = None) -> None:
        self.paths = paths
        self.decoder = decoder
        self._labels = labels

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Sample:
        """Read and decode one file."""
        return self.decoder(self.content(index))

    def content(self, index: int) -> bytes:
        """The file's bytes."""
        return self.paths[index].read_bytes()

    def name(self, index: int) -> str:
        """The path."""
        return str(self.paths[index])

    @property
    def labels(self) -> Sequence[str] | None:
        """Class of every file."""
        return self._labels


class _Member(NamedTuple):
    shard: int
    offset: int
    size: int
    key: str


class ShardSource(Source):
    """WebDataset shards: images with an optional ``.cls`` of the same key.

    Args:
        shards: Paths of ``.tar`` or ``.tar.gz`` files.
        decoder: How the files are read.
    """

    def __init__(self, shards: Sequence[Path], *, decoder: Decoder) -> None:
        self.shards = shards
        self.decoder = decoder
        self._members: list[_Member] = []
        self._unpacked: dict[int, bytes] = {}
        labels: dict[int, str] = {}
        for number, shard in enumerate(shards):
            self._index(number, shard, labels)
        self._labels = [labels[i] for i in range(len(self._members))] if len(labels) == len(self._members) else None

    def _index(self, number: int, shard: Path, labels: dict[int, str]) -> None:
        """List a shard's images; keep the bytes of a compressed one."""
        classes: dict[str, str] = {}
        first = len(self._members)
        try:
            compressed = shard.name.endswith((".gz", ".tgz"))
            with tarfile.open(shard, "r:*") as archive:
                kept: list[bytes] = []
                position = 0
                for member in archive:
                    if not member.isfile():
                        continue
                    folder, _, base = member.name.rpartition("/")
                    stem, _, ending = base.partition(".")
                    key = f"{folder}/{stem}"
                    if ending.lower() == "cls":
                        handle = archive.extractfile(member)
                        classes[key] = handle.read().decode().strip() if handle else ""
                    elif not stem.startswith("._") and f".{ending.lower().rpartition('.')[2]}" in EXTENSIONS:
                        offset = member.offset_data
                        if compressed:
                            handle = archive.extractfile(member)
                            kept.append(handle.read() if handle else b"")
                            offset, position = position, position + member.size
                        self._members.append(_Member(number, offset, member.size, key))
                if any(_rest(archive)):
                    raise tarfile.ReadError(f"damaged header at byte {archive.offset}")
                if compressed:
                    self._unpacked[number] = b"".join(kept)
        except (OSError, EOFError, UnicodeDecodeError, tarfile.TarError, zlib.error) as error:
            raise InputError(f"data: cannot read the shard {shard}: {error}") from error
        for index in range(first, len(self._members)):
            if (label := classes.get(self._members[index].key)) is not None:
                labels[index] = label

    def __len__(self) -> int:
        return len(self._members)

    def read(self, index: int) -> Sample:
        """Read and decode one member."""
        return self.decoder(self.content(index))

    def content(self, index: int) -> bytes:
        """The member's bytes."""
        member = self._members[index]
        if member.shard in self._unpacked:
            return self._unpacked[member.shard][member.offset : member.offset + member.size]
        with self.shards[member.shard].open("rb") as file:
            file.seek(member.offset)
            return file.read(member.size)

    def name(self, index: int) -> str:
        """Shard and key."""
        member = self._members[index]
        return f"{self.shards[member.shard]}:{member.key.removeprefix('/')}"

    @property
    def labels(self) -> Sequence[str] | None:
        """Content of the ``.cls`` members, if every image has one."""
        return self._labels


def _rest(archive: tarfile.TarFile) -> bytes:
    """The next block after the last member, zeros in a whole archive; a compressed one is read to its checksum."""
    archive.fileobj.seek(archive.offset)
    block = archive.fileobj.read(tarfile.BLOCKSIZE)
    while archive.fileobj.read(1 << 20):
        pass
    return block


class ShapesSource(Source):
    """The embedded synthetic set: see :mod:`hpm.data.shapes`.

    Args:
        num_images: Size of the set.
        size: Height and width in pixels.
        seed: Which set.
    """

    def __init__(self, num_images: int, *, size: tuple[int, int], seed: int) -> None:
        self.num_images = num_images
        self.size = size
        self.seed = seed
        self._labels = [list(CLASSES)[i % len(CLASSES)] for i in range(num_images)]

    def __len__(self) -> int:
        return self.num_images

    def read(self, index: int) -> Sample:
        """Make one image."""
        shape = make_shape(self.seed, index, *self.size)
        return Sample(torch.from_numpy(shape.image).permute(2, 0, 1), torch.from_numpy(shape.mask))

    def content(self, index: int) -> bytes:
        """Seed, number and size decide an image."""
        return f"{self.seed} {index} {self.size}".encode()

    def name(self, index: int) -> str:
        """Number, class and level."""
        return f"shapes #{index}: {self._labels[index]}, {_level(index)}"

    @property
    def labels(self) -> Sequence[str]:
        """The silhouettes."""
        return self._labels

    def groups(self) -> Sequence[str]:
        """The difficulty levels."""
        return [_level(index) for index in range(self.num_images)]


def _level(index: int) -> str:
    """Difficulty level of a shape: levels take turns after every class."""
    return LEVELS[index // len(CLASSES) % len(LEVELS)]


def open_source(
    spec: str, *, decoder: Decoder = RGB, image_size: tuple[int, int] = (224, 224), field: str = "data"
) -> Source:
    """Open what ``--data`` names.

    Args:
        spec: A folder, ``list.txt``, ``table.csv``, ``table.parquet``, tar shards (braces and stars are expanded), or
            ``shapes:N`` (``shapes:N@seed`` for another set of the same kind).
        decoder: How the files are read.
        image_size: Size at which ``shapes`` are made.
        field: What to call the argument in a message.

    Raises:
        InputError: Nothing there, nothing readable, or no images in it.
    """
    if not spec:
        raise InputError(f"{field}: needs a folder, a list, a table, tar shards or shapes:N, got nothing")
    if match := re.fullmatch(r"shapes:(\d+)(?:@(\d+))?", spec):
        if decoder.channels != 3:
            raise InputError(f"{field}: shapes have 3 channels, got channels={decoder.channels}")
        if int(match[1]) == 0:
            raise InputError(f"{field}: needs at least one image, got {spec!r}")
        return ShapesSource(int(match[1]), size=image_size, seed=int(match[2] or 0))
    if re.match(r"(hf:|https?://|s3://|shapes:)", spec):
        raise InputError(f"{field}: {spec!r} is not a source that this version reads; "
                         "give a folder, a list, a table, local tar shards or shapes:N")  # fmt: skip
    if re.search(r"\.(tar|tar\.gz|tgz)$", spec):
        return _found(ShardSource(_expand(spec, field), decoder=decoder), spec, field)
    try:
        path = Path(spec).expanduser()
        path.exists()
    except RuntimeError as error:  # an unknown user's home folder
        raise InputError(f"{field}: {spec!r} does not exist: {error}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{field}: cannot read {spec!r}: {getattr(error, 'strerror', None) or error}") from error
    if path.is_dir():
        paths = list(_walk(path, field))
        folders = [p.relative_to(path).parts for p in paths]
        labelled = all(len(parts) > 1 for parts in folders) and len({parts[0] for parts in folders}) > 1
        labels = [parts[0] for parts in folders] if labelled else None
        return _found(FileSource(paths, decoder=decoder, labels=labels), spec, field)
    if not path.exists():
        raise InputError(f"{field}: {spec!r} does not exist")
    if path.suffix.lower() in (".txt", ".csv", ".parquet"):
        return _found(_read_table(path, decoder, field), spec, field)
    raise InputError(f"{field}: must be a folder, .txt, .csv, .parquet or .tar, got the file {spec!r}")


def _found(source: Source, spec: str, field: str) -> Source:
    if len(source) == 0:
        endings = ", ".join(sorted(EXTENSIONS))
        raise InputError(f"{field}: no images in {spec!r} (looked for {endings})")
    return source


def _walk(folder: Path, field: str) -> Iterator[Path]:
    """Every image file below a folder, in sorted order; hidden files left out, linked folders followed once."""
    seen: set[tuple[int, int]] = set()

    def fail(error: OSError) -> None:
        raise InputError(f"{field}: cannot read {error.filename}: {error.strerror}") from error

    for root, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        here = Path(root).stat()
        if (here.st_dev, here.st_ino) in seen:  # a link to a folder that was walked already, or to one above it
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS:
                yield Path(root, name)


def _expand(spec: str, field: str) -> list[Path]:
    """Shards named by braces and stars, in sorted order.

    Raises:
        InputError: One of them does not exist.
    """
    try:
        patterns = list(braceexpand(spec))
    except ValueError as error:
        raise InputError(f"{field}: unbalanced braces in {spec!r}") from error
    shards: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        found = sorted(path.parent.glob(path.name)) if re.search(r"[*?\[]", pattern) else [path]
        if not found or not all(shard.is_file() for shard in found):
            raise InputError(f"{field}: no shard {pattern!r}")
        shards += found
    return shards


def _read_table(path: Path, decoder: Decoder, field: str) -> Source:
    """A list of paths, or a table with columns ``path`` and optionally ``label``, relative to the table's folder."""
    try:
        if path.suffix.lower() == ".txt":
            rows = [{"path": line.strip()} for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
        elif path.suffix.lower() == ".csv":
            rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8-sig"))))
        else:
            rows = _read_parquet(path, field)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{field}: cannot read {path}: {error}") from error
    if rows and "path" not in rows[0]:
        raise InputError(f"{field}: {path} needs a column 'path', got {list(rows[0])}")
    if wrong := next((n for n, row in enumerate(rows, 1) if not isinstance(row["path"], str) or not row["path"]), None):
        raise InputError(f"{field}: {path}: row {wrong} has no path, got {rows[wrong - 1]['path']!r}")
    paths = [path.parent / row["path"] for row in rows]
    if missing := next((p for p in paths if not p.is_file()), None):
        raise InputError(f"{field}: {path} lists a file that does not exist: {missing}")
    if not rows or "label" not in rows[0]:
        return FileSource(paths, decoder=decoder)
    labels = ["" if row["label"] is None else str(row["label"]) for row in rows]
    if "" in labels:
        raise InputError(f"{field}: {path} has a column 'label' but no label in row {labels.index('') + 1}")
    return FileSource(paths, decoder=decoder, labels=labels)


def _read_parquet(path: Path, field: str) -> list[dict[str, str]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(f"{field}: reading {path} needs pyarrow; pip install 'hpm[parquet]'") from None
    try:
        rows: list[dict[str, str]] = parquet.read_table(path).to_pylist()
    except ValueError as error:  # pyarrow's own errors derive from it
        raise InputError(f"{field}: cannot read {path}: {error}") from error
    return rows


def fingerprint(source: Source, *, num_read: int = 64) -> str:
    """Number of images and a checksum of their names and of some of them: another set, or another order, differs.

    Names count from the folder that all have in common, so that a set may be moved and named in any way; that makes
    names alone too weak (many sets begin at 0.png), so images spread over the set are read as well.

    Args:
        source: The images.
        num_read: At least so many of them are read (all of a smaller set), at most twice as many.
    """
    names = [source.name(index) for index in range(len(source))]
    start = os.path.commonprefix(names).rfind("/") + 1  # noqa: RUF071  (cut back to whole folders here)
    digest = hashlib.sha256()
    for name in names:
        digest.update(name[start:].encode() + b"\0")
    for index in range(0, len(source), max(1, len(source) // num_read)):
        try:
            content = source.content(index)
        except OSError:  # reported in training, where it counts
            content = b""
        digest.update(hashlib.sha256(content).digest())
    return f"{len(source)} images, {digest.hexdigest()[:12]}"


def class_indices(labels: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Labels as positions in ``classes``.

    Raises:
        InputError: A label is not among the classes.
    """
    position = {name: i for i, name in enumerate(classes)}
    unknown = sorted(set(labels) - set(position))
    if unknown:
        raise InputError(f"labels: {unknown[:5]} are not among the training classes {list(classes)[:10]}")
    return np.array([position[label] for label in labels])
