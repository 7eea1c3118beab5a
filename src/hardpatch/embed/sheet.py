"""The contact sheet: the easiest and the hardest images of a source, for curation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hardpatch.data.images.contact_sheet import Block, Tile, draw_contact_sheet, short_name
from hardpatch.data.loader.loading import Cover
from hardpatch.data.sources import Source
from hardpatch.figures.display import Display, hatched


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
    cover, blocks, some_without_data = Cover(size), [], False
    for name, end in (("easiest", easiest), ("hardest", hardest)):
        tiles = []
        for item in end:
            sample = source.read(item.position)
            valid = None if sample.valid is None else cover(sample.valid[None])
            picture = hatched(display.pixels(cover(sample.image).unsqueeze(0)), valid)[0]
            tiles.append(Tile(picture, f"{item.difficulty:.3g}  #{item.position}\n{short_name(item.path)}"))
            some_without_data |= valid is not None
        blocks.append(Block(f"{name} {len(end)}, {name} first", tiles))

    def histogram(axis: Axes) -> None:
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

    title += "; hatched: no data" if some_without_data else ""
    return draw_contact_sheet(title, blocks, shape=size[0] / size[1], chart=histogram)
