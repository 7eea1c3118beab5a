"""What a piece of work came to, in blocks that the terminal prints and the report page shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """Rows of text under a header."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    folded: str = ""
    """On the page it stands folded away under this title; empty: it stands open."""


class Picture(NamedTuple):
    """A .png beside the figures."""

    path: str
    title: str


class Tile(NamedTuple):
    """The one figure that stands at the top of the page."""

    value: str
    name: str
    note: str
    """What to hold it against."""
    outcome: str = ""
    """Of the verdict that stands on it: gives the tile its colour."""


class Section(NamedTuple):
    """A part of the report."""

    title: str
    blocks: Sequence[str | Table | Picture]
    """A string is a paragraph."""
    tile: Tile | None = None


def decimals(value: float | None, places: int = 2) -> str:
    """A figure as text, ``-`` where there is none."""
    return "-" if value is None else f"{value:.{places}f}"
