"""What Pillow reads: JPEG, PNG, WebP, GIF, BMP, AVIF, and the kinds of TIFF that it converts well.

16-bit PNG is read by imagecodecs, since Pillow keeps only the high byte of its colours. AVIF of more than 8 bits comes
out in 8, as every viewer shows it.
"""

from __future__ import annotations

import functools
import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from hardpatch.data.images.stored import (
    MAX_PIXELS,
    Colour,
    DecodeError,
    Description,
    Stored,
    check_size,
    type_range,
    upright,
    upright_size,
)

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "AVIF", "TIFF")
"""Only these: some of Pillow's other readers start programs or follow links."""

_MODES = {"P": "palette", "PA": "palette", "CMYK": "cmyk", "LAB": "lab", "1": "grey", "L": "grey", "LA": "grey"}
_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_SCAN_PIXELS = 20 * MAX_PIXELS
"""Pixels times scans of a progressive JPEG: a small file can ask for thousands of scans."""


def describe(content: bytes) -> Description:
    """From the header."""
    deep = _check_png(content, whole=False) if content.startswith(_PNG) else 8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _opened(content) as picture:
            orientation = _orientation_before_loading(picture, content)
            width, height = upright_size(*picture.size, orientation)
            mode = _MODES.get(picture.mode, "rgb" if not picture.mode.startswith("I") else "grey")
            name = {"MPO": "JPEG", "DIB": "BMP"}.get(picture.format or "", picture.format or "?")
            return Description(
                name, width, height, 1 if mode == "grey" else 3, picture.has_transparency_data, mode,
                1 if picture.mode == "1" else deep, orientation=orientation, frames=_count_frames(picture),
            )  # fmt: skip


def read(content: bytes, channels: int | None) -> Stored:
    """The first frame."""
    bits = 8
    if content.startswith(_PNG):
        bits = _check_png(content, whole=True)
    elif content.startswith(b"\xff\xd8"):
        _check_scans(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged EXIF and large-image warnings: both are handled here
        with _opened(content) as picture:
            if bits == 16:
                pixels = _decode_deep_png(content)
                return _split(upright(pixels, _orientation_before_loading(picture, content)))
            picture.load()
            orientation = _orientation(picture)  # Pillow turns TIFFs itself, and then drops the tag
            return _split(upright(_as_array(picture), orientation))


def _opened(content: bytes) -> Image.Image:
    if content.startswith(b"RIFF"):
        check_size(*_webp_size(content))  # Pillow would make room for all pixels
    try:
        picture = Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError:  # its message holds an address in memory
        raise DecodeError(
            f"no image, damaged in its header, or of a kind that is not read; it begins with {content[:16]!r}"
        ) from None
    check_size(*picture.size)
    return picture


def _as_array(picture: Image.Image) -> np.ndarray:
    """Grey or RGB, with alpha where there is transparency: (H, W) or (H, W, 2, 3 or 4)."""
    mode = picture.mode
    if mode in ("L", "RGB") and "transparency" not in picture.info:
        return np.asarray(picture)
    if mode == "LAB":
        return np.asarray(ImageCms.applyTransform(picture, _lab_to_rgb()))
    if mode in ("LA", "La"):
        return np.asarray(picture.convert("LA"))
    if mode in ("1", "L"):
        return np.asarray(picture.convert("LA" if "transparency" in picture.info else "L"))
    if picture.has_transparency_data:
        return np.asarray(picture.convert("RGBA"))
    if mode in ("P", "PA", "RGBX", "CMYK", "YCbCr", "RGBa"):
        return np.asarray(picture.convert("RGB"))
    raise DecodeError(f"{picture.format} of mode {mode} is not read")


@functools.cache
def _lab_to_rgb() -> Any:
    """CIE Lab (D50) to sRGB."""
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


def _split(array: np.ndarray) -> Stored:
    """Pixels and alpha."""
    if array.ndim == 2:
        array = array[..., None]
    bands = array.shape[2]
    colour: Colour = "grey" if bands <= 2 else "rgb"
    if bands in (2, 4):
        return Stored(array[..., :-1], colour, type_range(array.dtype), array[..., -1])
    return Stored(array, colour, type_range(array.dtype))


def _orientation(picture: Image.Image) -> int:
    """Of a picture that was loaded; damaged metadata mean upright."""
    try:
        return int(picture.getexif().get(0x0112, 1))
    except Exception:  # Pillow raises whatever its parsers raise
        return 1


def _orientation_before_loading(picture: Image.Image, content: bytes) -> int:
    """Of a picture that was only opened; a PNG is decoded by Pillow only where metadata stand behind its pixels."""
    if picture.format == "PNG" and not picture.info.keys() & {"exif", "xmp", "Raw profile type exif"}:
        behind = content[max(0, content.rfind(b"IDAT")) :]
        if not any(kind in behind for kind in (b"eXIf", b"iTXt", b"zTXt", b"tEXt")):
            return 1
    return _orientation(picture)


def _count_frames(picture: Image.Image) -> int:
    try:
        return int(getattr(picture, "n_frames", 1))
    except Exception:  # damaged further on
        return 1


def _check_png(content: bytes, *, whole: bool) -> int:
    """Go through the chunks; bits per value.

    Args:
        content: The file.
        whole: Also that nothing is cut off and that the checksums of all chunks with pixels are right.

    Raises:
        DecodeError: They are not.
    """
    if len(content) < 33 or content[12:16] != b"IHDR":
        raise DecodeError("PNG without a header")
    width, height, bits, colour = struct.unpack_from(">IIBB", content, 16)
    check_size(width, height, bytes_per_pixel=2 * {0: 2, 2: 4}.get(colour, 4) if bits == 16 else 4)
    position = len(_PNG)
    while whole:
        if position + 12 > len(content):
            raise DecodeError("PNG cut off")
        length, kind = struct.unpack_from(">I4s", content, position)
        end = position + 8 + length
        if end + 4 > len(content):
            raise DecodeError(f"PNG cut off in its chunk {kind.decode('latin-1')}")
        if kind[:1].isupper() or kind == b"tRNS":
            (checksum,) = struct.unpack_from(">I", content, end)
            if zlib.crc32(memoryview(content)[position + 4 : end]) != checksum:
                raise DecodeError(f"PNG whose checksum of {kind.decode('latin-1')} is wrong")
        if kind == b"IEND":
            break
        position = end + 4
    return int(bits)


def _decode_deep_png(content: bytes) -> np.ndarray:
    """uint16; a transparent value has become alpha."""
    import imagecodecs

    pixels: np.ndarray = imagecodecs.png_decode(content)
    return pixels


def _check_scans(content: bytes) -> None:
    """Refuse a JPEG whose scans would take minutes."""
    scans = content.count(b"\xff\xda")
    if scans < 30:
        return
    with Image.open(io.BytesIO(content), formats=("JPEG",)) as picture:
        if scans * picture.width * picture.height > _MAX_SCAN_PIXELS:
            raise DecodeError(f"JPEG of {picture.width}x{picture.height} pixels in {scans} scans")


def _webp_size(content: bytes) -> tuple[int, int]:
    """Width and height of the canvas.

    Source: RFC 9649, sections 2.5 to 2.7.
    """
    kind = content[12:16]
    if kind == b"VP8X" and len(content) >= 30:
        return 1 + int.from_bytes(content[24:27], "little"), 1 + int.from_bytes(content[27:30], "little")
    if kind == b"VP8L" and len(content) >= 25:
        packed = int.from_bytes(content[21:25], "little")
        return 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)
    if kind == b"VP8 " and len(content) >= 30:
        width, height = struct.unpack_from("<HH", content, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise DecodeError("WebP without a header")
