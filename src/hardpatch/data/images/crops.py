"""Random resized crops: where each lies is a function of (seed, epoch, image, view), drawn before anything is decoded.

The distribution is that of torchvision's ``RandomResizedCrop``: area uniform, aspect ratio log-uniform, ten tries, then
the largest centred crop of an allowed ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float64, Shaped
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from hardpatch.runtime.seeding import Stream, uniform_numbers

RATIO = (3 / 4, 4 / 3)
"""Width over height of a crop, as torchvision's default."""

_TRIES = 10
NUMBERS_PER_CROP = 2 * _TRIES + 3
"""Uniform numbers that decide a crop: area and ratio for every try, row, column, mirror."""


class Box(NamedTuple):
    """A rectangle of an image, pixels; mirrored left to right after it was cut out."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


def crop_numbers(seed: int, keys: Sequence[tuple[int, int]], *, views: int = 1) -> Float64[np.ndarray, "k v n"]:
    """The uniform numbers that decide where crops lie.

    Args:
        seed: Of the run.
        keys: (epoch, index) of each image.
        views: Crops of each image.
    """
    places = [(epoch, index, view) for epoch, index in keys for view in range(views)]
    numbers = uniform_numbers(seed, Stream.AUGMENTATION, np.array(places, np.int64).reshape(-1, 3), NUMBERS_PER_CROP)
    return numbers.reshape(len(keys), views, NUMBERS_PER_CROP)


def draw_box(
    numbers: Float64[np.ndarray, " n"], size: tuple[int, int], *, scale: tuple[float, float], flip: bool
) -> Box:
    """Where a random resized crop lies.

    Args:
        numbers: Uniform in [0, 1), :data:`NUMBERS_PER_CROP` of them.
        size: Height and width of the image, pixels.
        scale: Smallest and largest area, share of the image.
        flip: Mirror half of the crops.
    """
    (height, width), values = size, numbers.tolist()
    mirrored = flip and values[-1] < 0.5
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for number in range(_TRIES):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * values[2 * number])
        ratio = math.exp(low + (high - low) * values[2 * number + 1])
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            top, left = int(values[-3] * (height - tall + 1)), int(values[-2] * (width - wide + 1))
            return Box(top, left, tall, wide, mirrored)
    tall, wide = height, width
    if width / height < RATIO[0]:
        tall = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        wide = round(height * RATIO[1])
    return Box((height - tall) // 2, (width - wide) // 2, tall, wide, mirrored)


_HAS_BYTE_KERNEL = "AVX" in torch.backends.cpu.get_cpu_capability()
"""Where PyTorch resizes uint8 without a detour over floats, as torchvision asks too; straight to it saves a tenth."""


def covering(box: Box, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width to which a box is resized so that it just covers ``size``."""
    if (box.height, box.width) == size:
        return size
    scale = max(size[0] / box.height, size[1] / box.width)
    return max(size[0], round(box.height * scale)), max(size[1], round(box.width * scale))


def centre(whole: int, wanted: int) -> int:
    """Pixels before the middle ones, as torchvision's ``center_crop`` counts them."""
    return round((whole - wanted) / 2)


def resample(image: Shaped[Tensor, "c h w"], box: Box, size: tuple[int, int]) -> Shaped[Tensor, "c y x"]:
    """Cut a box out and resize it, bicubic and antialiased; what torchvision's ``resized_crop`` gives.

    Args:
        image: uint8 or float32.
        box: What to cut out.
        size: Height and width of the result.
    """
    region = image[:, box.top : box.top + box.height, box.left : box.left + box.width]
    if region.dtype == torch.uint8 and not _HAS_BYTE_KERNEL:
        resized: Tensor = functional.resize_image(region, list(size), InterpolationMode.BICUBIC, antialias=True)
    else:
        resized = F.interpolate(region[None], size, mode="bicubic", antialias=True)[0]
    return resized.flip(-1) if box.flip else resized


def resample_mask(mask: Bool[Tensor, "h w"], box: Box, size: tuple[int, int]) -> Bool[Tensor, "y x"]:
    """The same for a mask, by the nearest pixel."""
    region = mask[None, box.top : box.top + box.height, box.left : box.left + box.width]
    resized: Tensor = functional.resize_image(region.to(torch.uint8), list(size), InterpolationMode.NEAREST)[0].bool()
    return resized.flip(-1) if box.flip else resized
