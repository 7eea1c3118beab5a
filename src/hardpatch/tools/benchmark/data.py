"""``hardpatch benchmark data``: every way to load, beside a plain loader, and what a training step needs of them."""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hardpatch.config.benchmark import LOADERS, LoadingConfig, StepConfig
from hardpatch.data.loader.loading import default_workers, read_or_next
from hardpatch.data.sources import Source, open_source
from hardpatch.runs.folder import versions
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.files import write_text_atomically
from hardpatch.runtime.log import say, tracked
from hardpatch.tools.benchmark.loaders import MAKERS, ON_DEVICE, Material


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
        with tempfile.TemporaryDirectory(prefix="hpm-benchmark-") as folder:
            material = make_files(source, config, Path(folder))
            loaders = {name: MAKERS[name](material, config, device) for name in names}
            rates = _measure(loaders, config, device)
            profiles = {name: _profile(loader) for name, loader in loaders.items() if config.profile}
            average = statistics.fmean(file.stat().st_size for file in material.files)
    finally:
        torch.set_num_threads(threads)
    ratios = {name: [a / b for a, b in zip(values, rates["plain"])] for name, values in rates.items()}
    cpu = versions(torch.device("cpu"))["device"]
    return {
        "device": cpu if device.type == "cpu" else f"{cpu}; {versions(device)['device']}",
        "images": _describe(source, config, average),
        "images_per_second_per_core": {name: statistics.fmean(values) for name, values in rates.items()},
        "images_per_second_per_core_std": {name: _spread(values) for name, values in rates.items()},
        "images_per_second_per_core_rounds": rates,
        "ratio_to_plain": {name: statistics.fmean(values) for name, values in ratios.items()},
        "ratio_to_plain_std": {name: _spread(values) for name, values in ratios.items()},
        "step": _step(config),
        "workers": max(1, default_workers()),
        **({"profile": profiles} if config.profile else {}),
        "settings": {
            name: getattr(config, name) for name in ("image_size", "crop_scale", "batch_size", "seconds", "rounds")
        },
        "versions": versions(device),
    }


def _chosen(config: LoadingConfig, device: torch.device) -> list[str]:
    """The loaders to measure, in the order of the table."""
    if len(set(config.loaders)) < len(config.loaders):
        raise InputError(f"loaders: must be different, got {', '.join(config.loaders)}")
    impossible = [] if device.type == "cuda" else [name for name in config.loaders if name in ON_DEVICE]
    if impossible:
        raise InputError(f"loaders: {impossible[0]} is measured on CUDA only, and the device is {device.type}")
    wanted = config.loaders or [name for name in MAKERS if device.type == "cuda" or name not in ON_DEVICE]
    return [name for name in LOADERS if name == "plain" or name in wanted]


def make_files(source: Source, config: LoadingConfig, folder: Path) -> Material:
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
    return Material(files, folder)


def _describe(source: Source, config: LoadingConfig, average: float) -> str:
    number = min(config.images, len(source))
    if not all(config.enlarge):
        return f"{number} files of {config.data} as they are, {average / 1000:.0f} kB each"
    height, width = read_or_next(source, 0)[0].image.shape[1:]
    wide, tall = config.enlarge
    return (
        f"{number} JPEGs of {wide}x{tall} px (quality 90, 4:2:0, {average / 1000:.0f} kB each), made by resizing "
        f"images of {config.data}, the first {width}x{height} px"
    )


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


def _profile(batches: Iterator[Tensor]) -> dict[str, float]:
    """Share of each function in the time of a few batches, the ten largest."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(5):
        next(batches)
    profiler.disable()
    found = pstats.Stats(profiler)
    entries: dict[tuple[str, int, str], tuple[int, int, float, float, Any]] = found.stats  # type: ignore[attr-defined]
    times: dict[str, float] = {}
    for (file, _, function), (_, _, own, _, _) in entries.items():
        name = function if file == "~" else f"{os.path.basename(file)}: {function}"  # noqa: PTH119
        times[name] = times.get(name, 0.0) + own
    largest = sorted(times, key=lambda name: -times[name])[:10]
    return {name: times[name] / sum(times.values()) for name in largest}


def _step(config: LoadingConfig) -> dict[str, Any] | None:
    """What the training step needs: given, or measured."""
    if config.step_images_per_second is not None:
        return {"name": "as given", "images_per_second": config.step_images_per_second, "masks_per_image": 1}
    if config.step == "none":
        return None
    from hardpatch.tools.benchmark import step

    chosen = StepConfig(
        encoder=config.encoder, image_size=config.image_size, device=config.device, rounds=1, variants=(config.step,)
    )
    found = step.run(chosen)
    views = 1 if config.step == "reference" else step.variant_config(config.step, chosen, 16).method.masks_per_image
    return {
        "name": f"{config.step} of {config.encoder} on {found['device']}",
        "images_per_second": found["images_per_second"][config.step] / views,
        "masks_per_image": views,
    }


def _spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def table(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table that people read, header first."""
    step = result["step"]
    rows: list[tuple[str, ...]] = [
        ("", "images/s per core", "of plain", *(["cores for the step"] if step else []), "what")
    ]
    for name, rate in result["images_per_second_per_core"].items():
        spread, ratio_spread = result["images_per_second_per_core_std"][name], result["ratio_to_plain_std"][name]
        rows.append((
            name,
            f"{rate:,.0f}" + (f" +- {spread:,.0f}" if spread is not None else ""),
            f"{result['ratio_to_plain'][name]:.2f}" + (f" +- {ratio_spread:.2f}" if ratio_spread is not None else ""),
            *([f"{step['images_per_second'] / rate:.1f}"] if step else []),
            LOADERS[name],
        ))  # fmt: skip
    return rows


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


def save(result: Mapping[str, Any], out: Path) -> None:
    """The figures as JSON, and their picture beside it."""
    from hardpatch.tools.benchmark.figure import draw_loaders

    out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out, json.dumps(result, indent=2) + "\n")
    draw_loaders(result, out.with_suffix(".png"))
