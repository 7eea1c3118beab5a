"""The published fine-tuning recipe, and the written rule by which small data and small images adapt it.

The published constants belong to 1.28 million images of 224 x 224 pixels in batches of 1,024. What a user does not set:

    batch_size      1,024; smaller data: the largest power of two that leaves an epoch at least 10 steps, at least 2
    learning rate   5e-4 per 256 images, so 2e-3 at the published batch; in smaller batches the peak falls with the
                    square root of the batch, not with the batch (5e-4 at 64): Adam's steps have a length of their own
    warmup_epochs   5, at most a tenth of the run
    crop_scale      from 0.08 to 1; smaller images: from the share that has as many pixels as 0.08 of 224 x 224 (4,014),
                    at most 0.35 (a crop of a few pixels shows nothing)
    epochs          100, or 50 for encoders of at least ViT-L's width; not adapted
    mixed_share     all batches get mixup or CutMix; in a run of fewer epochs than published, the share of them that the
                    run is of the published one: a short run has no time to learn by heart, and mixing costs it steps
    rand_augment    rand-m9-mstd0.5-inc1 for 3 channels, of 8 bits, none for others

Source: HPM and MAE (appendix A.1, table 9), for ViT-B and ViT-L; everything else keeps the published value.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from timm.data.auto_augment import rand_augment_transform

from hardpatch.config.evaluations import FinetuneConfig
from hardpatch.runtime.errors import InputError

PUBLISHED_BATCH = 1024
PUBLISHED_BASE_LEARNING_RATE = 5e-4
PUBLISHED_WARMUP_EPOCHS = 5
PUBLISHED_CROP = 0.08
PUBLISHED_PIXELS = 224 * 224
LARGE_WIDTH = 1024
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
STEPS_PER_EPOCH = 10
LARGEST_ADAPTED_CROP = 0.35


@dataclass(frozen=True)
class FinetuneSettings:
    """All that decides what a fine-tuning learns, with nothing left open; what a run can only go on with."""

    epochs: int
    batch_size: int
    micro_batch_size: int
    """Images per process and forward pass."""
    base_learning_rate: float
    min_learning_rate: float
    layer_decay: float
    warmup_epochs: float
    weight_decay: float
    betas: tuple[float, float]
    gradient_clip: float | None
    crop_scale: tuple[float, float]
    flip: bool
    rand_augment: str
    """Empty: none."""
    erasing: float
    mixup: float
    cutmix: float
    mixed_share: float
    label_smoothing: float
    drop_path: float
    labels_per_class: int | None
    seed: int
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of the warm-up."""
        return math.floor(self.warmup_epochs * self.steps_per_epoch)

    @property
    def peak_learning_rate(self) -> float:
        """The highest rate of the last layer."""
        return self.base_learning_rate * self.batch_size / 256

    @property
    def mixes(self) -> bool:
        """Are images of a batch mixed?"""
        return (self.mixup > 0 or self.cutmix > 0) and self.mixed_share > 0


def adapted_batch(num_images: int) -> int:
    """The published batch, or on small data the largest power of two with at least 10 steps an epoch, at least 2."""
    largest = max(2, min(PUBLISHED_BATCH, num_images // STEPS_PER_EPOCH))
    return 1 << (largest.bit_length() - 1)


def adapted_learning_rate(batch_size: int) -> float:
    """The published base learning rate per 256 images; in smaller batches the peak falls with the square root only.

    Source: Malladi et al., "On the SDEs and scaling rules for adaptive gradient algorithms", NeurIPS 2022.
    """
    return PUBLISHED_BASE_LEARNING_RATE * math.sqrt(max(1.0, PUBLISHED_BATCH / batch_size))


def adapted_crop(size: tuple[int, int]) -> tuple[float, float]:
    """The published crop, or on small images one that starts at as many pixels."""
    share = PUBLISHED_CROP * PUBLISHED_PIXELS / (size[0] * size[1])
    return round(min(LARGEST_ADAPTED_CROP, max(PUBLISHED_CROP, share)), 4), 1.0


def resolve_settings(
    config: FinetuneConfig,
    *,
    num_images: int,
    size: tuple[int, int],
    channels: int,
    deep: bool = False,
    width: int,
    flip: bool,
    num_processes: int = 1,
) -> FinetuneSettings:
    """Fill in what is adapted and check the rules between fields.

    Args:
        size: Height and width that the encoder takes.
        deep: Are their values more than 8 bits deep?
        flip: Did pre-training mirror images?
        num_processes: Among which a batch is split.

    Raises:
        InputError: Names the field, the rule and the value.
    """
    batch, micro = _split_batch(config, num_images, num_processes)
    published_epochs = 50 if width >= LARGE_WIDTH else 100
    epochs = published_epochs if config.epochs is None else config.epochs
    warmup = config.warmup_epochs
    if warmup is not None and warmup >= epochs:
        raise InputError(f"warmup_epochs: must be less than epochs ({epochs}), got {warmup:g}")
    crop = config.crop_scale or adapted_crop(size)
    if not 0 < crop[0] <= crop[1]:
        raise InputError(f"crop_scale: must go from a small area above 0 to a large one, got {crop}")
    base = adapted_learning_rate(batch) if config.base_learning_rate is None else config.base_learning_rate
    if config.min_learning_rate > base * batch / 256:
        raise InputError(
            f"min_learning_rate: must be at most the peak, base_learning_rate * batch_size / 256 = "
            f"{base * batch / 256:.3g}, got {config.min_learning_rate:g}"
        )
    given = {
        name: value
        for name, value in asdict(config).items()
        if name in {item.name for item in fields(FinetuneSettings)}
    }
    return FinetuneSettings(**{
        **given,
        "epochs": epochs,
        "batch_size": batch,
        "micro_batch_size": micro,
        "base_learning_rate": base,
        "warmup_epochs": min(PUBLISHED_WARMUP_EPOCHS, epochs / 10) if warmup is None else warmup,
        "crop_scale": crop,
        "mixed_share": min(1.0, epochs / published_epochs) if config.mixed_share is None else config.mixed_share,
        "flip": flip if config.flip is None else config.flip,
        "rand_augment": _rand_augment(config.rand_augment, channels, deep=deep),
        "steps_per_epoch": num_images // batch,
    })  # fmt: skip


def _split_batch(config: FinetuneConfig, num_images: int, num_processes: int) -> tuple[int, int]:
    """Images per step, and per process and forward pass."""
    batch = config.batch_size if config.batch_size is not None else adapted_batch(num_images)
    if batch > num_images:
        raise InputError(f"batch_size: must be at most the number of training images ({num_images}), got {batch}")
    if batch % num_processes:
        raise InputError(f"batch_size: must be divisible by the number of processes ({num_processes}), got {batch}")
    share = batch // num_processes
    micro = config.micro_batch_size or share
    if micro > share or share % micro:
        raise InputError(f"micro_batch_size: must divide the {share} images per process and step, got {micro}")
    if micro % 2 and (config.mixup or config.cutmix) and config.mixed_share != 0:
        raise InputError(
            f"{'micro_batch_size' if config.micro_batch_size else 'batch_size'}: mixup and cutmix mix pairs and need "
            f"an even number of images per process and forward pass, got {micro}"
        )
    return batch, micro


def _rand_augment(given: str | None, channels: int, *, deep: bool) -> str:
    """The policy's name."""
    if given is None:
        return RAND_AUGMENT if channels == 3 and not deep else ""
    if given and deep:
        raise InputError(f"rand_augment: works on 8-bit images only, and these are deeper; got {given!r}")
    if given and channels != 3:
        raise InputError(f"rand_augment: works on 3 channels only, and the images have {channels}; got {given!r}")
    if given:
        try:
            rand_augment_transform(given)
        except (AssertionError, ValueError, KeyError) as error:
            raise InputError(f"rand_augment: timm knows no policy {given!r}, only such as {RAND_AUGMENT!r}") from error
    return given


def differences(before: dict[str, object], now: dict[str, object]) -> list[str]:
    """What decides the result and differs, as readable lines."""
    return [
        f"{name}: {before.get(name)!r} -> {now.get(name)!r}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
