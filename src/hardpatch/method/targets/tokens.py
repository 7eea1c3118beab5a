"""Discrete tokens as the target (BEiT): a tokenizer names each patch by an integer, the student guesses the name.

Any ``images -> (B, N) integers`` serves as tokenizer. The embedded one needs no download: it is a codebook of k-means
centroids over the patches of the user's own images, fitted before training and saved with the run.

Source: Bao et al., "BEiT: BERT Pre-Training of Image Transformers", ICLR 2022, section 2.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hardpatch.method.targets.pixels import PixelTarget


@runtime_checkable
class Tokenizer(Protocol):
    """Names every patch by an integer."""

    vocabulary: int
    """Integers are 0 .. ``vocabulary`` - 1."""

    def __call__(self, images: Float[Tensor, "b c h w"]) -> Int[Tensor, "b n"]:
        """The token of every patch, in image order.

        Args:
            images: Normalised as in the run.
        """
        ...


class TokenTarget(nn.Module):
    """A discrete token for each patch, with cross-entropy.

    Args:
        tokenizer: Names the patches.
    """

    needs_teacher = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.dim = tokenizer.vocabulary

    @torch.no_grad()
    def forward(
        self, images: Float[Tensor, "b c h w"], features: Float[Tensor, "b t d"] | None = None
    ) -> Int[Tensor, "b n 1"]:
        """The token of every patch; ``features`` are not used."""
        return self.tokenizer(images).long().unsqueeze(-1)

    def patch_loss(self, prediction: Float[Tensor, "b m p"], target: Int[Tensor, "b m 1"]) -> Float[Tensor, "b m"]:
        """Cross-entropy of the predicted distribution over the vocabulary."""
        logits = prediction.float().transpose(1, 2)
        return F.cross_entropy(logits, target.squeeze(-1), reduction="none")


class KMeansTokenizer(nn.Module):
    """The nearest of the centroids of a codebook, over patches without their mean and contrast.

    Why ``norm_pix``: of raw pixels, k-means spends its centroids on brightness, the direction of largest variance. Such
    a token hardly differs between neighbours, and guessing it asks for no more than the mean of what is visible.
    Without mean and contrast the centroids are edges, textures and differences of colour.

    Args:
        vocabulary: Centroids.
        patch_size: Height and width of a patch in pixels.
        channels: Channels of the images.
    """

    def __init__(self, vocabulary: int, *, patch_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.pixels = PixelTarget(patch_size, channels=channels, normalise=True)
        self.codebook = nn.Buffer(torch.full((vocabulary, self.pixels.dim), torch.nan))
        self._is_fitted = False

    def adopt(self, codebook: Float[Tensor, "k p"]) -> None:
        """Take over a codebook that is fitted."""
        self.codebook.copy_(codebook)
        self._is_fitted = True

    def forward(self, images: Float[Tensor, "b c h w"]) -> Int[Tensor, "b n"]:
        """The nearest centroid of every patch."""
        assert self._is_fitted, "a codebook must be fitted or loaded before it is used"
        # Tensors without content, on which hardpatch.cost.flops counts, know no autocast.
        with nullcontext() if images.is_meta else torch.autocast(images.device.type, enabled=False):
            return nearest(self.pixels(images), self.codebook)


def nearest(patches: Float[Tensor, "*n p"], codebook: Float[Tensor, "k p"]) -> Int[Tensor, "*n"]:
    """Index of the nearest centroid: |x - c|^2 is smallest where x c - |c|^2 / 2 is largest."""
    return (patches @ codebook.T - codebook.square().sum(dim=1) / 2).argmax(dim=-1)
