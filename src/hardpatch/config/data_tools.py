"""What ``hardpatch data stats`` and ``hardpatch data pack`` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from tyro.conf import Positional

from hardpatch.config.fields import NotNegative, Positive, Settings


@dataclass(frozen=True)
class StatsConfig(Settings):
    """Mean and standard deviation per channel over all pixels of all images, exactly, and the flags to use them."""

    data: Positional[str]
    """Images, any source."""
    channels: Positive | None = None
    """Read every image as so many channels; none: found in the data."""
    value_range: tuple[float, ...] = ()
    """Lowest and highest value of images that are not 8-bit; empty: found in the data."""
    no_data: float | None = None
    """Value of pixels without data, as stored, which are left out; none: what a file itself names."""
    workers: NotNegative | None = None
    """Processes; none: one per core."""


@dataclass(frozen=True)
class PackConfig(Settings):
    """Write images, made smaller once, to tar shards that are quick to read; verified, and resumed after a kill.

    Images whose shorter side is at most --size are taken as they are, byte for byte. Larger ones are resized: 8-bit
    grey and colour become JPEGs, with transparency PNGs, all others .npy arrays of their own type. Damaged images are
    left out and listed.
    """

    data: Positional[str]
    """Images, any source; labels become .cls members."""
    out: str
    """Folder for the shards and index.json."""
    size: Positive = 256
    """Shorter side at most, pixels."""
    quality: Annotated[int, Field(ge=1, le=100)] = 90
    """Quality of JPEGs, 1 to 100."""
    shard_bytes: Positive = 500_000_000
    """A shard is closed when it has so many bytes."""
    channels: Positive | None = None
    """Channels of images that have more than one way to be read, .npy arrays above all; none: found in the data."""
    no_data: float | None = None
    """Value of pixels without data, as stored, which must not blend into others; none: what a file itself names."""
    workers: NotNegative | None = None
    """Processes; none: one per core."""
