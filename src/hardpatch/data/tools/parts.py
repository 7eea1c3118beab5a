"""Which images are learnt from, and which ones are measured on."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hardpatch.data.sources import FileSource, ShardSource, Source, open_source
from hardpatch.data.sources.files import folder_layout
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import say, warn

VAL_SHARE = 0.2
"""Share of every class that is held back where no validation images are named."""
MOST_READ = 20_000
"""Images that are read at most to find those that are in both sets."""
MOST_LISTED = 1_000_000
"""Larger sets are not looked at."""


class Parts(NamedTuple):
    """What to open for learning, and what for measuring."""

    train: str
    val: str
    """Empty: none is known."""


def find_parts(train: str, val: str, *, field: str = "data") -> Parts:
    """Go down into a folder that holds ``train/`` and ``val/``; what is given as ``val`` holds.

    Args:
        train: Source of the training images.
        val: Source of the validation images; empty: none is given.
        field: What to call the first in a message.
    """
    folder = Path(train).expanduser()
    layout = folder_layout(folder) if train and folder.is_dir() else None
    if layout is None:
        return Parts(train, val)
    parts = Parts(*(str(Path(train) / name) for name in (layout.train, layout.val)))
    told = f"{field}: {train!r} holds {layout.train}/ and {layout.val}/: learning from the former"
    unused = f" ({', '.join(layout.unused)} is not used)" if layout.unused else ""
    if val:
        say(f"{told}; measured on {val!r}, as given")
        return Parts(parts.train, val)
    if any(open_source(part).labels is None for part in parts):
        say(f"{told}; the latter is not measured on, as there are no folders of classes in both{unused}")
        return Parts(parts.train, "")
    say(f"{told}, measuring on the latter{unused}")
    return parts


def with_parts(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a run whose ``data`` may be a folder that holds ``train/`` and ``val/``."""
    if not isinstance(given.get("data"), str):
        return dict(given)
    parts = find_parts(given["data"], given.get("val") or "")
    return {**given, "data": parts.train, **({"val": parts.val} if parts.val else {})}


def held_back_by_class(labels: list[str], *, share: float = VAL_SHARE) -> tuple[list[int], list[int]]:
    """Positions to learn from and positions to measure on, the same for the same labels; every class is in both.

    Args:
        labels: Of every image.
        share: That is measured on, of each class; at least one image.

    Raises:
        InputError: A class has one image only.
    """
    by_class: dict[str, list[int]] = defaultdict(list)
    generator = torch.Generator().manual_seed(0)
    for position in torch.randperm(len(labels), generator=generator).tolist():
        by_class[labels[position]].append(position)
    if alone := next((name for name in sorted(by_class) if len(by_class[name]) < 2), None):
        raise InputError(f"val: none is given, and class {alone!r} has one image, of which none can be held back")
    val = {p for members in by_class.values() for p in members[: max(1, round(share * len(members)))]}
    return [p for p in range(len(labels)) if p not in val], sorted(val)


def told_classes(source: Source, *, most: int = 5) -> str:
    """The classes of a source in one line, the largest first."""
    if source.labels is None:
        return "no classes are known"
    counts = Counter(source.labels)
    shown = ", ".join(f"{name} ({count:,})" for name, count in counts.most_common(most))
    more = f" and {len(counts) - most:,} more" if len(counts) > most else ""
    return f"{len(counts):,} classes: {shown}{more}"


def warn_of_shared(train: Source, val: Source, *, field: str = "val") -> int:
    """Warn of validation images that are among the training images, byte for byte; how many were found."""
    pairs = _shared(train, val)
    if pairs is None:
        say(f"{field}: not compared with the training images, which are too many or far away; keep the two apart")
    if not pairs:
        return 0
    mine, other = pairs[0]
    number = f"all {len(val):,}" if len(pairs) == len(val) else f"{len(pairs):,} of {len(val):,}"
    means = "accuracies say nothing of other images" if len(pairs) == len(val) else "accuracies are too high by them"
    warn(
        f"{field}: {number} images are among the training images, such as {val.name(mine)} and {train.name(other)}: "
        f"{means}"
    )
    return len(pairs)


def _shared(train: Source, val: Source) -> list[tuple[int, int]] | None:
    """Validation images that are training images, and one of those each; None: too many to look at, or far away."""
    if max(len(train), len(val)) > MOST_LISTED:
        return None
    sizes = [[source.num_bytes(index) for index in range(len(source))] for source in (train, val)]
    if any(None in some and isinstance(source, FileSource | ShardSource) for source, some in zip((train, val), sizes)):
        return None
    if any(None in some for some in sizes):  # images in memory: all are of one size, so to speak
        sizes = [[0] * len(some) for some in sizes]
    common = set(sizes[0]) & set(sizes[1])
    asked, among = ([index for index, size in enumerate(some) if size in common] for some in reversed(sizes))
    if len(asked) + len(among) > MOST_READ:
        return None
    known = {_digest(train, index): index for index in among}
    known.pop(None, None)
    pairs = [(index, known.get(_digest(val, index))) for index in asked]
    return [(index, other) for index, other in pairs if other is not None]


def _digest(source: Source, index: int) -> bytes | None:
    try:
        return hashlib.sha256(source.content(index)).digest()
    except OSError:  # damaged: named where it is read
        return None
