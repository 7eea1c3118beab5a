"""Segmentation heads on a ViT's feature maps, and encoder and head as one model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int16
from torch import Tensor, nn

from hardpatch.evaluate.dense.class_masks import IGNORED
from hardpatch.evaluate.dense.feature_maps import DenseEncoder
from hardpatch.evaluate.dense.pyramid import SCALES, rescale
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.extras import install


class LinearHead(nn.Module):
    """BatchNorm and a 1x1 convolution on the maps of all depths side by side.

    Source: Oquab et al., "DINOv2", arXiv 2304.07193, section 7.4.
    """

    def __init__(self, dim: int, *, num_maps: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim * num_maps)
        self.classify = nn.Conv2d(dim * num_maps, num_classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        if self.classify.bias is not None:
            nn.init.zeros_(self.classify.bias)

    def forward(self, maps: list[Float[Tensor, "b d h w"]]) -> Float[Tensor, "b k h w"]:
        """Logits, a pixel per patch."""
        logits: Tensor = self.classify(self.norm(torch.cat(maps, dim=1)))
        return logits


class UperNetHead(nn.Module):
    """A pyramid from four depths, UPerNet's decoder (segmentation_models_pytorch), dropout and a 1x1 convolution.

    The finest level comes from the first depth, the coarsest from the last.

    Raises:
        InputError: segmentation_models_pytorch is not installed.

    Source: Xiao et al., "Unified Perceptual Parsing for Scene Understanding", arXiv 1807.10221; on a ViT as in MAE,
    arXiv 2111.06377, appendix A.4 (without its auxiliary head).
    """

    def __init__(self, dim: int, *, num_classes: int, width: int) -> None:
        super().__init__()
        try:
            from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
        except ImportError:
            raise InputError(
                f"head: upernet needs segmentation_models_pytorch, or take linear; {install('dense')}"
            ) from None
        levels = [rescale(dim, scale) for scale in SCALES]
        self.levels = nn.ModuleList(step for step, _ in levels)
        # The decoder drops the first two of its inputs, meant for strides 1 and 2.
        channels = [0, 0, *(channels for _, channels in levels)]
        self.decoder = UPerNetDecoder(channels, encoder_depth=len(channels) - 1, decoder_channels=width)
        self.dropout = nn.Dropout2d(0.1)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: list[Float[Tensor, "b d h w"]]) -> Float[Tensor, "b k y x"]:
        """Logits, 4x4 pixels per patch."""
        levels = [step(features) for step, features in zip(self.levels, maps)]
        logits: Tensor = self.classify(self.dropout(self.decoder([levels[0], levels[0], *levels])))
        return logits


class Segmenter(nn.Module):
    """Encoder and head."""

    def __init__(self, encoder: DenseEncoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        """Logits of every pixel: the head's, enlarged bilinearly."""
        return enlarge(self.head(self.encoder(images)), (images.shape[2], images.shape[3]))


def enlarge(logits: Float[Tensor, "b k y x"], size: tuple[int, int]) -> Float[Tensor, "b k h w"]:
    """Logits at the pixels of an image, bilinear."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def pixel_loss(logits: Float[Tensor, "b k h w"], masks: Int16[Tensor, "b h w"]) -> Float[Tensor, ""]:
    """Cross entropy, mean over the pixels that count; 0 where none does."""
    summed = F.cross_entropy(logits, masks.long(), ignore_index=IGNORED, reduction="sum")
    return summed / (masks != IGNORED).sum().clamp(min=1)
