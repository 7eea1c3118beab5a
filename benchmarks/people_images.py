"""Tiny images of every kind for ``people_files.py``, and what each must be read as, by the rules of docs/data.md."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

SIDE = 16


class Picture(NamedTuple):
    """One image."""

    content: bytes
    ending: str
    values: np.ndarray
    """(C, H, W) float64: what must be read; 0..255 spans the value range."""
    channels: int
    value_range: tuple[float, float] | None
    """What a user would give; None: 8 bits."""
    tolerance: float
    label: str
    """Of two classes."""
    name: str
    """Of its file."""
    cut: bool
    """Is the end of the file missing?"""


def _raw(n: int, channels: int, highest: float = 255) -> np.ndarray:
    """(H, W, C) whole numbers from 0 to ``highest``: smooth, each image its own, with both ends in it."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    draw = np.random.default_rng(n)
    waves = [np.sin(a * x + b) + np.cos(c * y + d) for a, b, c, d in draw.uniform(1, 5, (channels, 4))]
    values = np.stack(waves, -1)
    values = (values - values.min()) / (values.max() - values.min())
    return np.rint(values * highest)


def _pillow(array: np.ndarray, kind: str, mode: str | None = None, **options: object) -> bytes:
    image = Image.fromarray(array)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def _tiff(array: np.ndarray, **options: object) -> bytes:
    import tifffile

    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **{"metadata": None, **options})  # type: ignore[arg-type]
    return buffer.getvalue()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _npz(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, array)
    return buffer.getvalue()


def _deep_png(array: np.ndarray) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.png_encode(array))


def _decoded(content: bytes) -> np.ndarray:
    """What Pillow makes of a lossy file, (H, W, C)."""
    array = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    return array.astype(np.float64)


def _alpha(n: int) -> np.ndarray:
    """Smooth opacity, never nothing, so that no pixel is without data."""
    return (1 + np.rint(254 * _raw(n + 1000, 1)[..., 0] / 255)).astype(np.uint8)


def _made(kind: str, n: int) -> tuple[bytes, str, np.ndarray, tuple[float, float] | None, float]:
    """Content, ending, expected values (H, W, C) in units of the file, value range, tolerance."""
    rgb = _raw(n, 3).astype(np.uint8)
    grey = _raw(n, 1)[..., 0].astype(np.uint8)
    match kind:
        case "png":
            return _pillow(rgb, "PNG"), "png", rgb, None, 0
        case "jpg":
            content = _pillow(rgb, "JPEG", quality=95)
            return content, "jpg", _decoded(content), None, 4
        case "upper-case jpeg":
            content = _pillow(rgb, "JPEG", quality=95)
            return content, "JPEG", _decoded(content), None, 4
        case "progressive jpg":
            content = _pillow(rgb, "JPEG", quality=95, progressive=True)
            return content, "jpg", _decoded(content), None, 4
        case "webp":
            return _pillow(rgb, "WEBP", lossless=True), "webp", rgb, None, 0
        case "bmp":
            return _pillow(rgb, "BMP"), "bmp", rgb, None, 0
        case "grey png":
            return _pillow(grey, "PNG"), "png", np.stack([grey] * 3, -1), None, 0
        case "palette png":
            image = Image.fromarray(rgb).quantize(16)
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            return buffer.getvalue(), "png", np.asarray(image.convert("RGB")), None, 0
        case "rgba png":
            alpha = _alpha(n)
            content = _pillow(np.dstack([rgb, alpha]), "PNG")
            return content, "png", rgb * (alpha[..., None] / 255), None, 1
        case "grey-alpha png":
            alpha = _alpha(n)
            content = _pillow(np.dstack([grey, alpha]), "PNG")
            return content, "png", np.stack([grey * (alpha / 255)] * 3, -1), None, 1
        case "rgba of 4 channels":
            four = _raw(n, 4).astype(np.uint8)
            return _pillow(four, "PNG"), "png", four, None, 0
        case "1-bit png":
            bits = grey > 100 + n
            return _pillow(bits, "PNG", "1"), "png", np.stack([bits * 255] * 3, -1), None, 0
        case "16-bit png":
            deep = _raw(n, 1, 60000)[..., 0].astype(np.uint16)
            return _deep_png(deep), "png", deep[..., None], (0.0, 60000.0), 0.01
        case "tif":
            return _tiff(rgb, photometric="rgb"), "tif", rgb, None, 0
        case "lzw tiff":
            return _tiff(rgb, photometric="rgb", compression="zlib"), "tiff", rgb, None, 0
        case "16-bit tif":
            deep = _raw(n, 3, 4000).astype(np.uint16)
            return _tiff(deep, photometric="rgb"), "tif", deep, (0.0, 4000.0), 0.01
        case "signed tif":
            deep = (_raw(n, 1, 4000)[..., 0] - 1000).astype(np.int16)
            return _tiff(deep), "tif", deep[..., None], (-1000.0, 3000.0), 0.01
        case "float tif":
            real = (_raw(n, 1)[..., 0] / 25.5 - 3).astype(np.float32)
            return _tiff(real), "tif", real[..., None], (-3.0, 7.0), 0.01
        case "planar tif":
            bands = _raw(n, 5, 4000).astype(np.uint16)
            content = _tiff(bands.transpose(2, 0, 1), planarconfig="separate", photometric="minisblack")
            return content, "tif", bands, (0.0, 4000.0), 0.01
        case "pages tif":
            import tifffile

            buffer = io.BytesIO()
            with tifffile.TiffWriter(buffer) as writer:
                for page in (rgb, 255 - rgb, rgb // 2):
                    writer.write(page, photometric="rgb", metadata=None)
            return buffer.getvalue(), "tif", rgb, None, 0
        case "animated gif":
            first = Image.fromarray(rgb).quantize(32)
            buffer = io.BytesIO()
            first.save(buffer, "GIF", save_all=True, append_images=[Image.fromarray(255 - rgb).quantize(32)])
            return buffer.getvalue(), "gif", _decoded(buffer.getvalue()), None, 0
        case "npy":
            return _npy(rgb), "npy", rgb, None, 0
        case "float npy":
            real = _raw(n, 1)[..., 0] / 25.5 - 3
            return _npy(real), "npy", real[..., None], (-3.0, 7.0), 0.01
        case "planes npy":
            bands = _raw(n, 5, 4000).astype(np.uint16)
            return _npy(np.ascontiguousarray(bands.transpose(2, 0, 1))), "npy", bands, (0.0, 4000.0), 0.01
        case "npz":
            return _npz(rgb), "npz", rgb, None, 0
        case "wrong ending":
            return _pillow(rgb, "PNG"), "jpg", rgb, None, 0
    raise KeyError(kind)


FORMATS = (
    "png", "jpg", "upper-case jpeg", "progressive jpg", "webp", "bmp", "grey png", "palette png", "rgba png",
    "grey-alpha png", "rgba of 4 channels", "1-bit png", "16-bit png", "tif", "lzw tiff", "16-bit tif", "signed tif",
    "float tif", "planar tif", "pages tif", "animated gif", "npy", "float npy", "planes npy", "npz", "wrong ending",
)  # fmt: skip


def make_picture(kind: str, n: int, *, cut: bool = False) -> Picture:
    """The n-th image of a format.

    Args:
        kind: One of :data:`FORMATS`.
        n: Each has other pixels.
        cut: Leave half of the file out.
    """
    content, ending, values, value_range, tolerance = _made(kind, n)
    expected = np.asarray(values, np.float64).transpose(2, 0, 1)
    if value_range:
        expected = (expected - value_range[0]) / (value_range[1] - value_range[0]) * 255
    if cut:
        content = content[: len(content) // 2]
    return Picture(content, ending, expected, len(expected), value_range, tolerance, "", "", cut)
