"""What range the values of a source have, where they are not 8-bit: one answer for training and for ``data check``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from hardpatch.data.images.decode import find_missing
from hardpatch.data.images.formats import describe, read_stored
from hardpatch.data.images.stored import DecodeError, Stored
from hardpatch.data.sources import Source

LOOK_AT = 1000
"""Images of a source whose values are looked at, spread over it."""

_SOME = 1000
"""Values of an image that stand for all of them."""

_FILLED = 0.1
"""A range is warned of when nearly all values lie within so much of it."""


class Values(NamedTuple):
    """Stored values of one image, or of many, that are data."""

    lowest: float
    highest: float
    some: Float32[np.ndarray, " n"]
    """Spread over the pixels."""


class ValueRange(NamedTuple):
    """What a source's values span."""

    lowest: float
    highest: float
    low: float
    """98 of 100 values lie from here"""
    high: float
    """to here."""

    def ends(self) -> tuple[float, float]:
        """What becomes 0 and what 255; of one single value any range will do."""
        return self.lowest, self.highest if self.highest > self.lowest else self.lowest + 1.0

    def advice(self) -> str:
        """What to do about a range that most pixels do not fill; nothing where they do."""
        span, typical = self.highest - self.lowest, self.high - self.low
        if span <= 0 or typical >= _FILLED * span:
            return ""
        far = self.lowest if self.low - self.lowest > self.highest - self.high else self.highest
        spread = f"--value-range {self.low:g} {self.high:g} spreads them" if typical else "--value-range sets another"
        where = f"98 % of the values lie between {self.low:g} and {self.high:g}, {typical / span:.1%} of the range"
        return (
            f"{where} {self.lowest:g} to {self.highest:g}: they will hardly differ. {spread}; where {far:g} stands for "
            f"pixels without data, --no-data {far:g} leaves them out"
        )


def values_of(stored: Stored, *, no_data: float | None = None) -> Values | None:
    """Stored values of one image; None where no pixel holds data.

    Args:
        stored: The image.
        no_data: Value of pixels that do not count. None: what the file names.
    """
    missing = find_missing(stored, no_data)
    pixels = (stored.pixels if missing is None else stored.pixels[~missing]).reshape(-1)
    if not pixels.size:
        return None
    some = pixels[:: max(1, pixels.size // _SOME)].astype(np.float32)
    return Values(float(pixels.min()), float(pixels.max()), some)


def join(parts: Sequence[Values]) -> ValueRange | None:
    """The range of many images; None of none."""
    if not parts:
        return None
    low, high = np.percentile(np.concatenate([part.some for part in parts]), (1, 99))
    return ValueRange(min(part.lowest for part in parts), max(part.highest for part in parts), float(low), float(high))


class Depths(NamedTuple):
    """What was found in some images of a source."""

    value_range: ValueRange | None
    """Of those that are not 8-bit; None: there are none."""
    num_shallow: int
    """8-bit ones."""


def find_depths(source: Source, *, max_images: int = LOOK_AT, no_data: float | None = None) -> Depths:
    """Look at values. Damaged images are passed over: they are reported when they are trained on.

    Args:
        source: The images.
        max_images: Look at so many at most, spread over the source.
        no_data: Value of pixels that do not count. None: what each file names.
    """
    found, shallow = [], 0
    for index in source.spread(max_images) if source.decoder is not None else ():
        try:
            content = source.content(index)
            if not describe(content).is_deep:
                shallow += 1
            elif values := values_of(read_stored(content), no_data=no_data):
                found.append(values)
        except (DecodeError, OSError):
            continue
    return Depths(join(found), shallow)


def find_value_range(
    source: Source, *, max_images: int = LOOK_AT, no_data: float | None = None
) -> tuple[float, float] | None:
    """Lowest and highest stored value over the images that are not 8-bit; None where all are."""
    found = find_depths(source, max_images=max_images, no_data=no_data).value_range
    return None if found is None else found.ends()
