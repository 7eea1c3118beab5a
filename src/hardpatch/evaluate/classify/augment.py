"""Training images of a fine-tuning: crop, mirror, RandAugment, erasing, and mixing within a batch.

Every draw is a function of the seed and of where it happens: of (epoch, image) for an image, of (step, process,
micro-batch) for the mixing. timm draws from three generators at once; all are seeded for each image.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import posterize as timm_posterize
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from hardpatch.data.loader.loading import Cover, Damage, Normalise, read_or_next
from hardpatch.data.sources import Source, class_indices
from hardpatch.evaluate.classify.finetune_settings import FinetuneSettings
from hardpatch.runtime.seeding import Stream, derive_seed, generators_seeded


class LabelledImage(NamedTuple):
    """One augmented training image."""

    image: Float[Tensor, "c h w"]
    """Normalised."""
    label: int
    damaged: list[Damage]
    """What could not be read in its place."""


class LabelledBatch(NamedTuple):
    """Augmented training images."""

    images: Float[Tensor, "b c h w"]
    labels: Int[Tensor, " b"]
    damaged: list[Damage]


def posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    """timm's ``posterize``, for which newer Pillows refuse the strongest level: of 0 bits nothing but black is left."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    kept: Image.Image = timm_posterize(image, bits_to_keep)
    return kept


class RandAugment(nn.Module):
    """timm's RandAugment, set up as ``timm.data.create_transform`` does."""

    def __init__(self, policy: str, size: tuple[int, int], mean: tuple[float, ...]) -> None:
        super().__init__()
        settings = {
            "translate_const": int(min(size) * 0.45),
            "img_mean": tuple(min(255, round(255 * value)) for value in mean),
            "interpolation": Image.Resampling.BICUBIC,
        }
        self.transform = rand_augment_transform(policy, settings)
        for operation in self.transform.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize

    def forward(self, image: Tensor) -> Tensor:
        """A uint8 image (3, H, W) to another."""
        picture = self.transform(Image.fromarray(image.permute(1, 2, 0).numpy()))
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


class FinetuneImages(Dataset[LabelledImage]):
    """Augmented images of a labelled source, asked for by (epoch, index).

    A damaged image is reported, and the next readable one takes its place with its own label.
    """

    def __init__(
        self,
        source: Source,
        classes: list[str],
        *,
        size: tuple[int, int],
        normalise: Normalise,
        mean: tuple[float, ...],
        settings: FinetuneSettings,
    ) -> None:
        self.source = source
        self.labels = class_indices(source.labels or (), classes)
        self.normalise = normalise
        self.seed = settings.seed
        crop = v2.RandomResizedCrop(size, settings.crop_scale, interpolation=InterpolationMode.BICUBIC, antialias=True)
        steps: list[nn.Module] = [Cover(size) if settings.crop_scale == (1, 1) else crop]
        if settings.flip:
            steps.append(v2.RandomHorizontalFlip())
        if settings.rand_augment:
            steps.append(RandAugment(settings.rand_augment, size, mean))
        self.augment = nn.Sequential(*steps)
        self.erase = RandomErasing(settings.erasing, mode="pixel", device="cpu")

    def __getitem__(self, key: tuple[int, int]) -> LabelledImage:
        epoch, index = key
        sample, damaged = read_or_next(self.source, index)
        with generators_seeded(derive_seed(self.seed, Stream.AUGMENTATION, epoch, index)):
            image = self.normalise(self.augment(sample.image)[None])[0]
            self.erase(image)
        return LabelledImage(image, int(self.labels[(index + len(damaged)) % len(self.source)]), damaged)


def stack(items: list[LabelledImage]) -> LabelledBatch:
    """Images to a batch."""
    return LabelledBatch(
        torch.stack([item.image for item in items]),
        torch.tensor([item.label for item in items]),
        [damage for item in items for damage in item.damaged],
    )


class Mixing:
    """timm's Mixup and CutMix of a batch, and the smoothed targets."""

    def __init__(self, settings: FinetuneSettings, num_classes: int) -> None:
        self.settings = settings
        self.num_classes = num_classes
        self.mixup = Mixup(
            mixup_alpha=settings.mixup, cutmix_alpha=settings.cutmix, prob=settings.mixed_share,
            label_smoothing=settings.label_smoothing, num_classes=num_classes,
        )  # fmt: skip

    def __call__(
        self, images: Float[Tensor, "b c h w"], labels: Int[Tensor, " b"], *, place: tuple[int, int, int]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b n"]]:
        """Images (changed in place) and targets; the draw is a function of ``place``: step, process, micro-batch."""
        if not self.settings.mixes:
            return images, mixup_target(labels, self.num_classes, smoothing=self.settings.label_smoothing)
        with generators_seeded(derive_seed(self.settings.seed, Stream.MIXING, *place)):
            mixed, targets = self.mixup(images, labels)
        return mixed, targets
