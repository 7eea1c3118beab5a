"""What is reconstructed, and how wrong a reconstruction is.

A target turns images into one vector per patch and owns the per-patch loss, because losses differ by target (squared
error for pixels, cross-entropy for tokens). The loss predictor and the mining only ever see that per-patch loss.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor

from hpm.vit import patchify


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
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def feature_loss(prediction: Float[Tensor, "b m p"], target: Float[Tensor, "b m p"]) -> Float[Tensor, "b m"]:
    """Per-patch loss of feature targets: both L2-normalised, squared error summed over channels, as published."""
    difference = F.normalize(prediction.float(), dim=-1) - F.normalize(target.float(), dim=-1)
    return difference.square().sum(dim=-1)
