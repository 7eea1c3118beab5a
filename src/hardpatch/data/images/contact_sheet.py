"""A contact sheet: pictures with captions, in blocks under headings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

COLUMNS = 8
_TILE, _GAP, _CAPTION, _HEADING, _LINE, _TOP, _CHART = 1.2, 0.08, 0.34, 0.36, 0.15, 0.4, 1.6
"""Inches: width of a picture, space beside it, its caption, the line above a block, a line of text, the title, a chart
with its axis."""


class Tile(NamedTuple):
    """One picture."""

    picture: UInt8[np.ndarray, "h w 3"]
    caption: str


class Block(NamedTuple):
    """Pictures that belong together."""

    heading: str
    tiles: Sequence[Tile]
    breaks: Sequence[int] = ()
    """Positions before which a line stands: groups."""


def draw_contact_sheet(
    title: str,
    blocks: Sequence[Block],
    *,
    shape: float = 1.0,
    notes: Sequence[str] = (),
    chart: Callable[[Axes], object] | None = None,
) -> Figure:
    """Draw it.

    Args:
        title: Line above.
        blocks: One below the other.
        shape: Height over width of the pictures.
        notes: Lines at the bottom; the first is their heading.
        chart: Draws into axes above the blocks.
    """
    tile_height = _TILE * shape
    width = COLUMNS * (_TILE + _GAP) + _GAP
    tall = [_HEADING + math.ceil(len(block.tiles) / COLUMNS) * (tile_height + _CAPTION) for block in blocks]
    top = _TOP + (_CHART if chart else 0)
    height = top + sum(tall) + (_HEADING + len(notes) * _LINE if notes else 0)
    figure = Figure(figsize=(width, height))

    def write(text: str, left: float, lower: float, **look: Any) -> None:
        figure.text(left / width, 1 - lower / height, text, parse_math=False, **look)

    def axes(left: float, upper: float, wide: float, high: float) -> Axes:
        return figure.add_axes((left / width, 1 - (upper + high) / height, wide / width, high / height))

    write(title, _GAP, _TOP / 2, fontsize=9, va="center")
    if chart:
        chart(axes(0.6, _TOP, width - 0.8, _CHART - 0.5))
    for block, high in zip(blocks, tall):
        write(block.heading, _GAP, top + 0.17, fontsize=10, fontweight="bold", va="center")
        for number, (picture, caption) in enumerate(block.tiles):
            row, column = divmod(number, COLUMNS)
            left, upper = _GAP + column * (_TILE + _GAP), top + _HEADING + row * (tile_height + _CAPTION)
            axis = axes(left, upper, _TILE, tile_height)
            axis.imshow(picture, interpolation="nearest", aspect="auto")
            axis.axis("off")
            write(caption, left, upper + tile_height + 0.02, fontsize=5.5, va="top", linespacing=1.1)
            if number in block.breaks and column:
                middle, ends = (left - _GAP / 2) / width, (upper, upper + tile_height)
                figure.add_artist(
                    Line2D((middle, middle), [1 - end / height for end in ends], color="0.3", linewidth=1)
                )
        top += high
    for number, note in enumerate(notes):
        heading: dict[str, Any] = {"fontsize": 10, "fontweight": "bold"} if number == 0 else {"fontsize": 6.5}
        write(note, _GAP, top + (0.07 if number == 0 else _HEADING + (number - 1) * _LINE), va="top", **heading)
    return figure


def short_name(path: str, most: int = 30) -> str:
    """The last part of a name, its beginning cut where it is long."""
    last = PurePath(path.rpartition(":")[2]).name.strip()
    return last if len(last) <= most else "…" + last[1 - most :]
