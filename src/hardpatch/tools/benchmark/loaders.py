"""The ways to a batch of crops that ``hardpatch benchmark data`` holds against each other."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

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
from hardpatch.data.loader.cache import open_cache
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
from hardpatch.data.sources import FileSource, open_source
from hardpatch.data.tools import pack

PACKED = ("shards", "packed-cache")
"""Loaders that read shards of ``hardpatch data pack``."""
IN_MEMORY = ("cache", "packed-cache", "device-cache")
"""Loaders that keep decoded images, whole."""
ON_DEVICE = ("device-cache", "device-decode")
"""Loaders whose work the device does."""


def endless_batches(
    name: str, files: list[Path], folder: Path, config: LoadingConfig, device: torch.device
) -> Iterator[Tensor]:
    """Batches of one of :data:`hardpatch.config.benchmark.LOADERS`, without end.

    Args:
        name: Which.
        files: JPEGs.
        folder: Where more may be written.
        config: Size and scale of the crops, batch.
        device: Of the loaders that work on one.
    """
    if name in ("plain", "torchvision"):
        images = Crops(files, *(pillow_crops(config) if name == "plain" else torchvision_crops(config)))
        loader = DataLoader(images, config.batch_size, shuffle=True, drop_last=True)
        return itertools.chain.from_iterable(itertools.repeat(loader))
    if name in PACKED:
        pack.run(PackConfig(str(files[0].parent), str(folder / name), size=config.packed_size, workers=0))
        source = open_source(str(folder / name / "*.tar"))
    else:
        source = FileSource([str(file) for file in files], decoder=RGB)
    size, whole = (config.image_size, config.image_size), name in IN_MEMORY
    cache = open_cache(source, "ram", size=size, jpeg_scaling=False) if whole and name not in ON_DEVICE else None
    training = TrainingImages(
        source, size=size, crop_scale=config.crop_scale, flip=True, seed=0, jpeg_scaling=not whole, cache=cache
    )
    order = TrainingOrder(
        len(source), batch_size=config.batch_size, first_step=0, total_steps=10**9, seed=0, position=Position()
    )
    if name == "device-cache":
        batches = batches_kept_on_device(ImagesOnDevice(training, device=device, workers=0), order)
    elif name == "device-decode":
        wholes = last_read(WholeImages(training, encoded=device.type == "cuda"), 0)
        batches = batches_decoded_on_device(wholes, order, device=device, workers=0)
    else:
        for index in range(len(source) if cache is not None else 0):  # what the first epoch does
            training[0, index]
        batches = training_batches(training, order, workers=0, pin_memory=False)
    return (batch.images for batch in batches)


class Crops(Dataset[Tensor]):
    """Images of other loaders than ours, one at a time.

    Args:
        files: JPEGs.
        read: Opens one.
        transform: Makes a crop of it.
    """

    def __init__(self, files: list[Path], read: Callable[[Path], object], transform: Callable[..., Tensor]) -> None:
        self.files, self.read, self.transform = files, read, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.read(self.files[index]))


def pillow_crops(config: LoadingConfig) -> tuple[Callable[[Path], Image.Image], Callable[..., Tensor]]:
    """Pillow and torchvision's classic transforms."""

    def read(file: Path) -> Image.Image:
        with Image.open(file) as picture:
            return picture.convert("RGB")

    return read, transforms.Compose([
        transforms.RandomResizedCrop(config.image_size, config.crop_scale, interpolation=InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ])  # fmt: skip


def torchvision_crops(config: LoadingConfig) -> tuple[Callable[[Path], Tensor], Callable[..., Tensor]]:
    """torchvision's decoder and its transforms of tensors."""

    def read(file: Path) -> Tensor:
        content = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torchvision hands its decoders over to torchcodec
            pixels: Tensor = decode_jpeg(content, ImageReadMode.RGB)
        return pixels

    return read, v2.Compose([
        v2.RandomResizedCrop(
            config.image_size, config.crop_scale, interpolation=InterpolationMode.BICUBIC, antialias=True
        ),
        v2.RandomHorizontalFlip(),
    ])  # fmt: skip
