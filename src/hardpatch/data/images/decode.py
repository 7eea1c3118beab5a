"""From bytes to pixels, by written rules; what cannot be decoded faithfully is refused with a reason.

**Depth.** Files of 8 bits a value and fewer give uint8; 1 bit and bool become 0 and 255. All others give float32 in the
same units: ``value_range`` (low, high), as stored, becomes (0, 255), and what lies outside goes beyond, nothing is
clipped. Without a range it is that of the type: 0 to the highest value of integers (of 12 bits, if a file says 12),
0 to 1 of floats.

**Channels.** A file of C bands is read as ``channels`` C. Grey becomes 3 channels by repetition, colour 1 channel by
its luminance. Palettes are looked up, CMYK and Lab are converted to RGB and have 3 bands. Any other number is refused.

**Transparency.** An alpha band is no channel: pixels are laid on black by it, and where it is 0 they are not ``valid``.
But if ``channels`` is one more than the bands, alpha is read as the last channel like any other.

**No data.** Pixels that equal ``no_data`` in all bands (or what the file itself names: GDAL's tag, DICOM's padding), or
that are NaN or infinite in any, are not ``valid``; they get their channel's mean. An image without any other pixel is
refused. Where nothing is missing, ``valid`` is None.

**Orientation** (EXIF, TIFF's tag, XMP) is applied. Of animations and of files with several pages the first is read.

**Refused**: more than :data:`~hardpatch.data.stored.MAX_PIXELS` or MAX_BYTES (before decoding), cut off, or damaged
where the
format can tell. A JPEG, WebP, GIF or BMP has no checksum: a changed byte in it may come out as another picture.

How each format is read stands in :mod:`hardpatch.data.images.formats`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from PIL import Image
from torch import Tensor

from hardpatch.data.images.formats import EXTENSIONS, describe, read_stored
from hardpatch.data.images.stored import ChannelsError, DecodeError, Description, Stored
from hardpatch.runtime.errors import InputError

__all__ = ["EXTENSIONS", "RGB", "DecodeError", "Decoder", "Description", "Sample", "describe", "to_sample"]


class Sample(NamedTuple):
    """One image."""

    image: Shaped[Tensor, "c h w"]
    """uint8, or float32 in the same units: 0..255 spans the value range."""
    mask: Bool[Tensor, "h w"] | None = None
    """True = foreground, where the source knows."""
    valid: Bool[Tensor, "h w"] | None = None
    """False = no data; None: all pixels are data."""


@dataclass(frozen=True)
class Decoder:
    """How the files of a source are read.

    Args:
        channels: Channels of every image.
        value_range: Of values that are not 8-bit: what becomes 0 and what becomes 255. None: the range of the type.
        no_data: Value of pixels without data, as stored. None: what the file itself names.
    """

    channels: int = 3
    value_range: tuple[float, float] | None = None
    no_data: float | None = None

    def __post_init__(self) -> None:
        if self.value_range and not self.value_range[0] < self.value_range[1]:
            raise InputError(f"value_range: the first value must be below the second, got {self.value_range}")

    def __call__(self, content: bytes) -> Sample:
        """Decode the bytes of one file.

        Raises:
            DecodeError: Damaged, too large, or of a kind that would not come out faithfully.
        """
        try:
            return to_sample(read_stored(content, channels=self.channels), self)
        except ChannelsError as error:
            found = describe(content)
            if found.frames > 1:
                raise ChannelsError(
                    f"{error}: of its {found.frames} pages or frames the first alone is read (bands belong into one "
                    "page: tifffile.imwrite(..., planarconfig='separate'), or .npy)"
                ) from error
            raise ChannelsError(f"{error} (where all files are like it: --channels {found.bands})") from error


RGB = Decoder()
"""Of 8-bit colour images."""


def to_sample(stored: Stored, decoder: Decoder) -> Sample:
    """Apply the rules above.

    Raises:
        DecodeError: The file has another number of bands, or no pixel with data.
    """
    stored = _with_alpha_as_channel(stored, decoder.channels)
    missing = find_missing(stored, decoder.no_data)
    pixels = stored.pixels
    if stored.is_deep:
        pixels = _scaled(pixels, decoder.value_range or stored.range)
        unusable = ~np.isfinite(pixels).all(axis=2)
        if unusable.any():
            missing = unusable if missing is None else missing | unusable
    if stored.inverted:
        pixels = 255 - pixels
    if missing is not None and missing.all():
        raise DecodeError("no pixel holds data")
    pixels = _converted(pixels, stored, decoder.channels)
    valid = None if missing is None else ~missing
    if stored.alpha is not None:
        pixels = _on_black(pixels, stored)
        if (clear := stored.alpha == 0).any():
            valid = ~clear if valid is None else valid & ~clear
    if missing is not None:
        pixels = _filled(pixels, missing, valid)
    planes = pixels.transpose(2, 0, 1)
    if not (planes.flags.c_contiguous and planes.flags.writeable):
        planes = np.array(planes, order="C")
    image = torch.from_numpy(planes)
    if image.shape[0] != decoder.channels:
        image = image.expand(decoder.channels, -1, -1).contiguous()
    return Sample(image, valid=None if valid is None else torch.from_numpy(np.ascontiguousarray(valid)))


def _with_alpha_as_channel(stored: Stored, channels: int) -> Stored:
    """Where just one more channel than there are bands is asked for."""
    if stored.alpha is None or stored.pixels.shape[2] != channels - 1:
        return stored
    together = np.concatenate([stored.pixels, stored.alpha[..., None]], axis=2)
    return stored._replace(pixels=together, colour="bands", alpha=None)


def find_missing(stored: Stored, no_data: float | None) -> Bool[np.ndarray, "h w"] | None:
    """Pixels that hold no data by their value or their absence; None where there are none.

    Args:
        stored: The image.
        no_data: Value that stands for it in every band; None: what the file itself names.
    """
    missing = None if stored.present is None else ~stored.present
    value = stored.no_data if no_data is None else no_data
    dtype = stored.pixels.dtype
    if value is not None and _fits(value, dtype):
        empty = (stored.pixels == dtype.type(value)).all(axis=2)
        if empty.any():
            missing = empty if missing is None else missing | empty
    return missing


def _fits(value: float, dtype: np.dtype) -> bool:
    """Can the type hold the value? (NaN is found anyway.)"""
    if dtype.kind == "f":
        return not np.isnan(value)
    info = np.iinfo(dtype)
    return float(value).is_integer() and info.min <= value <= info.max


def _scaled(pixels: Shaped[np.ndarray, "h w k"], value_range: tuple[float, float]) -> Shaped[np.ndarray, "h w k"]:
    """As float32, with the range at 0..255."""
    low, high = value_range
    height, width, bands = pixels.shape
    scaled = np.empty((bands, height, width), np.float32)
    rows = max(1, 1_000_000 // (width * bands))  # part by part, as doubles take room
    with np.errstate(all="ignore"):  # what becomes infinite counts as missing
        for top in range(0, height, rows):
            part = (pixels[top : top + rows].astype(np.float64) - low) * (255 / (high - low))
            scaled[:, top : top + rows] = part.transpose(2, 0, 1)
    return scaled.transpose(1, 2, 0)


def _converted(pixels: Shaped[np.ndarray, "h w k"], stored: Stored, channels: int) -> Shaped[np.ndarray, "h w _"]:
    """As many channels as are wanted, or one that is to be repeated.

    Raises:
        DecodeError: The file has another number of bands.
    """
    bands = pixels.shape[2]
    if bands == channels or (stored.colour == "grey" and channels == 3):
        return pixels
    if stored.colour == "rgb" and channels == 1:
        if pixels.dtype == np.uint8:
            return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))[..., None]
        return np.asarray(
            pixels @ np.array([[0.299], [0.587], [0.114]], np.float32)
        )  # as Pillow weights them: ITU-R 601
    alpha = " and alpha" if stored.alpha is not None else ""
    raise ChannelsError(
        f"the file has {bands} band{'s' * (bands != 1)}{alpha}, which cannot be read as {channels} "
        f"channel{'s' * (channels != 1)}"
    )


def _on_black(pixels: Shaped[np.ndarray, "h w k"], stored: Stored) -> Shaped[np.ndarray, "h w k"]:
    """Laid on black by alpha."""
    alpha = stored.alpha
    assert alpha is not None
    if stored.premultiplied or (alpha == _opaque(alpha.dtype)).all():
        return pixels
    over = np.empty_like(pixels)
    for band in range(pixels.shape[2]):
        if pixels.dtype == np.uint8:
            over[..., band] = (pixels[..., band].astype(np.uint16) * alpha + 127) // 255
        else:
            over[..., band] = pixels[..., band] * (alpha.astype(np.float32) / _opaque(alpha.dtype))
    return over


def _opaque(dtype: np.dtype) -> float:
    return 1.0 if dtype.kind == "f" else float(np.iinfo(dtype).max)


def _filled(
    pixels: Shaped[np.ndarray, "h w k"], missing: Bool[np.ndarray, "h w"], valid: Bool[np.ndarray, "h w"] | None
) -> Shaped[np.ndarray, "h w k"]:
    """With the mean of every channel where nothing is."""
    there = pixels[valid]
    mean = there.mean(axis=0, dtype=np.float64) if len(there) else np.zeros(pixels.shape[2])
    pixels = pixels.copy()
    pixels[missing] = mean.round() if pixels.dtype == np.uint8 else mean
    return pixels
