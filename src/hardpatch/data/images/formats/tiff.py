"""TIFF and BigTIFF: any number of bands, packed or in planes, any depth.

Pillow reads palettes, ink, Lab, luma and chroma and what has fewer than 8 bits, all of which it converts well; grey,
colour and bands of 8 bits and more are read by tifffile, since Pillow would drop bands or bits without a word.
"""

from __future__ import annotations

import functools
import io
import logging
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from hardpatch.data.images.formats import pictures
from hardpatch.data.images.stored import (
    Colour,
    DecodeError,
    Description,
    Kind,
    Stored,
    check_size,
    type_range,
    upright,
    upright_size,
)

_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB, _PALETTE, _CMYK, _YCBCR, _LAB = 0, 1, 2, 3, 5, 6, 8
_MODES = {_PALETTE: "palette", _CMYK: "cmyk", _YCBCR: "rgb", _LAB: "lab"}
_JPEG = (6, 7)
_UNSIGNED = 1
_KINDS: dict[int, Kind] = {2: "signed", 3: "float"}


class _Layout(NamedTuple):
    """How the first page is to be read."""

    colour: Colour
    alpha: int | None
    """Which sample is alpha."""
    by_pillow: bool


def describe(content: bytes) -> Description:
    """From the tags of the first page."""
    with _opened(content) as file:
        page = file.pages.first
        layout = _layout(page)
        orientation = _orientation(page)
        width, height = upright_size(page.imagewidth, page.imagelength, orientation)
        photometric = _photometric(page)
        bands = 3 if photometric in _MODES else page.samplesperpixel - (layout.alpha is not None)
        mode, kind = _MODES.get(photometric, layout.colour), _KINDS.get(page.sampleformat, "unsigned")
        return Description(
            "TIFF", width, height, bands, layout.alpha is not None, mode, page.bitspersample, kind, orientation,
            _count_pages(file),
        )  # fmt: skip


def read(content: bytes, channels: int | None) -> Stored:
    """The first page."""
    with _opened(content) as file:
        page = file.pages.first
        layout = _layout(page)
        no_data = _no_data(page)
        if layout.by_pillow:
            _check_cut(page, len(content), math.prod(map(int, page.chunked)))
            return pictures.read(content, channels)._replace(no_data=no_data)
        pixels, present = _pixels(page, len(content))
        orientation = _orientation(page)
        unsigned = page.sampleformat == _UNSIGNED
        photometric, extras = _photometric(page), page.extrasamples
    if present is not None:
        present = upright(present, orientation)
    pixels = upright(pixels, orientation)
    alpha, premultiplied = None, False
    if layout.alpha is not None:
        alpha = pixels[..., layout.alpha]
        premultiplied = extras[layout.alpha - pixels.shape[2]] == 1
        pixels = np.delete(pixels, layout.alpha, axis=2)
    return Stored(
        pixels, layout.colour, type_range(pixels.dtype, bits=page.bitspersample), alpha, premultiplied,
        inverted=photometric == _MIN_IS_WHITE and unsigned, no_data=no_data, present=present,
    )  # fmt: skip


@functools.cache
def _tifffile() -> Any:
    """The library, its complaints about damaged tags silenced: the files are reported here, by name."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)
    return tifffile


@contextmanager
def _opened(content: bytes) -> Iterator[Any]:
    """The file, its first page checked."""
    with _tifffile().TiffFile(io.BytesIO(content)) as file:
        if not len(file.pages):
            raise DecodeError("TIFF without a page")
        page = file.pages.first
        _check_chain(content, file.tiff, page.offset)
        if page.imagedepth != 1 or page.samplesperpixel < 1:
            raise DecodeError(f"TIFF of depth {page.imagedepth} with {page.samplesperpixel} samples")
        check_size(
            page.imagewidth,
            page.imagelength,
            bytes_per_pixel=page.samplesperpixel * max(1, math.ceil(page.bitspersample / 8)),
        )
        yield file


def _check_chain(content: bytes, form: Any, place: int) -> None:
    """Follow the pages, each of which names the place of the next.

    Raises:
        DecodeError: One is named that lies behind the end: the file is cut off, though its first page may be whole.
    """
    seen: set[int] = set()
    while place and place not in seen:
        seen.add(place)
        tags = content[place : place + form.tagnosize]
        after = (
            place
            + form.tagnosize
            + form.tagsize * (struct.unpack(form.tagnoformat, tags)[0] if len(tags) == form.tagnosize else 0)
        )
        following = content[after : after + form.offsetsize]
        if len(following) < form.offsetsize:
            raise DecodeError(f"cut off: page {len(seen)} of the TIFF lies behind its end")
        place = struct.unpack(form.offsetformat, following)[0]


def _count_pages(file: Any) -> int:
    try:
        about = (file.imagej_metadata or {}) if file.is_imagej else {}  # large stacks are behind one page
        return max(len(file.pages), int(about.get("images", 1)))
    except Exception:  # damaged further on, where nothing is read
        return 1


def _layout(page: Any) -> _Layout:
    """Decide what the samples are.

    Raises:
        DecodeError: Something that would not come out faithfully.
    """
    photometric, bits, samples = _photometric(page), page.bitspersample, page.samplesperpixel
    extras = tuple(int(extra) for extra in page.extrasamples)
    colours = samples - len(extras)
    alphas = [colours + number for number, extra in enumerate(extras) if extra in (1, 2)]
    alpha = alphas[0] if alphas else None
    if photometric in (_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB):
        others = samples - (alpha is not None)
        meant = 3 if photometric == _RGB else 1
        colour: Colour = ("rgb" if meant == 3 else "grey") if others == meant else "bands"
        simple = bits in (1, 2, 4) and page.sampleformat == _UNSIGNED and samples == 1
        jpeg = int(page.compression) in _JPEG and bits == 8 and others == meant
        return _Layout(colour, alpha, simple or jpeg)
    if photometric not in _MODES:
        raise DecodeError(f"TIFF of colour type {getattr(page.photometric, 'name', photometric)} is not read")
    known = page.sampleformat == _UNSIGNED and (bits == 8 or (photometric == _PALETTE and bits < 8))
    wanted = {_PALETTE: (1, 2) if extras == (2,) and bits == 8 else (1,), _CMYK: (4,), _YCBCR: (3, 1), _LAB: (3,)}[
        photometric
    ]
    if not known or samples not in wanted:
        raise DecodeError(
            f"TIFF of colour type {_MODES[photometric]} with {samples} samples of {bits} bits is not read"
        )
    return _Layout("rgb", alpha, by_pillow=True)


def _photometric(page: Any) -> int:
    """What the samples mean; where no tag says so, more is brighter."""
    return int(page.photometric) if 262 in page.tags else _MIN_IS_BLACK


def _orientation(page: Any) -> int:
    tag = page.tags.get(274)
    return int(tag.value) if tag is not None and isinstance(tag.value, int) else 1


def _no_data(page: Any) -> float | None:
    """What GDAL's tag names."""
    tag = page.tags.get(42113)
    try:
        return None if tag is None else float(str(tag.value).strip("\0 "))
    except ValueError:
        return None


def _pixels(page: Any, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """All samples of a page, (H, W, samples), and which pixels are there where some are left out.

    Raises:
        DecodeError: Values are missing, or a strip or tile is larger than the image may be.
    """
    if page.dtype is None:
        raise DecodeError(f"TIFF with {page.bitspersample}-bit values of format {page.sampleformat} is not read")
    if page.dtype.kind == "c":
        raise DecodeError("TIFF of complex numbers is not read; write their magnitude, or two bands, as floats")
    planes, _, height, width, contiguous = page.shaped
    tall, wide = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, height), width)
    number = math.prod(map(int, page.chunked))
    check_size(
        width, height, bytes_per_pixel=number * tall * wide * contiguous * page.dtype.itemsize / (width * height)
    )
    _check_cut(page, size, number)
    present = None
    pixels = np.zeros((planes, height, width, contiguous), page.dtype)
    for data, (plane, _, top, left, _), _ in page.segments(maxworkers=1, _fullsize=False):
        if data is None:  # GDAL leaves tiles without data out
            present = np.ones((height, width), bool) if present is None else present
            present[top : top + tall, left : left + wide] = False
            continue
        data = data[0, : height - top, : width - left]
        pixels[plane, top : top + data.shape[0], left : left + data.shape[1]] = data
    if present is not None and not present.any():
        raise DecodeError("TIFF whose tiles are all left out")
    return pixels.transpose(1, 2, 0, 3).reshape(height, width, planes * contiguous), present


def _check_cut(page: Any, size: int, number: int) -> None:
    """Are all strips or tiles inside the file?"""
    offsets, counts = page.dataoffsets[:number], page.databytecounts[:number]
    if len(offsets) < number or len(counts) < number:
        raise DecodeError(f"cut off: {min(len(offsets), len(counts))} of {number} strips or tiles")
    end = max(offset + count for offset, count in zip(offsets, counts))
    if end > size:
        raise DecodeError(f"cut off: values up to byte {end:,} of {size:,}")
