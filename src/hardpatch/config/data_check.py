"""What ``hardpatch data check`` can be told: kept apart from what it does, so that ``--help`` need not import it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from tyro.conf import Positional

from hardpatch.config.fields import NotNegative, Positive, PositiveFloat, Settings


@dataclass(frozen=True)
class CheckConfig(Settings):
    """Read every file of a source and say what is there: sizes, channels, depths, damage, duplicates.

    Nothing is changed. Damaged files are listed, the exit code is 0 all the same.
    """

    data: Positional[str]
    """Images, any source."""
    out: str = ""
    """Folder for the tables, a list of the good files and a contact sheet; none: only print."""
    channels: Positive | None = None
    """Read every image as so many channels, as a run would; none: as many as it has."""
    no_data: float | None = None
    """Value of pixels without data, as stored; none: what a file itself names."""
    near_bits: Annotated[int, Field(ge=0, le=16)] = 6
    """Images whose perceptual hashes differ in so many of 64 bits at most are near duplicates."""
    sheet_images: Positive = 24
    """Images on the contact sheet that stand for all."""
    timeout: PositiveFloat = 60.0
    """Seconds after which a file that is still not decoded counts as damaged."""
    workers: NotNegative | None = None
    """Processes; none: one per core."""
