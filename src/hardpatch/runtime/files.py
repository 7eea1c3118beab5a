"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from hardpatch.runtime.text import as_bytes


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file, flush it to the disk and rename it to ``path``.

    Raises:
        OSError: Writing failed (a full disk, say); ``path`` is as it was before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        flush_to_disk(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def flush_to_disk(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file, as UTF-8, that is either the old or the new one, never half; names in it keep their bytes."""
    write_atomically(path, lambda temporary: temporary.write_bytes(as_bytes(text)))
