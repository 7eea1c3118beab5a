"""Work in parts that survive a kill: a folder beside the output, one file per part of the source.

    OUT.parts/settings.json     what decides the result; another one is refused
    OUT.parts/00000003.npz      images 3 * size to 4 * size - 1 of the source, written whole or not at all

Which images a part holds depends on nothing but its number, so that any number of processes, also another number than
before, can share them.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from hardpatch.data.loader.loading import Damage
from hardpatch.runtime.claim import Claim
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.files import write_atomically, write_text_atomically
from hardpatch.runtime.log import warn


class Part(NamedTuple):
    """A finished part."""

    columns: dict[str, np.ndarray]
    """By name, a row per readable image."""
    damaged: list[Damage]
    """Images of the part that could not be read; they have no row."""


class Parts:
    """The folder of finished parts.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._claim: Claim | None = None

    def begin(self, settings: dict[str, Any]) -> None:
        """Start, or go on with what is there. No other process can, until :meth:`release`.

        Args:
            settings: Everything that decides the result, plain values.

        Raises:
            InputError: Parts of a job with other settings are there, another process works on them, or nothing can be
                written.
        """
        file = self.path / "settings.json"
        try:
            self._claim = Claim(self.path)
            if not file.is_file():
                write_text_atomically(file, json.dumps(settings, indent=2) + "\n")
                return
            before = json.loads(file.read_text())
        except InputError:  # another process has them
            raise
        except (OSError, ValueError) as error:
            raise InputError(f"out: cannot use {str(self.path)!r}: {error}") from error
        if not isinstance(before, dict):
            raise InputError(f"out: cannot use {str(self.path)!r}: {file.name} holds a {type(before).__name__}")
        changed = [
            f"{name}: {before.get(name)!r} -> {settings.get(name)!r}"
            for name in {**before, **settings}
            if before.get(name) != settings.get(name)
        ]
        if changed:
            raise InputError(
                f"out: {str(self.path)!r} holds parts of an unfinished job with other settings; go on with its values, "
                "choose another place, or remove the folder. Changed:\n  " + "\n  ".join(changed)
            )

    def release(self) -> None:
        """Let others go on here."""
        if self._claim is not None:
            self._claim.release()

    def file(self, number: int) -> Path:
        """The file of a part: it is there when the part is finished."""
        return self.path / f"{number:08d}.npz"

    def write(self, number: int, part: Part) -> None:
        """Keep a finished part."""
        damaged = np.array(json.dumps(part.damaged))

        def save(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, damaged=damaged, **part.columns)  # type: ignore[arg-type]

        write_atomically(self.file(number), save)

    def read(self, number: int) -> Part:
        """A finished part."""
        with self.file(number).open("rb") as file, np.load(file) as content:  # closed also where it is damaged
            columns = {name: content[name] for name in content.files if name != "damaged"}
            return Part(columns, [Damage(*item) for item in json.loads(str(content["damaged"]))])

    def is_done(self, number: int) -> bool:
        """Is this part there, and whole? A damaged one goes, and is made again."""
        if not self.file(number).is_file():
            return False
        try:
            self.read(number)  # an archive with a checksum of every column
        except (OSError, ValueError, KeyError, EOFError, TypeError, BadZipFile, zlib.error) as error:
            warn(f"{self.file(number)} is damaged, and made again: {error}")
            self.file(number).unlink()
            return False
        return True

    def column(self, number: int, name: str) -> np.ndarray:
        """One column of a finished part, or its ``damaged``; the others are not read."""
        with np.load(self.file(number)) as content:
            array: np.ndarray = content[name]
            return array
