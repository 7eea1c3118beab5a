"""Crops of many images at once, on whatever device they are: resampling as two matrix products per image.

The weights are those of Pillow's and PyTorch's antialiased bicubic filter, built on the device from the boxes. In
float32, without rounding between the two directions: float images come out as PyTorch's, uint8 ones within three
levels of it (its CPU kernel rounds and clips in between).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from hardpatch.data.images.crops import Box, centre, covering

CHUNK = 32
"""Images that are padded to a common size and multiplied at once."""


def crop_batch(
    images: Sequence[Shaped[Tensor, "c _h _w"]], boxes: Sequence[Box], size: tuple[int, int], *, cover: bool = False
) -> Shaped[Tensor, "b c y x"]:
    """Cut out, resize (bicubic, antialiased) and mirror.

    Args:
        images: uint8 or float32, of any sizes, all on one device.
        boxes: Of each image.
        size: Height and width of the results.
        cover: Resize each box so that it just covers ``size``, and take the centre, rather than stretch it.

    Returns:
        uint8, or float32 where one of the images is.
    """
    is_byte = all(image.dtype == torch.uint8 for image in images)
    made = []
    for start in range(0, len(images), CHUNK):
        some, where = images[start : start + CHUNK], boxes[start : start + CHUNK]
        crops = _crop(some, where, size, cover)
        if not is_byte:  # a uint8 image stays in 0..255, as it would be cropped alone
            bytes_too = torch.tensor([image.dtype == torch.uint8 for image in some], device=crops.device)
            crops = torch.where(bytes_too.view(-1, 1, 1, 1), crops.round().clamp(0, 255), crops)
        made.append(crops.round().clamp(0, 255).to(torch.uint8) if is_byte else crops)
    return torch.cat(made)


def crop_masks(
    masks: Sequence[Bool[Tensor, "_h _w"]], boxes: Sequence[Box], size: tuple[int, int], *, cover: bool = False
) -> Bool[Tensor, "b y x"]:
    """The same for masks, by the nearest pixel."""
    made = []
    for mask, box in zip(masks, boxes):
        whole = covering(box, size) if cover else size
        rows = box.top + _nearest(box.height, whole[0], size[0], mask.device)
        columns = box.left + _nearest(box.width, whole[1], size[1], mask.device)
        made.append(mask[rows][:, columns.flip(0) if box.flip else columns])
    return torch.stack(made)


def _nearest(length: int, whole: int, wanted: int, device: torch.device) -> Tensor:
    places = torch.arange(wanted, device=device) + centre(whole, wanted)
    return (places * (length / whole)).long().clamp(max=length - 1)


def _crop(
    images: Sequence[Tensor], boxes: Sequence[Box], size: tuple[int, int], cover: bool
) -> Float[Tensor, "b c y x"]:
    device, channels = images[0].device, images[0].shape[0]
    tall, wide = max(box.height for box in boxes), max(box.width for box in boxes)
    regions = torch.zeros(len(images), channels, tall, wide, device=device)
    for region, image, box in zip(regions, images, boxes):
        cut = image[:, box.top : box.top + box.height, box.left : box.left + box.width]
        region[:, : box.height, : box.width] = cut
    heights = torch.tensor([box.height for box in boxes]).to(device, non_blocking=True)
    widths = torch.tensor([box.width for box in boxes]).to(device, non_blocking=True)
    flips = torch.tensor([box.flip for box in boxes]).to(device, non_blocking=True)
    wholes = torch.tensor([covering(box, size) if cover else size for box in boxes]).to(device, non_blocking=True)
    rows = weights(heights, wholes[:, 0], wanted=size[0], longest=tall)
    columns = weights(widths, wholes[:, 1], wanted=size[1], longest=wide)
    columns = torch.where(flips.view(-1, 1, 1), columns.flip(1), columns)
    return rows[:, None] @ regions @ columns[:, None].mT


def weights(
    lengths: Shaped[Tensor, " b"], wholes: Shaped[Tensor, " b"], *, wanted: int, longest: int
) -> Float[Tensor, "b {wanted} {longest}"]:
    """How much each source pixel adds to each result, rows that sum to 1.

    Args:
        lengths: Source pixels of each image.
        wholes: Pixels to which they are resized.
        wanted: Pixels of the result, the middle of these.
        longest: Columns: source pixels beyond an image's length weigh nothing.
    """
    scale = (lengths.double() / wholes)[:, None, None]
    stretch = scale.clamp(min=1)  # antialiasing: a kernel as wide as the step
    skipped = torch.round((wholes - wanted) / 2)[:, None, None]
    middle = (torch.arange(wanted, device=lengths.device)[None, :, None] + skipped + 0.5) * scale
    place = torch.arange(longest, device=lengths.device)[None, None, :]
    first = (middle - 2 * stretch + 0.5).floor().clamp(min=0)
    last = (middle + 2 * stretch + 0.5).floor().minimum(lengths[:, None, None])
    found = cubic((place - middle + 0.5) / stretch) * ((place >= first) & (place < last))
    return (found / found.sum(-1, keepdim=True)).float()


def cubic(x: Shaped[Tensor, "*n"]) -> Shaped[Tensor, "*n"]:
    """Keys' kernel with a = -1/2, as Pillow's and PyTorch's antialiased one.

    Source: Keys, "Cubic convolution interpolation for digital image processing", 1981.
    """
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
