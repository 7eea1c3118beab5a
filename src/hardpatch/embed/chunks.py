"""Work in parts that survive a kill: a folder beside the output, one file per part of the source.

    OUT.parts/settings.json     what decides the result; another one is refused
    OUT.parts/00000003.npz      images 3 * size to 4 * size - 1 of the source, written whole or not at all

Which images a part holds depends on nothing but its number, so that any number of processes, also another number than
before, can share them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64

from hardpatch.data.loader.loading import Damage
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.files import write_atomically, write_text_atomically


class Rows(NamedTuple):
    """The columns of the table, one row per readable image; None where a column is not asked for."""

    position: Int64[np.ndarray, " n"]
    """In the source, from 0."""
    class_token: Float[np.ndarray, "n d"] | None = None
    """Class tokens of the last layer, normalised as the encoder does."""
    patch_mean: Float[np.ndarray, "n d"] | None = None
    """Mean of the patch tokens."""
    patch_tokens: Float[np.ndarray, "n p d"] | None = None
    """All patch tokens, in image order."""
    difficulty: Float[np.ndarray, " n"] | None = None
    """Mean of ``reconstruction_error``: comparable between images."""
    contrast: Float[np.ndarray, " n"] | None = None
    """Standard deviation of the pixels within a patch, root mean square over patches, in 0..1."""
    reconstruction_error: Float[np.ndarray, "n rows columns"] | None = None
    """The student's loss on each patch, averaged over masks."""
    predicted_loss: Float[np.ndarray, "n rows columns"] | None = None
    """The teacher's scores: comparable within an image only."""

    def columns(self) -> dict[str, np.ndarray]:
        """Those that are there, by name, in order."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class Part(NamedTuple):
    """A finished part."""

    rows: Rows
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
        """The file of a part."""
        return self.path / f"{number:08d}.npz"

    def is_done(self, number: int) -> bool:
        """Is a part finished?"""
        return self.file(number).is_file()

    def write(self, number: int, part: Part) -> None:
        """Keep a finished part."""
        damaged = np.array(json.dumps(part.damaged))

        def save(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, damaged=damaged, **part.rows.columns())  # type: ignore[arg-type]

        write_atomically(self.file(number), save)

    def read(self, number: int) -> Part:
        """A finished part."""
        with np.load(self.file(number)) as content:
            columns = {name: content[name] for name in content.files if name != "damaged"}
            return Part(Rows(**columns), [Damage(*item) for item in json.loads(str(content["damaged"]))])

    def column(self, number: int, name: str) -> np.ndarray:
        """One column of a finished part; the others are not read."""
        with np.load(self.file(number)) as content:
            array: np.ndarray = content[name]
            return array

    def damaged(self, number: int) -> list[Damage]:
        """Images of a finished part that could not be read."""
        return [Damage(*item) for item in json.loads(str(self.column(number, "damaged")))]

    def remove(self) -> None:
        """Forget all parts."""
        shutil.rmtree(self.path)
