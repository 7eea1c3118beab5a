"""Images of any number of channels and any depth as colours that a figure can show."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor

from hardpatch.config.config import Config
from hardpatch.data.images.colours import principal_components
from hardpatch.data.loader.loading import Normalise
from hardpatch.runs.build import build_normalise

ENDS = (0.01, 0.99)
"""When colours are stretched, this share of the pixels is black, and that not yet white."""


@dataclass(frozen=True)
class Display:
    """How a run's images are shown.

    Args:
        normalise: The run's normalisation.
        projection: Normalised channels to red, green and blue, 0 to 1; None: 8-bit grey or colour, shown as it is.
        offset: Added to these.
    """

    normalise: Normalise
    projection: Float[Tensor, "3 c"] | None = None
    offset: Float[Tensor, " 3"] | None = None

    def __call__(self, images: Float[Tensor, "b c h w"]) -> UInt8[np.ndarray, "b h w k"]:
        """Normalised images as RGB."""
        images = images.float().cpu()
        if self.projection is None:
            shown = self.normalise.to_display(images)
            shown = shown.expand(-1, 3, -1, -1)
        else:
            colours = torch.einsum("kc,bchw->bkhw", self.projection, images)
            shown = (colours if self.offset is None else colours + self.offset.view(-1, 1, 1)).clamp(0, 1)
        return np.asarray((shown * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())

    def pixels(self, images: Shaped[Tensor, "b c h w"]) -> UInt8[np.ndarray, "b h w k"]:
        """Images as they are read as RGB."""
        return self(self.normalise(images.cpu()))


def build_display(config: Config, images: Iterable[Shaped[Tensor, "c h w"]]) -> Display:
    """8-bit grey and colour as they are, all else stretched between its :data:`ENDS`; of more channels than three those
    that the run names (``display_channels``), else the first three principal components.

    Args:
        config: Of the run.
        images: Some images as they are read, to find ends and principal components of; they may differ in size.
    """
    normalise = build_normalise(config)
    channels, chosen = config.data.channels, config.run.display_channels
    if not chosen and channels in (1, 3):
        if not config.data.value_range:
            return Display(normalise)
        chosen = tuple(range(channels))
    pixels = torch.cat([normalise(image.cpu().unsqueeze(0))[0].flatten(1) for image in images], dim=1)
    if chosen:
        rows = torch.eye(channels)[list(chosen)]
        rows = rows if len(rows) == 3 else rows[:1].expand(3, -1)
    else:
        rows = principal_components([pixels.unsqueeze(1)])
    low, high = _ends(rows @ pixels)
    scale = 1 / (high - low).clamp(min=1e-6)
    return Display(normalise, rows * scale.unsqueeze(1), -low * scale)


def _ends(colours: Float[Tensor, "3 n"]) -> tuple[Float[Tensor, " 3"], Float[Tensor, " 3"]]:
    """The values at :data:`ENDS` of each row, from at most a million pixels."""
    some = colours[:, :: max(1, colours.shape[1] // 1_000_000)].sort(dim=1).values
    low, high = (some[:, round(end * (some.shape[1] - 1))] for end in ENDS)
    return low, high


def hatched(
    pictures: UInt8[np.ndarray, "b h w k"], valid: Bool[Tensor, "b h w"] | None
) -> UInt8[np.ndarray, "b h w k"]:
    """The pictures with grey stripes where there is no data."""
    if valid is None:
        return pictures
    height, width = pictures.shape[1:3]
    stripe = max(2, width // 32)
    rows, columns = np.indices((height, width))
    stripes = np.where((rows + columns) // stripe % 2 == 0, np.uint8(190), np.uint8(120))
    return np.asarray(np.where(valid.cpu().numpy()[..., None], pictures, stripes[None, :, :, None]))
