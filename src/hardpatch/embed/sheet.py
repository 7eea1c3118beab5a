"""The contact sheet: the easiest and the hardest images of a source, for curation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hardpatch.data.loader.loading import Cover
from hardpatch.data.sources import Source
from hardpatch.figures.display import Display, hatched

_COLUMNS = 8
_TILE, _GAP, _CAPTION, _HEADING, _HISTOGRAM = 1.2, 0.06, 0.3, 0.34, 1.1
"""Inches: width of a picture, space beside it, its caption, the line above a block, the histogram."""


class Ranked(NamedTuple):
    """An image in the ranking."""

    position: int
    """In the source, from 0."""
    path: str
    difficulty: float


def ends(
    difficulty: Float[np.ndarray, " n"], positions: Sequence[int], names: Sequence[str], count: int
) -> tuple[list[Ranked], list[Ranked]]:
    """The easiest images, easiest first, and the hardest, hardest first; of a small source each stands in one of them.

    Args:
        difficulty: Of every image.
        positions: Theirs in the source.
        names: What the source calls each, by position.
        count: Images from either end.
    """
    order = np.argsort(difficulty, kind="stable")
    count = min(count, len(order) // 2)
    ranked = [Ranked(int(positions[i]), names[positions[i]], float(difficulty[i])) for i in order]
    return ranked[:count], ranked[::-1][:count]


def draw_sheet(
    source: Source,
    easiest: Sequence[Ranked],
    hardest: Sequence[Ranked],
    difficulty: Float[np.ndarray, " n"],
    *,
    display: Display,
    size: tuple[int, int],
    title: str,
) -> Figure:
    """Both ends with their scores, and where they stand among all images.

    Args:
        source: The images.
        easiest: Easiest first.
        hardest: Hardest first.
        difficulty: Of every image, for the histogram.
        display: How the run's images are shown.
        size: Height and width at which images are shown.
        title: Line above.
    """
    tile_height = _TILE * size[0] / size[1]
    rows = [math.ceil(len(end) / _COLUMNS) for end in (easiest, hardest)]
    width = _COLUMNS * (_TILE + _GAP) + _GAP
    height = _HISTOGRAM + 0.9 + sum(_HEADING + count * (tile_height + _CAPTION) for count in rows)
    figure = Figure(figsize=(width, height))

    def axis_at(left: float, top: float, wide: float, high: float) -> Axes:
        return figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))

    _histogram(axis_at(0.6, 0.36, width - 0.8, _HISTOGRAM), easiest, hardest, difficulty)
    top, some_without_data = 0.36 + _HISTOGRAM + 0.5, False
    for end, count, name in zip((easiest, hardest), rows, ("easiest", "hardest")):
        heading = f"{name} {len(end)}, {name} first"
        figure.text(_GAP / width, 1 - (top + 0.17) / height, heading, fontsize=10, fontweight="bold", va="center")
        top += _HEADING
        for number, item in enumerate(end):
            row, column = divmod(number, _COLUMNS)
            left = _GAP + column * (_TILE + _GAP)
            axis = axis_at(left, top + row * (tile_height + _CAPTION), _TILE, tile_height)
            picture, whole = _picture(source, item.position, display, size)
            some_without_data |= not whole
            axis.imshow(picture, interpolation="nearest", aspect="auto")
            axis.axis("off")
            below = 1 - (top + row * (tile_height + _CAPTION) + tile_height + 0.02) / height
            caption = f"{item.difficulty:.3g}  #{item.position}\n{_short(item.path)}"
            figure.text(left / width, below, caption, fontsize=6, va="top", linespacing=1.1)
        top += count * (tile_height + _CAPTION)
    title += "; hatched: no data" if some_without_data else ""
    figure.text(_GAP / width, 1 - 0.18 / height, title, fontsize=9, va="center")
    return figure


def _histogram(
    axis: Axes, easiest: Sequence[Ranked], hardest: Sequence[Ranked], difficulty: Float[np.ndarray, " n"]
) -> None:
    axis.hist(difficulty, bins=min(80, max(10, len(difficulty) // 20)), color="0.7")
    for end, colour, name in ((easiest, "tab:blue", "easiest"), (hardest, "tab:red", "hardest")):
        if end:
            bounds = sorted((end[0].difficulty, end[-1].difficulty))
            axis.axvspan(*bounds, color=colour, alpha=0.25, label=f"{name} shown")
    axis.set_xlabel("difficulty: mean reconstruction error", fontsize=8)
    axis.set_ylabel("images", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False)


def _picture(
    source: Source, position: int, display: Display, size: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "h w k"], bool]:
    """An image as the encoder sees it, hatched where there is no data; is all of it data?"""
    sample, cover = source.read(position), Cover(size)
    valid = None if sample.valid is None else cover(sample.valid[None])
    return hatched(display.pixels(cover(sample.image).unsqueeze(0)), valid)[0], valid is None


def _short(path: str, most: int = 26) -> str:
    """The last part of a name, its beginning cut where it is long."""
    last = PurePath(path.rpartition(":")[2]).name.strip()
    return last if len(last) <= most else "…" + last[1 - most :]
