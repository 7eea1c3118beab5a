"""A scout: a tiny network beside the student that ranks the patches of the full image by how hard they will be.

The published loss predictor needs the encoding of the full image, a pass of the teacher at every step. The scout looks
at the pixels alone: each patch, the mean of its neighbourhood and the mean of the image say whether it can be foretold
from what is around it. It learns, by the same relative loss, from the student's true loss on the patches that were
decoded, and costs about a hundredth of a step of MAE.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hardpatch.method.vit import patchify


class Scout(nn.Module):
    """Scores of all patches of images of any size.

    Args:
        patch: Height and width of a patch in pixels.
        channels: Channels of the images.
        width: Features of a patch.
        depth: How often every patch looks at its neighbours; each time a patch further.
    """

    def __init__(self, patch: tuple[int, int], *, channels: int, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch[0] * patch[1] * channels, width)
        self.layers = nn.ModuleList(nn.Linear(3 * width, width) for _ in range(depth))
        self.head = nn.Linear(width, 1, bias=False)  # only differences between patches are learnt

    def forward(
        self, images: Float[Tensor, "b c h w"], valid: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n"]:
        """How hard each patch is expected to be, higher = harder; only the order within an image means anything.

        Args:
            images: Normalised images.
            valid: Patches of pixels that are all data; None: all. The others are in no mean.
        """
        with torch.autocast(images.device.type, enabled=False):
            grid = images.shape[2] // self.patch[0], images.shape[3] // self.patch[1]
            patches = F.gelu(self.embed(patchify(images.float(), self.patch)))
            counted = None if valid is None else valid.unsqueeze(-1).float()
            for layer in self.layers:
                around, everywhere = neighbourhood_mean(patches, grid, counted), image_mean(patches, counted)
                seen = torch.cat([patches, around, everywhere.expand_as(patches)], dim=-1)
                patches = patches + F.gelu(layer(seen))
            scores: Tensor = self.head(patches).squeeze(-1)
            return scores


def neighbourhood_mean(
    patches: Float[Tensor, "b n d"], grid: tuple[int, int], counted: Float[Tensor, "b n 1"] | None = None
) -> Float[Tensor, "b n d"]:
    """Mean over each patch and its neighbours, at most 3x3; of those with ``counted`` 1 where it is given."""

    def pool(values: Tensor) -> Tensor:
        cells = values.transpose(1, 2).unflatten(2, grid)
        return F.avg_pool2d(cells, 3, stride=1, padding=1, count_include_pad=False).flatten(2).transpose(1, 2)

    if counted is None:
        return pool(patches)
    return pool(patches * counted) / pool(counted).clamp(min=1e-6)


def image_mean(
    patches: Float[Tensor, "b n d"], counted: Float[Tensor, "b n 1"] | None = None
) -> Float[Tensor, "b 1 d"]:
    """Mean over the patches of each image; of those with ``counted`` 1 where it is given."""
    if counted is None:
        return patches.mean(dim=1, keepdim=True)
    return (patches * counted).sum(dim=1, keepdim=True) / counted.sum(dim=1, keepdim=True).clamp(min=1)
