"""The formats that are read: each module takes the bytes of one kind of file and returns what is stored in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from hardpatch.data.images.formats import arrays, dicom, pictures, tiff
from hardpatch.data.images.stored import DecodeError, Description, Stored

EXTENSIONS = frozenset(
    {
        ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".avif",
        ".tif", ".tiff", ".dcm", ".dicom", ".npy", ".npz",
    }
)  # fmt: skip
"""Endings of files that are taken for images; the content decides how they are read."""


class _Format(NamedTuple):
    """What a module of this package offers."""

    describe: Callable[[bytes], Description]
    """From the header alone."""
    read: Callable[[bytes, int | None], Stored]
    """All of it."""


def describe(content: bytes) -> Description:
    """What a file says of its image; nothing is decoded.

    Raises:
        DecodeError: No image, damaged in its header, or too large.
    """
    with _reasons():
        return _format_of(content).describe(content)


def read_stored(content: bytes, *, channels: int | None = None) -> Stored:
    """Decode one file, values as stored.

    Args:
        content: The file's bytes.
        channels: How many are wanted: decides which axis of an array holds the channels. None: a guess.

    Raises:
        DecodeError: Damaged, too large, or of a kind that would not come out faithfully.
    """
    with _reasons():
        return _format_of(content).read(content, channels)


def _format_of(content: bytes) -> _Format:
    if not content:
        raise DecodeError("empty file")
    if content.startswith((b"\x93NUMPY", b"PK\x03\x04")):
        return _Format(arrays.describe, arrays.read)
    if content.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return _Format(tiff.describe, tiff.read)
    if content[128:132] == b"DICM":
        return _Format(dicom.describe, dicom.read)
    return _Format(pictures.describe, pictures.read)


class _reasons:  # noqa: N801  (reads as a statement)
    """Any error while decoding becomes a :class:`DecodeError` with a reason."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Pillow alone raises OSError, ValueError, SyntaxError, TypeError, struct.error, ... on damaged files.
        if isinstance(error, Exception) and not isinstance(error, DecodeError):
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise DecodeError(f"cannot be decoded: {what}") from error
