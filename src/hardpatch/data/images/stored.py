"""An image as its file stores it, before it becomes a sample: what every format's reader returns."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Shaped

MAX_PIXELS = 64_000_000
"""Larger images are refused before they are decoded."""

MAX_BYTES = 4 * MAX_PIXELS
"""So are images that take more memory, by many bands or deep values: 256 MB."""

Kind = Literal["unsigned", "signed", "float"]
"""Of numbers."""

Colour = Literal["grey", "rgb", "bands"]
"""What the bands mean; "bands" is anything that is neither grey nor colour."""


class DecodeError(Exception):
    """The bytes are no image that can be decoded faithfully; the message is the reason."""


class ChannelsError(DecodeError):
    """A whole image, but of another number of channels than is asked for."""


class Stored(NamedTuple):
    """One image, upright, with the values of its file."""

    pixels: Shaped[np.ndarray, "h w k"]
    """Without alpha; uint8 of 8 bits or fewer (then 0..255), else any integer or float type."""
    colour: Colour
    range: tuple[float, float]
    """Lowest and highest value that the type can hold; 0..1 of floats."""
    alpha: Shaped[np.ndarray, "h w"] | None = None
    """Of the same type as the pixels; 0 = transparent."""
    premultiplied: bool = False
    """Pixels are multiplied by alpha already."""
    inverted: bool = False
    """The low end of the range is white."""
    no_data: float | None = None
    """Value of pixels without data, where the file names one."""
    present: Bool[np.ndarray, "h w"] | None = None
    """False = the file has left this pixel out; None: all are there."""

    @property
    def is_deep(self) -> bool:
        """Are there more than 256 values a pixel?"""
        return bool(self.pixels.dtype != np.uint8)


class Description(NamedTuple):
    """What a file says of its image, without decoding it."""

    format: str
    """``JPEG``, ``PNG``, ``TIFF``, ..."""
    width: int
    """Pixels, upright."""
    height: int
    """Pixels, upright."""
    bands: int
    """Channels as which it is read, without alpha."""
    alpha: bool
    mode: str
    """``grey``, ``rgb``, ``palette``, ``cmyk``, ``lab``, ``bands``."""
    bits: int
    """Of one value."""
    kind: Kind = "unsigned"
    orientation: int = 1
    """1 to 8, as EXIF numbers them."""
    frames: int = 1
    """Frames of an animation, pages of a file; the first is read."""

    @property
    def is_deep(self) -> bool:
        """Are there more than 256 values a pixel?"""
        return self.bits > 8 or self.kind != "unsigned"

    @property
    def depth(self) -> str:
        """``8-bit``, ``16-bit signed``, ``32-bit float``."""
        return f"{self.bits}-bit" + ("" if self.kind == "unsigned" else f" {self.kind}")


def check_size(width: int, height: int, *, bytes_per_pixel: float = 1) -> None:
    """Refuse what is empty or too large.

    Raises:
        DecodeError: No pixels, more than :data:`MAX_PIXELS`, or more than :data:`MAX_BYTES`.
    """
    if width <= 0 or height <= 0:
        raise DecodeError("image without pixels")
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width}x{height} pixels are more than {MAX_PIXELS:,}")
    if width * height * bytes_per_pixel > MAX_BYTES:
        raise DecodeError(f"{width}x{height} pixels of {bytes_per_pixel:g} bytes are more than {MAX_BYTES:,} bytes")


def type_range(dtype: np.dtype, *, bits: int | None = None) -> tuple[float, float]:
    """What becomes 0 and 255 by default: 0 to the highest value of an integer type, 0 to 1 of a float type.

    Args:
        dtype: As stored.
        bits: Of unsigned values that use fewer bits than their type has.
    """
    if dtype.kind == "f":
        return 0.0, 1.0
    return 0.0, float(2**bits - 1 if bits and dtype.kind == "u" else np.iinfo(dtype).max)


def upright(pixels: Shaped[np.ndarray, "h w *k"], orientation: int) -> np.ndarray:
    """Turn and mirror as EXIF's orientation says; unknown numbers mean upright.

    Source: EXIF 2.32, tag 274.
    """
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def upright_size(width: int, height: int, orientation: int) -> tuple[int, int]:
    """Width and height after :func:`upright`."""
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)
