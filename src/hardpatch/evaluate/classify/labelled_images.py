"""Labelled images for an evaluation: opened, checked against each other and the checkpoint, thinned to few labels."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from hardpatch.config.config import Config
from hardpatch.data.images.decode import DecodeError, Sample
from hardpatch.data.sources import FileSource, Source, class_indices, fingerprint, open_source
from hardpatch.data.tools.describe import say_what_is_left
from hardpatch.data.tools.parts import VAL_SHARE, find_parts, held_back_by_class, warn_of_shared
from hardpatch.runs.build import build_decoder, build_downloads
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import say
from hardpatch.runtime.seeding import Stream, derive_seed
from hardpatch.runtime.text import as_bytes


class Subset(Source):
    """Some images of a source, numbered anew."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Sample:
        """Read and decode one image."""
        return self.source.read(self.indices[index])

    def name(self, index: int) -> str:
        """The name that the image has in the whole source."""
        return self.source.name(self.indices[index])

    def content(self, index: int) -> bytes:
        """What the image is made from."""
        return self.source.content(self.indices[index])

    @property
    def labels(self) -> Sequence[str] | None:
        """Class of every image."""
        labels = self.source.labels
        return None if labels is None else [labels[i] for i in self.indices]

    def groups(self) -> Sequence[str] | None:
        """Groups of the whole source."""
        groups = self.source.groups()
        return None if groups is None else [groups[i] for i in self.indices]


class LabelledImages(NamedTuple):
    """Images to learn from and images to be measured on."""

    train: Source
    val: Source
    classes: list[str]
    """Those of the training images, sorted."""


def open_labelled(train: str, val: str, run: Config, *, size: tuple[int, int] | None = None) -> LabelledImages:
    """Open both sources and check them before any work.

    Args:
        train: Source of the training images; a folder that holds ``train/`` and ``val/`` stands for both.
        val: Source of the validation images; empty: a share of every training class is held back.
        run: Config of the checkpoint, by which images are read.
        size: Height and width at which shapes are made; None: the run's.

    Raises:
        InputError: No labels, fewer than two classes, a validation class that is not among the training classes, or
            images that cannot be read as so many channels.
    """
    decoder, sources = build_decoder(run.data), []
    train, val = find_parts(train, val, field="train")
    for field, spec in (("train", train), ("val", val))[: 1 + bool(val)]:
        source = open_source(
            spec, decoder=decoder, image_size=size or run.data.size, field=field, downloads=build_downloads(run)
        )
        if source.labels is None:
            raise InputError(without_labels(source, spec, field))
        say_what_is_left(source, field=field)
        _check_readable(source, field=field, channels=decoder.channels)
        sources.append(source)
    classes = sorted(set(sources[0].labels or ()), key=_natural)
    if len(classes) < 2:
        raise InputError(f"train: needs at least two classes, got {classes}")
    if not val:
        kept, held = held_back_by_class(list(sources[0].labels or ()))
        say(f"no val: {len(held):,} of {len(sources[0]):,} images are held back, {VAL_SHARE:.0%} of every class")
        return LabelledImages(Subset(sources[0], kept), Subset(sources[0], held), classes)
    class_indices(sources[1].labels or [], classes)
    warn_of_shared(*sources)
    return LabelledImages(sources[0], sources[1], classes)


def without_labels(source: Source, spec: str, field: str) -> str:
    """What to say of a source that has no labels; of a folder of classes, which files keep it from being one."""
    stray = (
        [path for path in source.paths if "/" not in path] if isinstance(source, FileSource) and source.folder else []
    )
    told = f"{field}: {spec!r} has no labels (sub-folders, a column 'label', or .cls files){source.without_labels()}"
    if not source.without_labels() and stray and len(stray) < len(source):
        told += (
            f": {len(stray):,} of {len(source):,} images lie beside the folders of the classes, {stray[0]!r} first; "
        )
        told += "move them into one, or away"
    return told


def _natural(name: str) -> tuple[int, int, str]:
    """Numbers by their value, before names."""
    return (0, int(name), "") if name.isascii() and name.isdigit() else (1, 0, name)


def _check_readable(source: Source, *, field: str, channels: int, patience: int = 8) -> None:
    """Refuse a source of which the first images cannot be read as so many channels."""
    problems = []
    for index in range(min(patience, len(source))):
        try:
            source.read(index)
        except (DecodeError, OSError) as error:
            problems.append(f"{source.name(index)}: {error}")
        else:
            return
    raise InputError(
        f"{field}: the checkpoint's encoder takes {channels} channel(s), and none of the first {len(problems)} images "
        f"can be read like that; {problems[0]}"
    )


def choose_per_class(labels: Sequence[str], count: int, *, seed: int) -> list[int]:
    """Draw ``count`` images of every class; fewer are a part of more, for the same seed.

    Returns:
        Positions in ``labels``, ascending.

    Raises:
        InputError: A class has fewer images.
    """
    sizes = Counter(labels)
    smallest = min(sizes, key=lambda name: (sizes[name], name))
    if not 1 <= count <= sizes[smallest]:
        raise InputError(
            f"labels_per_class: must be between 1 and {sizes[smallest]}, the images of class {smallest!r}, got {count}"
        )
    generator = torch.Generator().manual_seed(derive_seed(seed, Stream.LABELS))
    taken: Counter[str] = Counter()
    chosen = []
    for index in torch.randperm(len(labels), generator=generator).tolist():
        if taken[labels[index]] < count:
            taken[labels[index]] += 1
            chosen.append(index)
    return sorted(chosen)


def labelled_fingerprint(source: Source) -> str:
    """:func:`hardpatch.data.sources.fingerprint` with the labels: other labels for the same images differ, too."""
    digest = hashlib.sha256(as_bytes("\0".join(source.labels or ())))
    return f"{fingerprint(source)}, labels {digest.hexdigest()[:8]}"
