"""From bytes to pixels, by written rules; what cannot be decoded faithfully is refused with a reason.

Rules for RGB (3 channels): grey is repeated, palettes are looked up, CMYK is converted, transparent pixels are laid
on black, EXIF orientation is applied, of animations the first frame is taken. For 1 channel the luminance is taken.
``.npy`` files hold (H, W), (H, W, C) or (C, H, W) arrays of uint8 with any number of channels. 16-bit grey, float, Lab
and multi-band images are refused for now: Pillow would clip or drop values without a word. Of 16-bit colour PNGs
Pillow keeps the upper 8 bits, and so do we.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Shaped, UInt8
from PIL import Image, ImageOps
from torch import Tensor

MAX_PIXELS = 64_000_000
"""Larger images are refused before they are decoded."""

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".npy"})
"""Endings of files that are taken for images; the content decides how they are read."""

_PILLOW_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})


class DecodeError(Exception):
    """The bytes are no image that can be decoded faithfully; the message is the reason."""


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
        no_data: Value of pixels without data, as stored.
    """

    channels: int = 3
    value_range: tuple[float, float] | None = None
    no_data: float | None = None

    def __call__(self, content: bytes) -> Sample:
        """Decode the bytes of one file.

        Raises:
            DecodeError: Damaged, too large, or of a kind that would not come out faithfully.
        """
        return Sample(decode(content, self.channels))


RGB = Decoder()
"""Of 8-bit colour images."""


def decode(content: bytes, channels: int) -> UInt8[Tensor, "c h w"]:
    """Decode one image.

    Args:
        content: The file's bytes.
        channels: How many channels the result must have.

    Raises:
        DecodeError: Damaged, too large, or of a kind that would not come out faithfully.
    """
    if not content:
        raise DecodeError("empty file")
    try:
        if content.startswith(b"\x93NUMPY"):
            return _decode_array(content, channels)
        return _decode_picture(content, channels)
    except DecodeError:
        raise
    except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, TypeError, ... on damaged files
        raise DecodeError(f"{type(error).__name__}: {error}") from error


def _decode_array(content: bytes, channels: int) -> UInt8[Tensor, "c h w"]:
    array = np.load(io.BytesIO(content), allow_pickle=False)
    if array.dtype != np.uint8:
        raise DecodeError(f"array of type {array.dtype}; only uint8 is read for now")
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and array.shape[-1] == channels:
        array = array.transpose(2, 0, 1)
    if array.ndim != 3 or array.shape[0] != channels:
        raise DecodeError(f"array of shape {array.shape} does not hold {channels} channels")
    if array.size == 0:
        raise DecodeError("image without pixels")
    if array[0].size > MAX_PIXELS:
        raise DecodeError(f"{array.shape[2]}x{array.shape[1]} pixels are more than {MAX_PIXELS:,}")
    return torch.from_numpy(np.ascontiguousarray(array))


def _decode_picture(content: bytes, channels: int) -> UInt8[Tensor, "c h w"]:
    if channels not in (1, 3):
        raise DecodeError(f"a picture file cannot be read as {channels} channels; use .npy arrays")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged EXIF and large-image warnings: both are handled here
        with Image.open(io.BytesIO(content)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise DecodeError(f"{picture.width}x{picture.height} pixels are more than {MAX_PIXELS:,}")
            bits = _bits_per_sample(picture)
            if picture.mode not in _PILLOW_MODES or any(bit > 8 for bit in bits):
                raise DecodeError(f"mode {picture.mode} with {max(bits, default=8)} bits per sample is not read yet")
            if len(bits) > 4:
                raise DecodeError(f"{len(bits)} bands; Pillow reads only the first")
            if 0 in getattr(picture, "tag_v2", {}).get(338, ()):  # ExtraSamples: neither colour nor alpha
                raise DecodeError(f"{len(bits)} bands; Pillow would drop those that are neither colour nor alpha")
            picture.load()
            upright = ImageOps.exif_transpose(picture)
            has_alpha = "A" in upright.mode or "a" in upright.mode or "transparency" in upright.info
            if has_alpha:
                over = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", over.size, (0, 0, 0, 255)), over)
            array = np.array(upright.convert("RGB" if channels == 3 else "L"))
    if array.size == 0:
        raise DecodeError("image without pixels")
    return torch.from_numpy(array.reshape(*array.shape[:2], channels)).permute(2, 0, 1).contiguous()


def _bits_per_sample(picture: Image.Image) -> tuple[int, ...]:
    """TIFF says how deep its samples are; of a 16-bit colour PNG Pillow would only keep 8 bits, as documented."""
    tags = getattr(picture, "tag_v2", None)
    return tuple(tags.get(258, (8,))) if tags is not None else ()
