"""Training crops of images with class masks, and features of fixed windows where the encoder is frozen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int16, Shaped
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from hardpatch.data.loader.loading import Normalise
from hardpatch.evaluate.dense.class_masks import IGNORED, MaskedImage, MaskedImages
from hardpatch.evaluate.dense.feature_maps import DenseEncoder
from hardpatch.evaluate.dense.windows import cut, window_corners
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import tracked
from hardpatch.runtime.seeding import Stream, derive_seed


def working_size(height: int, width: int, short_side: int, scale: float = 1.0) -> tuple[int, int]:
    """Height and width of an image whose short side is brought to ``short_side``, times ``scale``; 0: as it is."""
    factor = scale * (short_side / min(height, width) if short_side else 1.0)
    return max(1, round(height * factor)), max(1, round(width * factor))


def resize(image: Shaped[Tensor, "c h w"], size: tuple[int, int]) -> Shaped[Tensor, "c y x"]:
    """Bicubic, as in pre-training."""
    if (image.shape[1], image.shape[2]) == size:
        return image
    resized: Tensor = v2.functional.resize(image, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return resized


class SegmentationCrops(Dataset[tuple[Shaped[Tensor, "c h w"], Int16[Tensor, "h w"]]]):
    """Images enlarged by a random factor, cropped and mirrored with their masks; a function of (seed, pass, index).

    Where a crop reaches over the edge, the image is filled with ``fill`` and the mask does not count.

    Args:
        short_side: Of an image before it is enlarged; 0: as it is.
        scale: Range of the factor.
        fill: Value of every channel outside of the image.
    """

    def __init__(
        self,
        images: MaskedImages,
        *,
        crop: tuple[int, int],
        short_side: int,
        scale: tuple[float, float],
        flip: bool,
        fill: Sequence[int],
        seed: int,
    ) -> None:
        self.images = images
        self.short_side = short_side
        self.scale = scale
        self.seed = seed
        steps = [v2.RandomCrop(crop, pad_if_needed=True, fill={tv_tensors.Image: list(fill), tv_tensors.Mask: IGNORED})]
        if flip:
            steps.append(v2.RandomHorizontalFlip())
        self.augment = v2.Compose(steps)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Shaped[Tensor, "c h w"], Int16[Tensor, "h w"]]:
        number, index = key
        image, mask = self.images.read(index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, Stream.AUGMENTATION, number, index))
            factor = float(torch.empty(()).uniform_(*self.scale))
            size = working_size(image.shape[1], image.shape[2], self.short_side, factor)
            resized, classes = resize(image, size), _resize_mask(mask, size)
            cropped, target = self.augment(tv_tensors.Image(resized), tv_tensors.Mask(classes))
        return cropped.as_subclass(Tensor), target.as_subclass(Tensor)


def _resize_mask(mask: Int16[Tensor, "h w"], size: tuple[int, int]) -> Int16[Tensor, "y x"]:
    """Nearest neighbour: classes are not averaged."""
    resized: Tensor = v2.functional.resize(mask[None], list(size), interpolation=InterpolationMode.NEAREST_EXACT)
    return resized[0]


def stack_pairs(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A batch of pairs."""
    return torch.stack([first for first, _ in items]), torch.stack([second for _, second in items])


class FeatureCache(Dataset[tuple[Float[Tensor, "d y x"], Int16[Tensor, "h w"]]]):
    """Features of windows that cover every image, computed once, with the masks of the windows.

    Args:
        short_side: Of an image; 0: as it is.
        flip: Every window mirrored as well.

    Raises:
        InputError: It would be larger.
    """

    def __init__(
        self,
        encoder: DenseEncoder,
        images: MaskedImages,
        normalise: Normalise,
        *,
        window: tuple[int, int],
        short_side: int,
        flip: bool,
        limit_gb: float,
        description: str,
    ) -> None:
        self.features: list[Tensor] = []
        self.masks: list[Tensor] = []
        device, used = normalise.mean.device, 0
        for position in tracked(range(len(images)), description):
            pixels, classes = self._windows(images.read(position), normalise, window, short_side, flip)
            with torch.no_grad():
                found = torch.cat(encoder(pixels.to(device)), dim=1).half().cpu()
            self.features += found
            self.masks += classes
            used += found.nbytes + classes.nbytes
            if (total := used / (position + 1) * len(images) / 1e9) > limit_gb:
                raise InputError(
                    f"cache_gb: the features of {len(images):,} images need about {total:.1f} GB, the limit is "
                    f"{limit_gb:g}; raise it, or leave --cache away"
                )

    @staticmethod
    def _windows(
        sample: MaskedImage, normalise: Normalise, window: tuple[int, int], short_side: int, flip: bool
    ) -> tuple[Float[Tensor, "n c h w"], Int16[Tensor, "n h w"]]:
        """Normalised windows of one image, padded by 0 (the mean) and with their masks."""
        image, mask = sample
        size = working_size(image.shape[1], image.shape[2], short_side)
        pixels = normalise(resize(image, size)[None].to(normalise.mean.device))[0]
        classes = _resize_mask(mask, size)
        corners = window_corners(size, window, overlap=0.0)
        parts = torch.stack([cut(pixels, corner, window, fill=0) for corner in corners])
        targets = torch.stack([cut(classes[None], corner, window, fill=IGNORED)[0] for corner in corners])
        if flip:
            parts, targets = torch.cat([parts, parts.flip(-1)]), torch.cat([targets, targets.flip(-1)])
        return parts, targets

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Float[Tensor, "d y x"], Int16[Tensor, "h w"]]:
        return self.features[key[1]].float(), self.masks[key[1]]
