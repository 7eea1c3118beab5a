"""The rules of a plan: pure functions, so that one can read and argue with them.

What is published is marked so; the rest are rules of thumb, not measured by us.
"""

from __future__ import annotations

from typing import Any, NamedTuple

MIN_EPOCHS = 100
"""Fewer passes, and a smaller encoder is the better use of the time: the published short schedule has 200."""
MAX_EPOCHS = 1600
"""The longest that MAE was published with."""
MIN_STEPS_PER_EPOCH = 10
VIEWS_PER_PROCESS = 256


class Size(NamedTuple):
    """An encoder that may be proposed."""

    name: str
    encoder: str
    fields: dict[str, Any]
    """What the config needs beside the encoder: decoders that suit it, and a learning rate."""
    min_images: int
    """Fewer, and a smaller encoder is proposed."""


_LIGHT = {"decoder_width": 256, "decoder_depth": 4, "decoder_heads": 8, "base_learning_rate": 3e-4}
"""Decoders and learning rate of recipe ``small-data``."""

SIZES = (
    Size(
        "6 blocks, 192 wide",
        "vit_tiny_patch16_224",
        {
            "encoder_depth": 6, "decoder_width": 128, "decoder_depth": 2, "decoder_heads": 4,
            "base_learning_rate": 1e-3,
        },
        0,
    ),
    Size("ViT-Ti", "vit_tiny_patch16_224", _LIGHT, 0),
    Size("ViT-S", "vit_small_patch16_224", _LIGHT, 2_000),
    Size("ViT-B", "vit_base_patch16_224", {}, 20_000),
    Size("ViT-L", "vit_large_patch16_224", {}, 500_000),
)  # fmt: skip
"""Smallest first. The first is the model of scale ``64px``, at half its learning rate, because runs are longer; ViT-B
and ViT-L have the published decoders."""


def choose_image_size(height: int, width: int, patch: int | None) -> int:
    """Side of the crops, pixels: the shorter side of the images, at most the published 224.

    An even number of patches, so that the teacher can look at half the size.
    """
    side = min(224, height, width)
    step = 2 * (patch or choose_patch(side))
    return max(step, side // step * step)


def choose_patch(side: int) -> int:
    """Side of a patch, pixels: the published 16 of images of 224, fewer pixels for small images.

    64 patches and more are left from 64 px up: of few patches there is little to choose from.
    """
    return 16 if side >= 160 else 8 if side >= 64 else 4


def choose_batch(num_images: int, processes: int, masks_per_image: int) -> int:
    """Views an optimizer step: 256 a process up to the published 2,048, fewer where an epoch would be few steps."""
    batch, smallest = min(2048, VIEWS_PER_PROCESS * processes), processes * masks_per_image

    def too_large(batch: int) -> bool:
        return batch > num_images or (batch > 16 and batch * MIN_STEPS_PER_EPOCH > num_images)

    while batch // 2 >= smallest and too_large(batch):
        batch //= 2
    return batch


def epochs_within(seconds: float, views_per_second: float, num_images: int) -> int:
    """Whole passes within a time, at most :data:`MAX_EPOCHS`; 0 where not even one fits."""
    return min(MAX_EPOCHS, int(seconds * views_per_second / num_images))


def preferred(epochs: dict[str, int], sizes: tuple[Size, ...], num_images: int) -> str | None:
    """The largest encoder that these images are enough for and that sees them :data:`MIN_EPOCHS` times; otherwise the
    smallest, where it sees them once.

    Args:
        epochs: Of every encoder that fits into memory, within the budget, by its size's name.
        sizes: Smallest first.
        num_images: To learn from.
    """
    possible = [size for size in sizes if epochs.get(size.name, 0) >= 1]
    enough = [size for size in possible if num_images >= size.min_images and epochs[size.name] >= MIN_EPOCHS]
    if enough:
        return enough[-1].name
    return possible[0].name if possible else None
