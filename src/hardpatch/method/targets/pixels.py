"""What is reconstructed, and how wrong a reconstruction is.

A target turns images into one vector per patch and owns the per-patch loss, because losses differ by target (squared
error for pixels, cross-entropy for tokens). The loss predictor and the mining see that per-patch loss, or
:class:`PixelHardness`.

Here: the protocol, and the targets that are made of the image or of the teacher alone. Features of a frozen timm model
are in :mod:`hpm.frozen`, discrete tokens in :mod:`hpm.tokens`.
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from hpm.vit import patchify, take


@runtime_checkable
class Target(Protocol):
    """What every reconstruction target offers."""

    dim: int
    """P, the width of the reconstructor's output for one patch."""
    needs_teacher: bool
    """Is it made of the teacher's features?"""

    def __call__(
        self, images: Float[Tensor, "b c h w"], features: Float[Tensor, "b t d"] | None = None
    ) -> Num[Tensor, "b n q"]:
        """The target of every patch, without gradient.

        Args:
            images: Normalised images.
            features: The teacher's tokens of the full images, prefix tokens first, where there is a teacher.
        """
        ...

    def patch_loss(self, prediction: Float[Tensor, "b m p"], target: Num[Tensor, "b m q"]) -> Float[Tensor, "b m"]:
        """The reconstruction loss of each patch."""
        ...


class PixelTarget:
    """Pixels of each patch, with mean squared error.

    Args:
        patch_size: Height and width of a patch in pixels.
        channels: Channels of the images.
        normalise: Remove each patch's mean and divide by its standard deviation (MAE's ``norm_pix``).
    """

    needs_teacher = False

    def __init__(self, patch_size: tuple[int, int], *, channels: int, normalise: bool) -> None:
        self.patch_size = patch_size
        self.normalise = normalise
        self.dim = patch_size[0] * patch_size[1] * channels

    def __call__(
        self, images: Float[Tensor, "b c h w"], features: Float[Tensor, "b t d"] | None = None
    ) -> Float[Tensor, "b n p"]:
        """The (normalised) pixels of every patch; ``features`` are not used."""
        patches = patchify(images.float(), self.patch_size)
        if not self.normalise:
            return patches
        mean, deviation = patch_statistics(patches)
        return (patches - mean) / deviation

    def patch_loss(self, prediction: Float[Tensor, "b m p"], target: Float[Tensor, "b m p"]) -> Float[Tensor, "b m"]:
        """Mean squared error over the pixels of a patch."""
        return (prediction.float() - target).square().mean(dim=-1)

    def to_pixels(self, prediction: Float[Tensor, "b n p"], images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n p"]:
        """Undo ``norm_pix`` with each patch's own statistics, so that a prediction can be shown as pixels."""
        if not self.normalise:
            return prediction
        mean, deviation = patch_statistics(patchify(images.float(), self.patch_size))
        return prediction * deviation + mean


def patch_statistics(
    patches: Float[Tensor, "b n p"],
) -> tuple[Float[Tensor, "b n 1"], Float[Tensor, "b n 1"]]:
    """Mean and sqrt(unbiased variance + 1e-6) of each patch."""
    mean = patches.mean(dim=-1, keepdim=True)
    # Two passes: torch.var_mean takes one that no processor vectorises, and a twentieth of a small step with it.
    variance = (patches - mean).square().sum(dim=-1, keepdim=True) / (patches.shape[-1] - 1)
    return mean, (variance + 1e-6).sqrt()


class PixelHardness:
    """What makes a patch of pixels hard, where that is not its reconstruction loss.

    Under ``norm_pix`` every patch has the same contrast, and what is lost of it is mostly fine texture, which nobody
    can predict from what is around it: mining by the loss hides noise, that of flat patches blown up too. Two ways
    out, alone or together: the error of the means of blocks of pixels, which can be predicted or missed; and the error
    in pixels, as where HPM was published, which is small in flat patches.

    Args:
        patch_size: Height and width of a patch in pixels.
        block: Side of a block in pixels; divides both. 1: every pixel counts.
        in_pixels: Undo ``norm_pix`` before.
    """

    def __init__(self, patch_size: tuple[int, int], *, block: int = 1, in_pixels: bool = False) -> None:
        self.patch_size = patch_size
        self.block = block
        self.in_pixels = in_pixels

    def __call__(
        self,
        prediction: Float[Tensor, "v m p"],
        target: Float[Tensor, "v m p"],
        images: Float[Tensor, "b c h w"],
        index: Int[Tensor, "v m"],
    ) -> Float[Tensor, "v m"]:
        """Mean over blocks and channels of the squared mean error of a block.

        Args:
            prediction: Of the patches that were decoded.
            target: Of the same.
            images: Normalised images.
            index: Which patches these are.
        """
        rows, columns = (side // self.block for side in self.patch_size)
        error = (prediction.float() - target).unflatten(-1, (rows, self.block, columns, self.block, -1))
        hardness: Tensor = error.mean(dim=(3, 5)).square().flatten(2).mean(dim=-1)
        if self.in_pixels:
            _, deviation = patch_statistics(take(patchify(images.float(), self.patch_size), index))
            hardness = hardness * deviation.squeeze(-1).square()
        return hardness


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


ORIENTATIONS = 9
"""Bins of a histogram of oriented gradients, 20 degrees each."""


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


class EmaFeatureTarget:
    """The teacher's own features of each patch, after the final norm, with :func:`feature_loss`.

    Args:
        encoder: The student's encoder, of which the teacher is the average.
    """

    needs_teacher = True

    def __init__(self, encoder: VisionTransformer) -> None:
        self.dim = int(encoder.embed_dim)
        self.num_prefix_tokens = int(encoder.num_prefix_tokens)

    def __call__(
        self, images: Float[Tensor, "b c h w"], features: Float[Tensor, "b t d"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """The teacher's patch tokens.

        Raises:
            ValueError: There are no ``features``.
        """
        if features is None:
            raise ValueError("this target is made of the teacher's features, got features=None")
        return features[:, self.num_prefix_tokens :].float()

    def patch_loss(self, prediction: Float[Tensor, "b m d"], target: Float[Tensor, "b m d"]) -> Float[Tensor, "b m"]:
        """Distance of the directions of two features."""
        return feature_loss(prediction, target)


def feature_loss(prediction: Float[Tensor, "b m p"], target: Float[Tensor, "b m p"]) -> Float[Tensor, "b m"]:
    """Per-patch loss of feature targets: both L2-normalised, squared error summed over channels, as published."""
    difference = F.normalize(prediction.float(), dim=-1) - F.normalize(target.float(), dim=-1)
    return difference.square().sum(dim=-1)
