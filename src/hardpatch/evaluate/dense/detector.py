"""torchvision's Mask R-CNN (Faster R-CNN where there are no masks) on a ViT with a simple feature pyramid."""

from __future__ import annotations

import math
from collections import OrderedDict

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from hardpatch.evaluate.dense.feature_maps import Bf16, DenseEncoder
from hardpatch.evaluate.dense.pyramid import SCALES, SimplePyramid
from hardpatch.method.vit import patch_size
from hardpatch.runtime.errors import InputError

RATIOS = (0.5, 1.0, 2.0)
"""Height over width of the anchors."""


class PyramidBackbone(nn.Module):
    """Encoder and pyramid, as torchvision's detectors want a backbone."""

    def __init__(self, encoder: DenseEncoder, *, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.pyramid = Bf16(SimplePyramid(encoder.dim, width), enabled=encoder.bf16)
        self.out_channels = width

    def forward(self, images: Float[Tensor, "b c h w"]) -> OrderedDict[str, Tensor]:
        """Five maps by name."""
        maps: OrderedDict[str, Tensor] = self.pyramid(self.encoder(images)[-1])
        return maps


def fitting_size(size: int, patch: int) -> int:
    """The next size at which every level of the pyramid has a whole number of cells: a multiple of four patches."""
    return math.ceil(size / (4 * patch)) * 4 * patch


def check_patch(patch: tuple[int, int]) -> int:
    """Side of a patch, where a pyramid can be built on it.

    Raises:
        InputError: Patches are not square, or the finest level would not have whole strides.
    """
    if patch[0] != patch[1] or patch[0] % 4:
        raise InputError(f"checkpoint: detection needs square patches of a multiple of 4 pixels for a pyramid of a "
                         f"quarter patch, got {patch[0]}x{patch[1]}")  # fmt: skip
    return patch[0]


def build_detector(
    encoder: DenseEncoder,
    *,
    num_classes: int,
    masks: bool,
    size: int,
    width: int,
    anchor_scale: float,
    samples_per_image: int | None = None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> FasterRCNN:
    """Mask R-CNN or Faster R-CNN with its own random weights above the encoder.

    torchvision's transform fits every image into a square of ``size`` and brings results back to the image's own
    pixels. Anchors and the levels that boxes are pooled from count in strides, as in ViTDet at 16-pixel patches.
    Pyramid and heads compute in bfloat16 where the encoder does; proposals, boxes and losses are float32.

    Args:
        width: Channels of the pyramid; the heads grow with it (256: torchvision's own).
        anchor_scale: Side of the anchors in strides.
        samples_per_image: Proposals that the heads learn from; None: adapted to ``size``.
    """
    strides = [patch_size(encoder.vit)[0] / scale for scale in SCALES]
    anchors = AnchorGenerator(
        sizes=tuple((anchor_scale * stride,) for stride in (*strides, 2 * strides[-1])),
        aspect_ratios=(RATIOS,) * (len(strides) + 1),
    )
    bf16 = encoder.bf16
    common = {
        "backbone": PyramidBackbone(encoder, width=width),
        "min_size": size,
        "max_size": size,
        "image_mean": list(mean),
        "image_std": list(std),
        "size_divisible": size,
        "rpn_anchor_generator": anchors,
        "rpn_head": Bf16(RPNHead(width, len(RATIOS)), enabled=bf16),
        "box_batch_size_per_image": samples_per_image or adapted_samples(size),
        "box_roi_pool": _pool(strides, 7),
        "box_head": Bf16(TwoMLPHead(width * 7 * 7, 4 * width), enabled=bf16),
        "box_predictor": FastRCNNPredictor(4 * width, num_classes + 1),
    }
    if not masks:
        return FasterRCNN(**common)
    return MaskRCNN(
        **common,
        mask_roi_pool=_pool(strides, 14),
        mask_head=Bf16(MaskRCNNHeads(width, (width,) * 4, 1), enabled=bf16),
        mask_predictor=Bf16(MaskRCNNPredictor(width, width, num_classes + 1), enabled=bf16),
    )


def adapted_samples(size: int) -> int:
    """torchvision's 512 proposals for squares of 512 pixels and more, below as many as pixels of a side, at least 32.

    On small images most of 512 would be copies of each other, and the heads are nearly all of the time of a step.
    """
    return max(32, min(512, size))


def _pool(strides: list[float], cells: int) -> MultiScaleRoIAlign:
    """RoIAlign that knows its strides: left alone, torchvision guesses them from the images without their padding, and
    guesses wrong for pictures of 3:2."""
    pool = MultiScaleRoIAlign([str(i) for i in range(len(strides))], output_size=cells, sampling_ratio=2)
    pool.scales = [1 / stride for stride in strides]
    # A box of 224 pixels belongs to stride 16, the third level, when the finest has stride 4.
    pool.map_levels = LevelMapper(2, 2 + len(strides) - 1, canonical_scale=round(56 * strides[0]), canonical_level=4)
    return pool
