"""The contact sheet of a source: something of everything, the extremes, what looks the same, what is damaged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from matplotlib.figure import Figure
from torch.nn import functional as F

from hardpatch.config.commands import CheckConfig
from hardpatch.data.images.colours import principal_components
from hardpatch.data.images.contact_sheet import COLUMNS, Block, Tile, draw_contact_sheet, short_name
from hardpatch.data.images.decode import Decoder, Sample
from hardpatch.data.images.stored import DecodeError
from hardpatch.data.sources import Source
from hardpatch.data.tools.check.look import Look

_EXTREMES, _PAIRS, _DAMAGED = 8, 12, 20
"""Tiles of every kind of extreme, groups of near duplicates, lines of damage."""
_SIDE = 160
"""Longer side of a picture on the sheet, pixels."""
_PAPER = 237
"""Grey behind pictures."""


def draw_sheet(source: Source, looks: Sequence[Look], near: Sequence[Sequence[str]], config: CheckConfig) -> Figure:
    """Draw it.

    Args:
        source: The images.
        looks: One at every image, in the source's order.
        near: Names of near duplicates, in groups.
        config: Of the check.
    """

    def block(heading: str, shown: Sequence[Look], breaks: Sequence[int] = ()) -> Block:
        return Block(heading, [_tile(source, look, config) for look in shown], breaks)

    good = [look for look in looks if look.about]
    spread = [good[int(i)] for i in np.linspace(0, len(good) - 1, min(config.sheet_images, len(good)))]
    blocks = [block(f"some of all, {len(spread)} of {len(good)}", spread)] if good else []
    if len(good) > len(spread):
        half = min(_EXTREMES // 2, len(good) // 2)
        sizes = np.array([look.about[1:3] for look in good if look.about], float)
        for measured, heading in (
            (sizes.prod(axis=1), "smallest and largest"),
            (sizes[:, 0] / sizes[:, 1], "tallest and widest"),
        ):
            if np.ptp(measured):
                ranked = [good[place] for place in measured.argsort(kind="stable")]
                blocks.append(block(heading, [*ranked[:half], *ranked[len(ranked) - half :]], [half]))
    if near:
        by_name = {source.name(look.number): look for look in good}
        groups = [[by_name[name] for name in group[:COLUMNS]] for group in near[:_PAIRS]]
        starts = np.cumsum([0, *map(len, groups)]).tolist()
        heading = f"near duplicates, {len(groups)} of {len(near)} groups"
        blocks.append(block(heading, [look for group in groups for look in group], starts[1:-1]))
    damaged = [look for look in looks if look.reason]
    notes = [f"{short_name(source.name(look.number), 40)}: {look.reason}"[:150] for look in damaged[:_DAMAGED]]
    if notes:
        notes.insert(0, f"damaged: {len(damaged)}" + (f", the first {_DAMAGED}" if len(damaged) > _DAMAGED else ""))
    return draw_contact_sheet(f"{len(looks)} images of {config.data}", blocks, notes=notes)


def _tile(source: Source, look: Look, config: CheckConfig) -> Tile:
    """The whole picture on a square."""
    about = look.about
    assert about is not None
    square = np.full((_SIDE, _SIDE, 3), _PAPER, np.uint8)
    what = f"{about.width}x{about.height} {about.format} {about.bands}{'+a' if about.alpha else ''} {about.depth}"
    tile = Tile(square, f"{short_name(source.name(look.number))}\n{what}")
    ends = look.ends if look.ends and look.ends[0] < look.ends[1] else None
    try:
        if about.format == "made":
            sample = source.read(look.number)
        else:
            content = source.content(look.number)
            sample = Decoder(config.channels or about.bands, ends, config.no_data)(content)
    except (DecodeError, OSError):  # gone since it was looked at
        return tile
    picture = displayed(sample)
    top, left = (_SIDE - picture.shape[0]) // 2, (_SIDE - picture.shape[1]) // 2
    square[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return tile


def displayed(sample: Sample, *, side: int = _SIDE) -> UInt8[np.ndarray, "h w 3"]:
    """An image small and as three colours: deep ones stretched between percentiles, bands by their principal ones.

    Args:
        sample: Any image.
        side: Its longer side afterwards, pixels.
    """
    image = sample.image.float()
    scale = side / max(image.shape[1:])
    size = [max(1, round(length * scale)) for length in image.shape[1:]]
    filtered = {"mode": "bilinear", "antialias": True} if scale < 1 else {"mode": "nearest"}
    small = F.interpolate(image[None], size, **filtered)[0]
    bands = len(small) not in (1, 3)
    if bands:
        small = torch.einsum("kc,chw->khw", principal_components([small]), small)
    if bands or sample.image.is_floating_point():
        values = small.flatten(1) if bands else small.reshape(1, -1)  # components each for itself, colours together
        low, high = torch.quantile(values, torch.tensor([0.01, 0.99]), dim=1)[..., None, None]
        small = (small - low) * (255 / (high - low).clamp(min=1e-12))
    shown = small.clamp(0, 255).round().to(torch.uint8).expand(3, -1, -1)
    return np.asarray(shown.permute(1, 2, 0).numpy())
