"""Crops of JPEGs without decoding more than they need.

The crop is known before the pixels are. Where it is at least twice as large as the result, libjpeg-turbo decodes the
image at a half, a quarter or an eighth of its size, which leaves out most of the inverse transform and all of the
memory; the box moves to the nearest multiple of that, by half a pixel of the result at most. Only these three scales:
the others (3/8, 5/8, ...) have no vector code and are slower than the full size. Everything that is not a plain,
undamaged 8-bit JPEG is left to :class:`hardpatch.data.images.decode.Decoder`, whose rules hold.
"""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from hardpatch.data.images.crops import Box
from hardpatch.data.images.stored import MAX_PIXELS, upright, upright_size

SCALES = (8, 4, 2)
"""An image may be decoded so many times smaller per side."""

_APP1, _PROGRESSIVE, _PIXELS = 0xE1, 0xC2, 0xDA
_MAX_SCANS = 30
_ORIENTATION = 0x0112


class Jpeg(NamedTuple):
    """What the header of a plain JPEG says."""

    size: tuple[int, int]
    """Height and width after the EXIF orientation is applied, pixels."""
    orientation: int
    """EXIF orientation, 1 to 8."""


def read_header(content: bytes, *, channels: int) -> Jpeg | None:
    """The header, or None for what is no plain JPEG that gives so many channels.

    Args:
        content: The file's bytes.
        channels: 3 of grey or colour files; 1 of grey files only.
    """
    if channels not in (1, 3) or not content.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    if colours not in (("Gray", "YCbCr", "RGB") if channels == 3 else ("Gray",)):
        return None
    if height * width > MAX_PIXELS or not height or not width:
        return None
    markers = _markers(content)
    if markers is None or (_PROGRESSIVE in markers and content.count(b"\xff\xda") > _MAX_SCANS):
        return None
    orientation = _exif_orientation(content) if _APP1 in markers else 1
    return Jpeg(upright_size(width, height, orientation)[::-1], orientation)


def choose_scale(box: tuple[int, int], size: tuple[int, int]) -> int:
    """How many times smaller an image may be decoded so that a box of it still has the size of the result."""
    return next((scale for scale in SCALES if box[0] >= scale * size[0] and box[1] >= scale * size[1]), 1)


def scaled_box(box: Box, scale: int, size: tuple[int, int]) -> Box:
    """A box of an image in the pixels of the image that was decoded ``scale`` times smaller, to the nearest pixel.

    Args:
        box: In pixels of the image.
        scale: Of :data:`SCALES`, or 1.
        size: Height and width of the smaller image.
    """
    if scale == 1:
        return box
    top, left = round(box.top / scale), round(box.left / scale)
    bottom, right = round((box.top + box.height) / scale), round((box.left + box.width) / scale)
    bottom, right = min(bottom, size[0]), min(right, size[1])
    return Box(top, left, bottom - top, right - left, box.flip)


def decode(content: bytes, header: Jpeg, *, channels: int, scale: int) -> UInt8[Tensor, "c h w"] | None:
    """The upright image, ``scale`` times smaller; None where it is damaged in any way.

    Args:
        content: The file's bytes.
        header: What :func:`read_header` said of them.
        channels: 3, or 1 for a grey file.
        scale: Of :data:`SCALES`, or 1.
    """
    width, height = upright_size(*header.size[::-1], header.orientation)
    wanted = -(-height // scale), -(-width // scale)
    try:  # strict: a warning of libjpeg's (cut off, damaged data) is an error
        pixels: UInt8[np.ndarray, "h w c"] = simplejpeg.decode_jpeg(
            content, "RGB" if channels == 3 else "GRAY", min_height=wanted[0], min_width=wanted[1]
        )
    except ValueError:
        return None
    if pixels.shape[:2] != wanted:
        return None
    return torch.from_numpy(np.ascontiguousarray(upright(pixels, header.orientation))).permute(2, 0, 1)


def _markers(content: bytes) -> set[int] | None:
    """The segments before the pixels; None where something in their way is not understood."""
    found: set[int] = set()
    place = 2
    while content[place : place + 1] == b"\xff" and place + 3 < len(content):
        marker = content[place + 1]
        if marker == _PIXELS:
            return found
        found.add(marker)
        place += 2 + int.from_bytes(content[place + 2 : place + 4])
    return None


def _exif_orientation(content: bytes) -> int:
    """By Pillow, so that the rule is the decoder's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(content)) as picture:
                value = picture.getexif().get(_ORIENTATION, 1)
        except Exception:  # as above
            return 1
    return value if isinstance(value, int) else 1
