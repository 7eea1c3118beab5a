"""Histograms of oriented gradients as the target (MaskFeat)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hardpatch.method.targets.target import TargetContext
from hardpatch.method.vit import patchify

ORIENTATIONS = 9
"""Bins of a histogram of oriented gradients, 20 degrees each."""


class HogTarget:
    """Histograms of oriented gradients of each patch and channel, with mean squared error.

    Gradients are central differences over the whole image; every pixel votes with its magnitude for one of
    :data:`ORIENTATIONS` directions (unsigned: 0 to 180 degrees); the histogram of each cell is L2-normalised.
    Per side, a cell is 8 pixels long where 8 divides the patch, otherwise as long as the patch.

    Args:
        patch_size: Height and width of a patch in pixels.
        channels: Channels of the images.

    Source: Wei et al., "Masked Feature Prediction for Self-Supervised Visual Pre-Training", CVPR 2022, section 3.2
    (9 orientations, 8-pixel cells, each colour channel on its own); Dalal and Triggs, CVPR 2005.
    """

    needs_teacher = False

    def __init__(self, patch_size: tuple[int, int], *, channels: int) -> None:
        height, width = patch_size
        self.cell = (8 if height % 8 == 0 else height, 8 if width % 8 == 0 else width)
        self.cells_per_patch = (height // self.cell[0], width // self.cell[1])
        self.dim = math.prod(self.cells_per_patch) * channels * ORIENTATIONS

    def __call__(
        self, images: Float[Tensor, "b c h w"], features: Float[Tensor, "b t d"] | None = None
    ) -> Float[Tensor, "b n p"]:
        """The descriptor of every patch; ``features`` are not used."""
        return patchify(cell_histograms(images, self.cell), self.cells_per_patch)

    def patch_loss(self, prediction: Float[Tensor, "b m p"], target: Float[Tensor, "b m p"]) -> Float[Tensor, "b m"]:
        """Mean squared error over the descriptor of a patch."""
        return (prediction.float() - target).square().mean(dim=-1)


def build(context: TargetContext) -> HogTarget:
    """The target ``hog``."""
    return HogTarget(context.geometry.patch, channels=context.geometry.channels)


def cell_histograms(images: Float[Tensor, "b c h w"], cell: tuple[int, int]) -> Float[Tensor, "b q r s"]:
    """L2-normalised histograms of oriented gradients of every cell of every channel.

    Equal to ``skimage.feature.hog`` with blocks of one cell and its L2 norm: no gradient along the border, the lower
    edge of a bin belongs to it, a cell's votes are averaged, and 1e-5 keeps flat cells at zero.

    Args:
        images: Any number of channels.
        cell: Height and width of a cell in pixels; must divide the image.

    Returns:
        Q = channels x :data:`ORIENTATIONS` for each of R x S cells, in float32 also under autocast.
    """
    images = images.float()
    down = F.pad(images[..., 2:, :] - images[..., :-2, :], (0, 0, 1, 1))
    right = F.pad(images[..., :, 2:] - images[..., :, :-2], (1, 1))
    magnitude, direction = torch.hypot(down, right), orientation_bins(down, right)
    # One orientation after the other: a one-hot vote would take nine times the memory, and adding votes by index is
    # not deterministic on a GPU.
    votes = [F.avg_pool2d(magnitude * (direction == number), cell) for number in range(ORIENTATIONS)]
    histograms = torch.stack(votes, dim=2)
    norm = (histograms.square().sum(dim=2, keepdim=True) + 1e-5**2).sqrt()
    return (histograms / norm).flatten(1, 2)


def orientation_bins(down: Float[Tensor, "b c h w"], right: Float[Tensor, "b c h w"]) -> Int[Tensor, "b c h w"]:
    """Which of the :data:`ORIENTATIONS` bins the unsigned direction of each gradient falls into."""
    bins = (torch.atan2(down, right) * (ORIENTATIONS / math.pi)).floor().to(torch.int8) % ORIENTATIONS
    return bins * (down != 0)  # exactly 0 or 180 degrees: the first bin, however pi is rounded
