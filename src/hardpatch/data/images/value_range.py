"""What range the values of a source have, where they are not 8-bit."""

from __future__ import annotations

import numpy as np

from hardpatch.data.images.decode import find_missing
from hardpatch.data.images.formats import describe, read_stored
from hardpatch.data.images.stored import DecodeError, Stored
from hardpatch.data.sources import Source


def find_value_range(
    source: Source, *, max_images: int = 1000, no_data: float | None = None
) -> tuple[float, float] | None:
    """Lowest and highest stored value over the images that are not 8-bit; None where all are.

    Damaged images are passed over: they are reported when they are trained on.

    Args:
        source: The images.
        max_images: Look at so many at most, spread over the source.
        no_data: Value of pixels that do not count. None: what each file names.
    """
    lowest, highest = np.inf, -np.inf
    for index in source.spread(max_images):
        try:
            content = source.content(index)
            if not describe(content).is_deep:
                continue
            ends = stored_ends(read_stored(content), no_data=no_data)
        except (DecodeError, OSError):
            continue
        if ends is not None:
            lowest, highest = min(lowest, ends[0]), max(highest, ends[1])
    if lowest > highest:
        return None
    return lowest, (highest if highest > lowest else lowest + 1.0)  # of one single value any range will do


def stored_ends(stored: Stored, *, no_data: float | None = None) -> tuple[float, float] | None:
    """Lowest and highest stored value of one image; None where no pixel holds data."""
    pixels = stored.pixels
    missing = find_missing(stored, no_data)
    if missing is not None:
        pixels = pixels[~missing]
    if pixels.dtype.kind == "f":
        pixels = pixels[np.isfinite(pixels)]
    return (float(pixels.min()), float(pixels.max())) if pixels.size else None


def has_shallow_images(source: Source, *, max_images: int) -> bool:
    """Are there 8-bit images among those looked at? Damaged ones are passed over."""
    for index in source.spread(max_images):
        try:
            if not describe(source.content(index)).is_deep:
                return True
        except (DecodeError, OSError):
            continue
    return False
