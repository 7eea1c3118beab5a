"""The contact sheet of a source: something of everything, the extremes, what looks the same, what is damaged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch.nn import functional as F

from hardpatch.config.commands import CheckConfig
from hardpatch.data.images.colours import principal_components
from hardpatch.data.images.decode import Decoder, Sample
from hardpatch.data.images.stored import DecodeError
from hardpatch.data.sources import Source
from hardpatch.data.tools.check.look import Look

_COLUMNS = 8
_TILE, _GAP, _CAPTION, _HEADING, _LINE = 1.2, 0.08, 0.34, 0.36, 0.15
"""Inches: side of a tile, space beside it, its caption, the line above a block, a line of text."""
_EXTREMES, _PAIRS, _DAMAGED = 8, 12, 20
"""Tiles of every kind of extreme, groups of near duplicates, lines of damage."""
_SIDE = 160
"""Longer side of a picture on the sheet, pixels."""
_PAPER = 0.93
"""Grey behind pictures."""


class _Block(NamedTuple):
    heading: str
    looks: list[Look]
    breaks: list[int] = []  # noqa: RUF012  (never changed)
    """Positions before which a line stands: groups."""


def draw_sheet(source: Source, looks: Sequence[Look], near: Sequence[Sequence[str]], config: CheckConfig) -> Figure:
    """Draw it.

    Args:
        source: The images.
        looks: One at every image, in the source's order.
        near: Names of near duplicates, in groups.
        config: Of the check.
    """
    blocks = _blocks(source, looks, near, config.sheet_images)
    damaged = [look for look in looks if look.reason]
    lines = [f"{_short(source.name(look.number), 40)}: {look.reason}"[:150] for look in damaged[:_DAMAGED]]
    width = _COLUMNS * (_TILE + _GAP) + _GAP
    tall = [_HEADING + math.ceil(len(block.looks) / _COLUMNS) * (_TILE + _CAPTION) for block in blocks]
    height = 0.4 + sum(tall) + (_HEADING + (len(lines) + 1) * _LINE if lines else 0)
    figure = Figure(figsize=(width, height))
    figure.text(_GAP / width, 1 - 0.2 / height, f"{len(looks)} images of {config.data}", fontsize=9, va="center")
    top = 0.4
    for block, high in zip(blocks, tall):
        figure.text(_GAP / width, 1 - (top + 0.17) / height, block.heading, fontsize=10, fontweight="bold", va="center")
        for number, look in enumerate(block.looks):
            row, column = divmod(number, _COLUMNS)
            left, upper = _GAP + column * (_TILE + _GAP), top + _HEADING + row * (_TILE + _CAPTION)
            axis = figure.add_axes((left / width, 1 - (upper + _TILE) / height, _TILE / width, _TILE / height))
            axis.imshow(_tile(source, look, config), interpolation="nearest", aspect="auto")
            axis.axis("off")
            figure.text(
                left / width, 1 - (upper + _TILE + 0.02) / height, _caption(source, look),
                fontsize=5.5, va="top", linespacing=1.1,
            )  # fmt: skip
            if number in block.breaks and column:
                middle = (left - _GAP / 2) / width
                span = (1 - upper / height, 1 - (upper + _TILE) / height)
                figure.add_artist(Line2D((middle, middle), span, color="0.3", linewidth=1))
        top += high
    if lines:
        heading = f"damaged: {len(damaged)}" + (f", the first {_DAMAGED}" if len(damaged) > _DAMAGED else "")
        figure.text(_GAP / width, 1 - (top + 0.17) / height, heading, fontsize=10, fontweight="bold", va="center")
        for number, line in enumerate(lines):
            lower = 1 - (top + _HEADING + number * _LINE) / height
            figure.text(_GAP / width, lower, line.replace("$", r"\$"), fontsize=6.5, va="top")
    return figure


def _blocks(source: Source, looks: Sequence[Look], near: Sequence[Sequence[str]], count: int) -> list[_Block]:
    """What is shown."""
    good = [look for look in looks if not look.reason and look.about]
    if not good:
        return []
    spread = [good[int(i)] for i in np.linspace(0, len(good) - 1, min(count, len(good)))]
    blocks = [_Block(f"some of all, {len(spread)} of {len(good)}", spread)]
    if len(good) > len(spread):
        pixels = sorted(good, key=lambda look: look.about.width * look.about.height)  # type: ignore[union-attr]
        aspects = sorted(good, key=_aspect)
        half = min(_EXTREMES // 2, len(good) // 2)
        for ranked, heading, differ in (
            (pixels, "smallest and largest", len({look.about[1:3] for look in good}) > 1),  # type: ignore[index]
            (aspects, "tallest and widest", _aspect(aspects[0]) < _aspect(aspects[-1])),
        ):
            if differ:
                blocks.append(_Block(heading, [*ranked[:half], *ranked[len(ranked) - half :]], [half]))
    if near:
        by_name = {source.name(look.number): look for look in good}
        groups = [[by_name[name] for name in group[:_COLUMNS]] for group in near[:_PAIRS]]
        starts = np.cumsum([0, *map(len, groups)]).tolist()
        heading = f"near duplicates, {len(groups)} of {len(near)} groups"
        blocks.append(_Block(heading, [look for group in groups for look in group], starts[1:-1]))
    return blocks


def _aspect(look: Look) -> float:
    assert look.about is not None
    return look.about.width / look.about.height


def _caption(source: Source, look: Look) -> str:
    about = look.about
    assert about is not None
    what = f"{about.width}x{about.height} {about.format} {about.bands}{'+a' if about.alpha else ''} {about.depth}"
    return f"{_short(source.name(look.number), 30)}\n{what}".replace("$", r"\$")


def _tile(source: Source, look: Look, config: CheckConfig) -> UInt8[np.ndarray, "h w 3"]:
    """The whole picture on a square."""
    square = np.full((_SIDE, _SIDE, 3), round(255 * _PAPER), np.uint8)
    about = look.about
    assert about is not None
    try:
        if about.format == "made":
            sample = source.read(look.number)
        else:
            sample = Decoder(config.channels or about.bands, look.ends_or_none(), config.no_data)(
                source.content(look.number)
            )
    except (DecodeError, OSError):  # gone since it was looked at
        return square
    picture = displayed(sample)
    top, left = (_SIDE - picture.shape[0]) // 2, (_SIDE - picture.shape[1]) // 2
    square[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return square


def displayed(sample: Sample, *, side: int = _SIDE) -> UInt8[np.ndarray, "h w 3"]:
    """An image small and as three colours: deep ones stretched between percentiles, bands by their principal ones.

    Args:
        sample: Any image.
        side: Its longer side afterwards, pixels.
    """
    image = sample.image.float()
    scale = side / max(image.shape[1:])
    size = [max(1, round(length * scale)) for length in image.shape[1:]]
    small = F.interpolate(image[None], size, mode="bilinear", antialias=scale < 1)[0] if scale < 1 else (
        F.interpolate(image[None], size, mode="nearest")[0]
    )  # fmt: skip
    bands = len(small) not in (1, 3)
    if bands:
        small = torch.einsum("kc,chw->khw", principal_components([small]), small)
    if bands or sample.image.is_floating_point():
        values = small.flatten(1) if bands else small.reshape(1, -1)  # components each for itself, colours together
        low, high = torch.quantile(values, torch.tensor([0.01, 0.99]), dim=1)[..., None, None]
        small = (small - low) * (255 / (high - low).clamp(min=1e-12))
    shown = small.clamp(0, 255).round().to(torch.uint8).expand(3, -1, -1)
    return np.asarray(shown.permute(1, 2, 0).numpy())


def _short(path: str, most: int) -> str:
    """The last part of a name, its beginning cut where it is long."""
    last = PurePath(path.rpartition(":")[2]).name.strip()
    return last if len(last) <= most else "…" + last[1 - most :]
