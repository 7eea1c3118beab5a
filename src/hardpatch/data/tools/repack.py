"""One image as ``hardpatch data pack`` writes it: its own bytes where they are small enough, else a smaller copy."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from hardpatch.data.images import jpeg
from hardpatch.data.images.decode import Decoder, find_missing
from hardpatch.data.images.formats import describe, read_stored
from hardpatch.data.images.stored import DecodeError, Stored
from hardpatch.data.sources import Source

_KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "AVIF": "avif",
         "NPY": "npy", "NPZ": "npz", "DICOM": "dcm"}  # fmt: skip
"""Endings of files that are taken as they are, by their format."""


class Packed(NamedTuple):
    """One member of a shard."""

    content: bytes
    ending: str
    """Without the dot."""
    as_it_was: bool
    """The file's own bytes."""


def repack(source: Source, index: int, *, size: int, quality: int, decoder: Decoder) -> Packed:
    """What a shard holds for an image.

    Args:
        source: The images.
        index: Of the image.
        size: Shorter side at most, pixels.
        quality: Of JPEGs.
        decoder: How it will be read again: an image that it cannot read is damaged.

    Raises:
        DecodeError: The image is damaged.
        OSError: It cannot be read at all.
    """
    if source.decoder is None:
        made = source.read(index).image.permute(1, 2, 0).numpy()
        return _encoded(_resized(made, size), quality, alpha=None)
    content = source.content(index)
    about = describe(content)
    decoder(content)  # damaged files are found here, not in every epoch
    if min(about.height, about.width) <= size and about.format in _KEPT:
        return Packed(content, _KEPT[about.format], True)
    header = jpeg.read_header(content, channels=3 if about.bands == 3 else 1)
    if header is not None and decoder.no_data is None:
        scale = jpeg.choose_scale((min(header.size), min(header.size)), (size, size))
        image = jpeg.decode(content, header, channels=about.bands, scale=scale)
        if image is not None:
            return _encoded(_resized(image.permute(1, 2, 0).numpy(), size), quality, alpha=None)
    stored = read_stored(content, channels=decoder.channels)
    missing = find_missing(stored, decoder.no_data)
    if _stays(stored, missing is not None, decoder):
        if about.format not in _KEPT:
            raise DecodeError(f"{about.format} files of this kind cannot be packed")
        return Packed(content, _KEPT[about.format], True)
    if stored.is_deep or stored.pixels.shape[2] not in (1, 3):
        file = io.BytesIO()
        np.save(file, np.ascontiguousarray(_resized_values(stored, missing, decoder, size).transpose(2, 0, 1)))
        return Packed(file.getvalue(), "npy", False)
    return _encoded(_resized(stored.pixels, size), quality, alpha=stored.alpha)


def _stays(stored: Stored, has_missing: bool, decoder: Decoder) -> bool:
    """Would a smaller copy lose what the file says of its pixels?"""
    if stored.inverted or stored.premultiplied or (stored.is_deep and stored.alpha is not None):
        return True
    named = stored.no_data is not None or decoder.no_data is not None
    return has_missing and (not stored.is_deep or (stored.pixels.dtype.kind != "f" and not named))


def _resized(pixels: Shaped[np.ndarray, "h w c"], size: int) -> Shaped[np.ndarray, "y x c"]:
    """The shorter side at most ``size``: bicubic, antialiased; of the same type."""
    height, width = pixels.shape[:2]
    scale = min(1.0, size / min(height, width))
    wanted = max(1, round(height * scale)), max(1, round(width * scale))
    if (height, width) == wanted:
        return pixels
    given = pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32)
    image = torch.from_numpy(np.require(given, requirements=["C", "W"])).permute(2, 0, 1)
    made = functional.resize_image(image, list(wanted), InterpolationMode.BICUBIC, antialias=True)
    values: np.ndarray = made.permute(1, 2, 0).numpy()
    if pixels.dtype.kind in "ui" and values.dtype != pixels.dtype:
        ends = np.iinfo(pixels.dtype)
        values = values.astype(np.float64).round().clip(ends.min, ends.max)
    return values.astype(pixels.dtype)


def _resized_values(
    stored: Stored, missing: Bool[np.ndarray, "h w"] | None, decoder: Decoder, size: int
) -> Shaped[np.ndarray, "y x c"]:
    """With what is missing kept apart: it is filled, resized, and marked again where it was."""
    pixels = stored.pixels
    if pixels.dtype.kind == "f":
        unusable = ~np.isfinite(pixels).all(axis=2)
        missing = unusable if missing is None else missing | unusable
    if missing is None or not missing.any():
        return _resized(pixels, size)
    filled = pixels.copy()
    filled[missing] = pixels[~missing].mean(axis=0, dtype=np.float64).astype(pixels.dtype)
    made = _resized(filled, size)
    value = stored.no_data if decoder.no_data is None else decoder.no_data
    mask = torch.from_numpy(missing)[None].to(torch.uint8)
    wanted = list(made.shape[:2])
    there = functional.resize_image(mask, wanted, InterpolationMode.NEAREST)[0].bool().numpy()
    made[there] = np.nan if pixels.dtype.kind == "f" else np.array(value).astype(pixels.dtype)
    return made


def _encoded(pixels: Shaped[np.ndarray, "h w c"], quality: int, *, alpha: Shaped[np.ndarray, "y x"] | None) -> Packed:
    """A JPEG, or with transparency a PNG."""
    file = io.BytesIO()
    if alpha is None:
        Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, "JPEG", quality=quality)
        return Packed(file.getvalue(), "jpg", False)
    clear = _resized(alpha[..., None], min(pixels.shape[:2]))
    Image.fromarray(np.concatenate([pixels, clear], axis=2)).save(file, "PNG")
    return Packed(file.getvalue(), "png", False)
