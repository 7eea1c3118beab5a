"""Training crops of images with instances: large-scale jitter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from hardpatch.evaluate.dense.coco import CocoImages
from hardpatch.runtime.seeding import Stream, derive_seed

Target = dict[str, Tensor]
"""``boxes``, ``labels`` and perhaps ``masks``, as torchvision's detectors want them."""


class InstanceCrops(Dataset[tuple[Shaped[Tensor, "c h w"], Target]]):
    """Images fitted into a square, enlarged by a random factor, cropped to the square and mirrored.

    Each is a function of (seed, pass, index). Boxes of cut instances fit what is left of their masks.

    Args:
        size: Side of the square.
        scale: Range of the factor.
        fill: Value of every channel outside of the image.

    Source: Ghiasi et al., "Simple Copy-Paste", arXiv 2012.07177, section 3 (large-scale jitter).
    """

    def __init__(
        self,
        images: CocoImages,
        *,
        size: int,
        scale: tuple[float, float],
        flip: bool,
        fill: Sequence[int],
        seed: int,
    ) -> None:
        self.images = images
        self.seed = seed
        steps: list[Any] = [
            v2.ScaleJitter((size, size), scale_range=scale, antialias=True),
            v2.RandomCrop((size, size), pad_if_needed=True, fill={tv_tensors.Image: list(fill), tv_tensors.Mask: 0}),
        ]
        if flip:
            steps.append(v2.RandomHorizontalFlip())
        self.augment = v2.Compose(steps)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Shaped[Tensor, "c h w"], Target]:
        number, index = key
        image, boxes, labels, masks = self.images.read(index)
        size = (image.shape[1], image.shape[2])
        given: dict[str, Any] = {
            "image": tv_tensors.Image(image),
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        }
        if masks is not None:
            given["masks"] = tv_tensors.Mask(masks.to(torch.uint8))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, Stream.AUGMENTATION, number, index))
            changed = self.augment(given)
        plain = {name: value.as_subclass(Tensor) for name, value in changed.items()}
        return plain["image"], clean_target(plain["boxes"], labels, plain.get("masks"))


def clean_target(boxes: Float[Tensor, "n 4"], labels: Tensor, masks: Tensor | None) -> Target:
    """What is left of the instances after a crop; those that are outside are gone."""
    if masks is None:
        kept = (boxes[:, 2:] - boxes[:, :2] > 1).all(dim=1)
        return {"boxes": boxes[kept], "labels": labels[kept]}
    kept = (masks > 0).any(dim=2).any(dim=1)
    masks, labels = masks[kept], labels[kept]
    boxes = masks_to_boxes(masks) if len(masks) else torch.zeros(0, 4)
    boxes[:, 2:] += 1  # masks_to_boxes gives the last pixel, a box ends behind it
    return {"boxes": boxes, "labels": labels, "masks": masks}


def list_pairs(items: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """A batch: images and targets by themselves."""
    return [image for image, _ in items], [target for _, target in items]
