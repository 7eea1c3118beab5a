"""The ways to a batch of crops that ``hardpatch benchmark data`` holds against each other."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode, v2

from hardpatch.config.benchmark import LoadingConfig
from hardpatch.config.data_tools import PackConfig
from hardpatch.data.images.decode import RGB
from hardpatch.data.loader.cache import SharedImages, open_cache
from hardpatch.data.loader.device import (
    ImagesOnDevice,
    WholeImages,
    batches_decoded_on_device,
    batches_kept_on_device,
)
from hardpatch.data.loader.loading import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Position,
    TrainingImages,
    TrainingOrder,
    last_read,
    training_batches,
)
from hardpatch.data.sources import FileSource, Source, open_source
from hardpatch.data.tools import pack


class Material(NamedTuple):
    """The images that all loaders read."""

    files: list[Path]
    """JPEGs."""
    folder: Path
    """Where more may be written."""


class PlainImages(Dataset[Tensor]):
    """Pillow and torchvision's classic transforms, an image at a time.

    Args:
        files: JPEGs.
        config: Size and scale of the crops.
    """

    def __init__(self, files: list[Path], config: LoadingConfig) -> None:
        self.files = files
        self.transform = transforms.Compose([
            transforms.RandomResizedCrop(
                config.image_size, config.crop_scale, interpolation=InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.files[index]) as picture:
            made: Tensor = self.transform(picture.convert("RGB"))
        return made


class TorchvisionImages(Dataset[Tensor]):
    """torchvision's decoder and its transforms of tensors.

    Args:
        files: JPEGs.
        config: Size and scale of the crops.
    """

    def __init__(self, files: list[Path], config: LoadingConfig) -> None:
        self.files = files
        self.transform = v2.Compose([
            v2.RandomResizedCrop(
                config.image_size, config.crop_scale, interpolation=InterpolationMode.BICUBIC, antialias=True
            ),
            v2.RandomHorizontalFlip(),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        content = torch.frombuffer(bytearray(self.files[index].read_bytes()), dtype=torch.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torchvision hands its decoders over to torchcodec
            pixels = decode_jpeg(content, ImageReadMode.RGB)
        made: Tensor = self.transform(pixels)
        return made


def plain(material: Material, config: LoadingConfig, device: torch.device) -> Iterator[Tensor]:
    """Batches of the plain loader."""
    return _endless(PlainImages(material.files, config), config)


def torchvision(material: Material, config: LoadingConfig, device: torch.device) -> Iterator[Tensor]:
    """Batches by torchvision alone."""
    return _endless(TorchvisionImages(material.files, config), config)


def files(material: Material, config: LoadingConfig, device: torch.device) -> Iterator[Tensor]:
    """Our batches from files."""
    return _ours(FileSource([str(file) for file in material.files], decoder=RGB), config)


def shards(material: Material, config: LoadingConfig, device: torch.device) -> Iterator[Tensor]:
    """Our batches from shards of hardpatch data pack."""
    out = material.folder / "packed"
    pack.run(PackConfig(str(material.folder / "files"), str(out), size=config.packed_size, workers=0))
    return _ours(open_source(str(out / "*.tar")), config)


def cache(material: Material, config: LoadingConfig, device: torch.device) -> Iterator[Tensor]:
    """Our batches from decoded images in RAM."""
    source = FileSource([str(file) for file in material.files], decoder=RGB)
    size = (config.image_size, config.image_size)
    kept = open_cache(source, "ram", size=size, jpeg_scaling=False)
    return _ours(source, config, cache=kept, jpeg_scaling=False)


def packed_cache(material: Material, config: LoadingConfig, device: torch.device) -> Iterator[Tensor]:
    """The same of the shards' images, which are smaller."""
    out = material.folder / "packed-for-cache"
    pack.run(PackConfig(str(material.folder / "files"), str(out), size=config.packed_size, workers=0))
    source = open_source(str(out / "*.tar"))
    size = (config.image_size, config.image_size)
    return _ours(source, config, cache=open_cache(source, "ram", size=size, jpeg_scaling=False), jpeg_scaling=False)


def device_cache(material: Material, config: LoadingConfig, device: torch.device) -> Iterator[Tensor]:
    """Our batches from decoded images on the device."""
    images = _images(FileSource([str(file) for file in material.files], decoder=RGB), config, jpeg_scaling=False)
    kept = ImagesOnDevice(images, device=device, workers=0)
    return (batch.images for batch in batches_kept_on_device(kept, _order(len(material.files), config)))


def device_decode(material: Material, config: LoadingConfig, device: torch.device) -> Iterator[Tensor]:
    """Our batches, decoded and cropped on the device."""
    images = _images(FileSource([str(file) for file in material.files], decoder=RGB), config)
    wholes = last_read(WholeImages(images, encoded=device.type == "cuda"), 0)
    order = _order(len(material.files), config)
    return (batch.images for batch in batches_decoded_on_device(wholes, order, device=device, workers=0))


def _endless(images: Dataset[Tensor], config: LoadingConfig) -> Iterator[Tensor]:
    loader = DataLoader(images, config.batch_size, shuffle=True, drop_last=True)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def _ours(
    source: Source, config: LoadingConfig, *, cache: SharedImages | None = None, jpeg_scaling: bool = True
) -> Iterator[Tensor]:
    images = _images(source, config, cache=cache, jpeg_scaling=jpeg_scaling)
    if cache is not None:  # what the first epoch does
        for index in range(len(source)):
            images[0, index]
    order = _order(len(source), config)
    return (batch.images for batch in training_batches(images, order, workers=0, pin_memory=False))


def _images(
    source: Source, config: LoadingConfig, *, cache: SharedImages | None = None, jpeg_scaling: bool = True
) -> TrainingImages:
    size = (config.image_size, config.image_size)
    return TrainingImages(
        source, size=size, crop_scale=config.crop_scale, flip=True, seed=0, jpeg_scaling=jpeg_scaling, cache=cache
    )


def _order(num_images: int, config: LoadingConfig) -> TrainingOrder:
    return TrainingOrder(
        num_images, batch_size=config.batch_size, first_step=0, total_steps=10**9, seed=0, position=Position()
    )


Maker = Callable[[Material, LoadingConfig, torch.device], Iterator[Tensor]]

MAKERS: dict[str, Maker] = {
    "plain": plain,
    "torchvision": torchvision,
    "files": files,
    "shards": shards,
    "cache": cache,
    "packed-cache": packed_cache,
    "device-decode": device_decode,
    "device-cache": device_cache,
}
"""By the names of :data:`hardpatch.config.benchmark.LOADERS`; each makes endless batches."""

ON_DEVICE = ("device-cache", "device-decode")
"""Loaders whose work the device does."""
