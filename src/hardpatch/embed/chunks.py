"""Work in parts that survive a kill: a folder beside the output, one file per part of the source.

    OUT.parts/settings.json     what decides the result; another one is refused
    OUT.parts/00000003.npz      images 3 * size to 4 * size - 1 of the source, written whole or not at all

Which images a part holds depends on nothing but its number, so that any number of processes, also another number than
before, can share them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hardpatch.data.loader.loading import Damage
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.files import write_atomically, write_text_atomically


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

    def claim(self, settings: dict[str, Any]) -> None:
        """Start, or go on with what is there.

        Args:
            settings: Everything that decides the result, plain values.

        Raises:
            InputError: Parts of a job with other settings are there, or nothing can be written.
        """
        file = self.path / "settings.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not file.is_file():
                write_text_atomically(file, json.dumps(settings, indent=2) + "\n")
                return
            before = json.loads(file.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise InputError(f"out: cannot use {str(self.path)!r}: {error}") from error
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
        with np.load(self.file(number)) as content:
            columns = {name: content[name] for name in content.files if name != "damaged"}
            return Part(columns, [Damage(*item) for item in json.loads(str(content["damaged"]))])

    def column(self, number: int, name: str) -> np.ndarray:
        """One column of a finished part, or its ``damaged``; the others are not read."""
        with np.load(self.file(number)) as content:
            array: np.ndarray = content[name]
            return array
