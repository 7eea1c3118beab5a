"""What ``hardpatch data check`` can be told: kept apart from what it does, so that ``--help`` need not import it."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional


@dataclass(frozen=True)
class CheckConfig:
    """Read every file of a source and say what is there: sizes, channels, depths, damage, duplicates.

    Nothing is changed. Damaged files are listed, the exit code is 0 all the same.
    """

    data: Positional[str]
    """Images, any source."""
    out: str = ""
    """Folder for the tables, a list of the good files and a contact sheet; none: only print."""
    channels: int | None = None
    """Read every image as so many channels, as a run would; none: as many as it has."""
    no_data: float | None = None
    """Value of pixels without data, as stored; none: what a file itself names."""
    near_bits: int = 6
    """Images whose perceptual hashes differ in so many of 64 bits at most are near duplicates."""
    sheet_images: int = 24
    """Images on the contact sheet that stand for all."""
    timeout: float = 60.0
    """Seconds after which a file that is still not decoded counts as damaged."""
    workers: int | None = None
    """Processes; none: one per core."""
