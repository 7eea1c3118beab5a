"""``hardpatch benchmark data``: every way to load, beside a plain loader, and what a training step needs of them."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from hardpatch.config.benchmark import LOADERS, LoadingConfig, StepConfig
from hardpatch.config.commands import PackConfig
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
    default_workers,
    last_read,
    read_or_next,
    training_batches,
)
from hardpatch.data.sources import FileSource, Source, open_source
from hardpatch.data.tools import pack
from hardpatch.runs.folder import versions
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import say, tracked
from hardpatch.tools.benchmark import step
from hardpatch.tools.benchmark.presentation import ratios_to, spread

ON_DEVICE = ("device-cache", "device-decode")
"""Loaders whose work the device does."""


def run(config: LoadingConfig) -> dict[str, Any]:
    """Make the images, and time every loader in turns.

    Raises:
        InputError: The data cannot be read, or a loader is named twice or cannot run here.
    """
    device = distributed.choose_device(config.device)
    names = _chosen(config, device)
    source = open_source(config.data, image_size=config.enlarge[::-1] if all(config.enlarge) else (400, 500))
    if len(source) < config.batch_size or config.images < config.batch_size:
        raise InputError(
            f"images: needs at least one batch ({config.batch_size}), got {min(len(source), config.images)}"
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="hardpatch-benchmark-") as folder:
            files = make_files(source, config, Path(folder))
            loaders = {name: endless_batches(name, files, Path(folder), config, device) for name in names}
            rates = _measure(loaders, config, device)
            kilobytes = statistics.fmean(file.stat().st_size for file in files) / 1000
    finally:
        torch.set_num_threads(threads)
    cpu = versions(torch.device("cpu"))["device"]
    return {
        "device": cpu if device.type == "cpu" else f"{cpu}; {versions(device)['device']}",
        "images": _describe(source, config, len(files), kilobytes),
        "images_per_second_per_core": {name: statistics.fmean(values) for name, values in rates.items()},
        "images_per_second_per_core_std": {name: spread(values) for name, values in rates.items()},
        "images_per_second_per_core_rounds": rates,
        **ratios_to("plain", rates),
        "step": _step(config),
        "workers": max(1, default_workers()),
        "settings": {
            name: getattr(config, name) for name in ("image_size", "crop_scale", "batch_size", "seconds", "rounds")
        },
        "versions": versions(device),
    }


def _chosen(config: LoadingConfig, device: torch.device) -> list[str]:
    """The loaders to measure, in the order of the table."""
    if len(set(config.loaders)) < len(config.loaders):
        raise InputError(f"loaders: must be different, got {', '.join(config.loaders)}")
    possible = [name for name in LOADERS if device.type == "cuda" or name not in ON_DEVICE]
    for name in config.loaders:
        if name not in possible:
            raise InputError(f"loaders: {name} is measured on CUDA only, and the device is {device.type}")
    return [name for name in possible if name == "plain" or name in (config.loaders or possible)]


def make_files(source: Source, config: LoadingConfig, folder: Path) -> list[Path]:
    """JPEG files of the first images of a source, resized to ``enlarge``."""
    files = []
    (folder / "files").mkdir()
    for index in tracked(range(min(config.images, len(source))), "making the images"):
        file = folder / "files" / f"{index:06d}.jpg"
        if all(config.enlarge):
            image = read_or_next(source, index)[0].image
            if image.dtype != torch.uint8 or image.shape[0] != 3:
                raise InputError(f"data: the benchmark enlarges 8-bit colour images, got {source.name(index)}")
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            picture.resize(config.enlarge, Image.Resampling.LANCZOS).save(file, quality=90, subsampling="4:2:0")
        else:
            file.write_bytes(source.content(index))
        files.append(file)
    return files


def _describe(source: Source, config: LoadingConfig, number: int, kilobytes: float) -> str:
    if not all(config.enlarge):
        return f"{number} files of {config.data} as they are, {kilobytes:.0f} kB each"
    height, width = read_or_next(source, 0)[0].image.shape[1:]
    wide, tall = config.enlarge
    return (
        f"{number} JPEGs of {wide}x{tall} px (quality 90, 4:2:0, {kilobytes:.0f} kB each), made by resizing "
        f"images of {config.data}, the first {width}x{height} px"
    )


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
    if name == "plain":
        loader = DataLoader(PlainImages(files, config), config.batch_size, shuffle=True, drop_last=True)
        return itertools.chain.from_iterable(itertools.repeat(loader))
    if name == "shards":
        pack.run(PackConfig(str(files[0].parent), str(folder / name), size=config.packed_size, workers=0))
        source = open_source(str(folder / name / "*.tar"))
    else:
        source = FileSource([str(file) for file in files], decoder=RGB)
    size, whole = (config.image_size, config.image_size), name in ("cache", "device-cache")
    cache = open_cache(source, "ram", size=size, jpeg_scaling=False) if name == "cache" else None
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


class PlainImages(Dataset[Tensor]):
    """The loader of most research code: Pillow and torchvision's classic transforms, one image at a time."""

    def __init__(self, files: list[Path], config: LoadingConfig) -> None:
        self.files = files
        self.crop = transforms.Compose([
            transforms.RandomResizedCrop(config.image_size, config.crop_scale, interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.files[index]) as picture:
            return self.crop(picture.convert("RGB"))  # type: ignore[no-any-return]


def _measure(
    loaders: Mapping[str, Iterator[Tensor]], config: LoadingConfig, device: torch.device
) -> dict[str, list[float]]:
    """Images per second of each loader in each round; processor time, or the clock's for the device's work."""

    def seconds(name: str, batches: int) -> float:
        clock = time.perf_counter if name in ON_DEVICE else time.process_time
        distributed.synchronise(device)
        start = clock()
        for _ in range(batches):
            next(loaders[name])
        distributed.synchronise(device)
        return clock() - start

    epoch = -(-config.images // config.batch_size)
    for name in loaders:
        seconds(name, epoch)  # files into the page cache, images into caches
    share = config.seconds / config.rounds / len(loaders)
    counts = {name: max(1, round(share / (seconds(name, epoch) / epoch))) for name in loaders}
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    names = list(loaders)
    for number in range(config.rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            rates[name].append(counts[name] * config.batch_size / seconds(name, counts[name]))
        say(f"round {number + 1} of {config.rounds}")
    return rates


def _step(config: LoadingConfig) -> dict[str, Any] | None:
    """What the training step needs: given, or measured."""
    if config.step_images_per_second is not None:
        return {"name": "as given", "images_per_second": config.step_images_per_second, "masks_per_image": 1}
    if config.step == "none":
        return None
    chosen = StepConfig(
        encoder=config.encoder, image_size=config.image_size, device=config.device, rounds=1, variants=(config.step,)
    )
    found = step.run(chosen)
    views = step.variant_config(config.step, chosen, 16).method.masks_per_image
    return {
        "name": f"{config.step} of {config.encoder} on {found['device']}",
        "images_per_second": found["images_per_second"][config.step] / views,
        "masks_per_image": views,
    }


def verdict(result: Mapping[str, Any]) -> list[str]:
    """Which of step and loader limits on this machine, a line for each loader."""
    step, workers = result["step"], result["workers"]
    if step is None:
        return ["what limits, step or loader:  --step exact --encoder NAME, or --step-images-per-second N"]
    needed = step["images_per_second"]
    lines = [
        f"the step ({step['name']}) takes {needed:,.1f} images/s"
        + (f", each for {step['masks_per_image']} views" if step["masks_per_image"] > 1 else "")
    ]
    for name, rate in result["images_per_second_per_core"].items():
        if rate * workers >= needed:
            lines.append(f"  {name}: the step limits ({workers} data process(es) give {rate * workers:,.0f} images/s)")
        else:
            lines.append(
                f"  {name}: the LOADER limits: {workers} data process(es) give {rate * workers:,.0f} images/s, "
                f"{needed / rate:.0f} are needed"
            )
    return lines
