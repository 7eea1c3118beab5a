"""From a ViT's maps, all of one stride, to a pyramid of four: strides of 1/4, 1/2, 1 and 2 patches."""

from __future__ import annotations

from collections import OrderedDict

from jaxtyping import Float
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

SCALES = (4.0, 2.0, 1.0, 0.5)
"""Pixels per patch and side at the four levels, finest first."""


def rescale(dim: int, scale: float) -> tuple[nn.Module, int]:
    """Enlarge or shrink a map by transposed convolutions or max pooling, and the channels that come out.

    Source: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (ViTDet), arXiv 2203.16527,
    appendix A.2.
    """
    if scale == 4:
        steps = [
            nn.ConvTranspose2d(dim, dim // 2, 2, stride=2),
            LayerNorm2d(dim // 2),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2),
        ]
        return nn.Sequential(*steps), dim // 4
    if scale == 2:
        return nn.ConvTranspose2d(dim, dim // 2, 2, stride=2), dim // 2
    if scale == 1:
        return nn.Identity(), dim
    return nn.MaxPool2d(2), dim


class SimplePyramid(nn.Module):
    """ViTDet's simple feature pyramid from one map, for torchvision's detectors.

    Source: Li et al., arXiv 2203.16527, section 3 and appendix A.2.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for scale in SCALES:
            step, channels = rescale(dim, scale)
            self.levels.append(
                nn.Sequential(
                    step,
                    nn.Conv2d(channels, width, 1, bias=False),
                    LayerNorm2d(width),
                    nn.Conv2d(width, width, 3, padding=1, bias=False),
                    LayerNorm2d(width),
                )
            )
        self.coarsest = LastLevelMaxPool()

    def forward(self, features: Float[Tensor, "b d h w"]) -> OrderedDict[str, Tensor]:
        """Five levels by name: four, and one of twice the last one's stride for the largest proposals."""
        maps = [level(features) for level in self.levels]
        maps, names = self.coarsest(maps, [], [str(i) for i in range(len(maps))])
        return OrderedDict(zip(names, maps))
