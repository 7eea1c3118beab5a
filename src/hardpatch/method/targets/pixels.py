"""Pixels of each patch as the target, and what makes a patch of pixels hard."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from hardpatch.method.targets.target import TargetContext
from hardpatch.method.vit import patchify, take


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


def build_pixels(context: TargetContext) -> PixelTarget:
    """The target ``pixels``."""
    return PixelTarget(context.geometry.patch, channels=context.geometry.channels, normalise=False)


def build_norm_pix(context: TargetContext) -> PixelTarget:
    """The target ``norm_pix``."""
    return PixelTarget(context.geometry.patch, channels=context.geometry.channels, normalise=True)


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
