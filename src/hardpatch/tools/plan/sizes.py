"""The rules of a plan: pure functions, so that one can read and argue with them.

What is published is marked so; the rest are rules of thumb, not measured by us.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

EPOCHS = 100
"""An encoder should see the images so often: the published short schedule has 200."""
MIN_VIEWS, MAX_VIEWS = 1_000_000, 128_000_000
"""And so many views in all, however few images there are; but no more than 100 epochs of ImageNet-1K, however many."""
MAX_EPOCHS = 1600
"""The longest that MAE was published with."""
MIN_STEPS_PER_EPOCH = 10
MIN_STEPS = 1000
"""A run of fewer steps takes a smaller batch, and twice the base learning rate, as the recipes of short runs do."""
MIN_BATCH = 64
"""Learning rates are scaled by the batch; below they become very small."""
BATCH_PER_PROCESS, MAX_BATCH = 256, 2048
"""The latter published."""
MIN_GRID = 8
"""Patches a side: of fewer there is little to choose from."""
MIN_MICRO_BATCH = 32
"""Rather than smaller micro-batches, activations are computed again, and models are sharded."""
LIGHT_WIDTH = 384
"""Encoders up to this width (ViT-S) get light decoders: the published ones are wider than ViT-Ti."""


class Size(NamedTuple):
    """An encoder that may be proposed."""

    name: str
    fields: dict[str, Any]
    """Of the config."""
    min_images: int = 0
    """Of fewer images, a smaller encoder is proposed."""


LIGHT: dict[str, Any] = {
    "decoder_width": 256, "decoder_depth": 4, "decoder_heads": 8, "base_learning_rate": 3e-4,
}  # fmt: skip
"""Light decoders, and the learning rate for encoders of that size."""

SIZES = (
    Size(
        "6 blocks, 192 wide",
        {
            "encoder": "vit_tiny_patch16_224", "encoder_depth": 6, "decoder_width": 128, "decoder_depth": 2,
            "decoder_heads": 4, "base_learning_rate": 1e-3,
        },
    ),
    Size("ViT-Ti", {"encoder": "vit_tiny_patch16_224", **LIGHT}),
    Size("ViT-S", {"encoder": "vit_small_patch16_224", **LIGHT}, 2_000),
    Size("ViT-B", {"encoder": "vit_base_patch16_224"}, 20_000),
    Size("ViT-L", {"encoder": "vit_large_patch16_224"}, 500_000),
)  # fmt: skip
"""Smallest first. The first is the model of scale ``64px``, at half its learning rate, because runs are longer; ViT-B
and ViT-L have the published decoders."""


def choose_grid(height: int, width: int) -> tuple[int, int]:
    """Side of the crops and of their patches, pixels: crops about as large as the images, at most the published 224, in
    the largest patches of which there are eight a side; an even number of them, so that the teacher can look at half
    the size."""
    wanted = min(224, height, width)
    for patch in (16, 8, 4):
        side = round(wanted / (2 * patch)) * 2 * patch
        if side >= MIN_GRID * patch:
            return side, patch
    return MIN_GRID * 4, 4


def choose_side(height: int, width: int, patch: int) -> int:
    """The same for a patch that is given."""
    side = round(min(224, height, width) / (2 * patch)) * 2 * patch
    return max(side, 2 * patch)


def choose_patch(height: int, width: int) -> int | None:
    """The same for crops that are given; None where no patch of 16, 8 or 4 pixels gives an even number."""
    fitting = [patch for patch in (16, 8, 4) if height % (2 * patch) == width % (2 * patch) == 0]
    many = (patch for patch in fitting if min(height, width) >= MIN_GRID * patch)
    return next(many, fitting[-1] if fitting else None)


def choose_batch(num_images: int, processes: int, views_per_image: int) -> int:
    """Views an optimizer step, the same share for every process: 256 each up to the published 2,048, fewer where an
    epoch would be few steps.

    Args:
        num_images: To learn from.
        processes: That share the batch.
        views_per_image: Views that come from one image and stay together.
    """
    share, smallest = BATCH_PER_PROCESS, views_per_image

    def too_large(share: int) -> bool:
        batch = share * processes
        few_steps = batch > MIN_BATCH and batch * MIN_STEPS_PER_EPOCH > num_images
        return batch > min(MAX_BATCH, num_images) or few_steps

    while share // 2 >= smallest and too_large(share):
        share //= 2
    return share // smallest * smallest * processes


def batch_for_a_short_run(batch: int, views: float, unit: int) -> int:
    """The batch halved until a run has :data:`MIN_STEPS` steps, as long as it is not below :data:`MIN_BATCH`.

    Args:
        batch: Views an optimizer step.
        views: Of the whole run.
        unit: Views that stay together, times the processes: the batch is a multiple of it.
    """
    while views / batch < MIN_STEPS and batch // 2 >= MIN_BATCH and batch // 2 % unit == 0 and batch % 2 == 0:
        batch //= 2
    return batch


def enough_views(num_images: int) -> int:
    """Views after which a larger encoder would be the better use of the time."""
    return min(max(EPOCHS * num_images, MIN_VIEWS), MAX_VIEWS, MAX_EPOCHS * num_images)


def epochs_within(seconds: float, views_per_second: float, num_images: int, *, most: int = MAX_EPOCHS) -> int:
    """Whole passes within a time, at most ``most``; 0 where not even one fits."""
    return max(0, min(most, int(seconds * views_per_second / num_images)))


def preferred(views: Mapping[str, float], sizes: Sequence[Size], num_images: int, *, enough: float) -> str | None:
    """The largest encoder that these images are enough for and that sees ``enough`` views; otherwise the smallest,
    where it sees all images once.

    Args:
        views: Of every encoder that fits into memory, within the budget, by its size's name.
        sizes: Smallest first.
        num_images: To learn from.
        enough: Of :func:`enough_views`, or what was asked for.
    """
    possible = [size for size in sizes if views.get(size.name, 0) >= num_images]
    suited = [size for size in possible if num_images >= size.min_images and views[size.name] >= enough]
    if suited:
        return suited[-1].name
    return possible[0].name if possible else None
