"""The formats that are read: each module takes the bytes of one kind of file and returns what is stored in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from hardpatch.data.images.formats import arrays, dicom, pictures, tiff
from hardpatch.data.images.stored import DecodeError, Description, Stored

EXTENSIONS = frozenset(
    {
        ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".avif",
        ".tif", ".tiff", ".dcm", ".dicom", ".npy", ".npz",
    }
)  # fmt: skip
"""Endings of files that are taken for images; the content decides how they are read."""


def describe(content: bytes) -> Description:
    """What a file says of its image; nothing is decoded.

    Raises:
        DecodeError: No image, damaged in its header, or too large.
    """
    with _reasons():
        about: Description = _format_of(content).describe(content)
        return about


def read_stored(content: bytes, *, channels: int | None = None) -> Stored:
    """Decode one file, values as stored.

    Args:
        content: The file's bytes.
        channels: How many are wanted: decides which axis of an array holds the channels. None: a guess.

    Raises:
        DecodeError: Damaged, too large, or of a kind that would not come out faithfully.
    """
    with _reasons():
        stored: Stored = _format_of(content).read(content, channels)
        return stored


def _format_of(content: bytes) -> ModuleType:
    if not content:
        raise DecodeError("empty file")
    if content.startswith((b"\x93NUMPY", b"PK\x03\x04")):
        return arrays
    if content.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return tiff
    return dicom if content[128:132] == b"DICM" else pictures


@contextmanager
def _reasons() -> Iterator[None]:
    """Any error while decoding becomes a :class:`DecodeError` with a reason."""
    try:
        yield
    except DecodeError:
        raise
    except Exception as error:  # Pillow alone raises OSError, ValueError, SyntaxError, TypeError, struct.error, ...
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise DecodeError(f"cannot be decoded: {what}") from error
