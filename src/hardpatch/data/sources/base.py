"""What a source is: a numbered list of images that can be read in any order."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from hardpatch.data.images.decode import Decoder, Sample
from hardpatch.data.sources.compact import Labels
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.text import as_bytes


class Blocks(NamedTuple):
    """Which images of a source lie together, far away: shards of a set that the disk cannot hold as a whole."""

    sizes: tuple[int, ...]
    """Images of every block; block after block, they are the images of the source."""
    together: int
    """So many blocks may be used at a time, and as many be fetched meanwhile."""


class Source(ABC):
    """A numbered list of images."""

    decoder: Decoder | None = None
    """How the bytes of :meth:`content` become what :meth:`read` returns; None where they are no file."""
    unlabelled: Sequence[int] | np.ndarray = ()
    """Images without a label in a source in which others have one; such labels are not used, see :attr:`labels`."""

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

    def num_bytes(self, index: int) -> int | None:
        """Length of :meth:`content`, where it is known without reading it; -1 of what cannot be read."""
        return None

    @property
    @abstractmethod
    def labels(self) -> Sequence[str] | None:
        """Class of every image, or None where one of them has none."""

    def without_labels(self) -> str:
        """Which images have no label where others have one; nothing where that is not so."""
        if not len(self.unlabelled):
            return ""
        first = self.name(int(self.unlabelled[0]))
        return f": {len(self.unlabelled):,} of {len(self):,} images have none, {first} first"

    def _only_complete(self, labels: Labels | None) -> Labels | None:
        """These labels, or None where some images have none, which :attr:`unlabelled` then says."""
        if labels is None or labels.complete:
            return labels
        if labels.present - {""}:
            self.unlabelled = labels.gaps
        return None

    def groups(self) -> Sequence[str] | None:
        """A name per image by which results may be split, or None."""
        return None

    def names(self) -> Iterator[str]:
        """:meth:`name` of every image."""
        return (self.name(index) for index in range(len(self)))

    def blocks(self) -> Blocks | None:
        """Which images should be read together; None: any order is as good as another."""
        return None

    def prepare(self, blocks: Iterable[int]) -> None:  # noqa: B027  (most sources have nothing to fetch)
        """Fetch blocks that will be read soon."""

    def spread(self, count: int) -> list[int]:
        """At most so many images, spread over the source, to look at for statistics."""
        indices: list[int] = torch.linspace(0, len(self) - 1, min(len(self), count)).long().tolist()
        return indices

    def outline(self) -> Iterable[str] | None:
        """What a fingerprint is made from where the images are too far away to look at; None: names and images."""
        return None


def fingerprint(source: Source, *, num_read: int = 64) -> str:
    """Number of images and a checksum of their names and of some of them: another set, or another order, differs.

    Names count from the folder that all have in common, so that a set may be moved and named in any way; that makes
    names alone too weak (many sets begin at 0.png), so images spread over the set are read as well.

    Args:
        source: The images.
        num_read: At least so many of them are read (all of a smaller set), at most twice as many.
    """
    digest = hashlib.sha256()
    if (outline := source.outline()) is not None:
        for line in outline:
            digest.update(as_bytes(line) + b"\0")
        return f"{len(source)} images, {digest.hexdigest()[:12]}"
    start = _common_folder(source.names())
    names = source.names()
    while some := list(islice(names, 4096)):
        digest.update(as_bytes("\0".join([name[start:] for name in some])) + b"\0")
    for index in range(0, len(source), max(1, len(source) // num_read)):
        try:
            content = source.content(index)
        except OSError:  # reported in training, where it counts
            content = b""
        digest.update(hashlib.sha256(content).digest())
    return f"{len(source)} images, {digest.hexdigest()[:12]}"


def _common_folder(names: Iterable[str]) -> int:
    """Length of the folders that all names begin with."""
    first = last = None
    for name in names:
        first = name if first is None or name < first else first
        last = name if last is None or name > last else last
    if first is None or last is None:
        return 0
    same = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return first.rfind("/", 0, same) + 1


def class_indices(labels: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Labels as positions in ``classes``.

    Raises:
        InputError: A label is not among the classes.
    """
    position = {name: i for i, name in enumerate(classes)}
    present = labels.present if isinstance(labels, Labels) else set(labels)
    unknown = sorted(present - set(position))
    if unknown:
        raise InputError(f"labels: {unknown[:5]} are not among the training classes {list(classes)[:10]}")
    if isinstance(labels, Labels):
        return np.array([position.get(name, -1) for name in labels.classes], np.int64)[labels.codes]
    return np.array([position[label] for label in labels])
