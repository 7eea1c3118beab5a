"""One look at one image: what it is, whether it can be read, and by what it may be recognised again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from hardpatch.data.images.decode import Decoder, Sample, describe, to_sample
from hardpatch.data.images.formats import EXTENSIONS, read_stored
from hardpatch.data.images.stored import DecodeError, Description
from hardpatch.data.images.value_range import stored_ends
from hardpatch.data.sources import Source


class Look(NamedTuple):
    """What was seen."""

    number: int
    """In the source, from 0."""
    reason: str = ""
    """Why it is damaged; empty: it is not."""
    about: Description | None = None
    size: int = 0
    """Bytes."""
    digest: bytes = b""
    """Of the bytes."""
    hash: int | None = None
    """64 bits of the picture; None of one that is all of one value."""
    ends: tuple[float, float] | None = None
    """Lowest and highest stored value, of images that are not 8-bit."""
    valid: float = 1.0
    """Share of the pixels that hold data."""


def look_at(index: int, *, source: Source, channels: int | None, no_data: float | None) -> Look:
    """Read and decode one image of a source; never raises.

    Args:
        index: Of the image.
        source: The images.
        channels: As how many channels they are read; None: as many as each has.
        no_data: Value of pixels without data.
    """
    content, ends = b"", None
    try:
        content = source.content(index)
        try:
            about = describe(content)
        except DecodeError:
            sample = source.read(index)  # of a source whose images are made, not decoded
            bands, height, width = sample.image.shape
            about = Description("made", width, height, bands, False, "grey" if bands == 1 else "rgb", 8)
        else:
            stored = read_stored(content, channels=channels or about.bands)
            if stored.is_deep:
                ends = stored_ends(stored, no_data=no_data)
            sample = to_sample(stored, Decoder(channels or about.bands, no_data=no_data))
        valid = 1.0 if sample.valid is None else float(sample.valid.float().mean())
        return Look(index, "", about, len(content), _digest(content), perceptual_hash(sample), ends, valid)
    except Exception as error:  # whatever a source's reader may raise: the next image is looked at all the same
        reason = str(error) if isinstance(error, DecodeError) else f"{type(error).__name__}: {error}"
        return Look(index, reason, size=len(content), digest=_digest(content))


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:16]


def perceptual_hash(sample: Sample) -> int | None:
    """64 bits that hardly change when a picture is scaled or compressed; None of one that is all of one value.

    Source: pHash, by the library imagehash.
    """
    import imagehash

    grey = sample.image.float().mean(0).numpy()
    if sample.image.is_floating_point():  # not 8-bit: stretched to 0..255
        low, high = float(grey.min()), float(grey.max())
        grey = (grey - low) * (255 / max(high - low, 1e-12))
    if np.ptp(grey) < 1:
        return None
    return int(str(imagehash.phash(Image.fromarray(grey.round().astype(np.uint8)))), 16)


def other_files(folder: Path) -> Iterator[Path]:
    """Files below a folder whose ending is not that of an image, hidden ones left out."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        here = Path(root).stat()
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() not in EXTENSIONS:
                yield Path(root, name)
