"""What images there are to learn from, and how fast one core loads them: from some of them, spread over the source."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from hardpatch.config.config import Config
from hardpatch.config.values import with_fields
from hardpatch.data.images.decode import DecodeError
from hardpatch.data.loader.cache import SHARE_OF_MEMORY, SharedImages, estimate
from hardpatch.data.sources import Source, open_source
from hardpatch.data.tools.describe import find_channels
from hardpatch.method.vit import create_encoder, patch_size
from hardpatch.runs.build import build_decoder, build_downloads, open_images
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.machine import free_memory
from hardpatch.tools.plan.sizes import MIN_GRID, choose_grid, choose_patch, choose_side
from hardpatch.training.batches import training_images

LOOK_AT = 64
"""Images that are read."""


class ImagesFound(NamedTuple):
    """What was seen."""

    number: int
    classes: int
    """0 where nothing is labelled."""
    height: int
    """Median, pixels."""
    width: int


class Loading(NamedTuple):
    """What it takes to crop them."""

    crops_per_second: float
    """Of one core."""
    cache_bytes: int
    """What ``--cache auto`` would keep in RAM; 0: nothing."""


def look_at(source: Source) -> ImagesFound:
    """Sizes and labels.

    Raises:
        InputError: None of the images that were tried can be read.
    """
    shapes, reason = [], ""
    for index in source.spread(LOOK_AT):
        try:
            image = source.read(index).image
        except (DecodeError, OSError) as error:
            reason = reason or f"; the first: {source.name(index)}: {error}"
            continue
        shapes.append((image.shape[1], image.shape[2]))
    if not shapes:
        raise InputError(f"data: no image of {min(len(source), LOOK_AT)} can be read{reason}")
    heights, widths = zip(*shapes)
    return ImagesFound(
        number=len(source),
        classes=len(set(source.labels)) if source.labels else 0,
        height=round(statistics.median(heights)),
        width=round(statistics.median(widths)),
    )


def open_images_of(base: Config, given: Mapping[str, Any]) -> tuple[Config, Source, ImagesFound]:
    """The images, and the config with all that follows from them."""
    channels = base.data.channels
    if "channels" not in given:
        source = open_source(base.data.data, image_size=base.data.size, downloads=build_downloads(base))
        channels = find_channels(source)
    # Numbers that stand for mean and deviation until the run measures them: they change no time.
    stand_in = {"mean": (0.5,) * channels, "std": (0.25,) * channels}
    base = with_fields(base, {"channels": channels, **{k: v for k, v in stand_in.items() if k not in given}})
    base, source = open_images(base)
    found = look_at(source)
    base = with_fields(base, _grid(base, given, found))
    if source.decoder is None:  # images that are made, at the size that is asked for
        source = open_source(base.data.data, decoder=build_decoder(base.data), image_size=base.data.size)
    return base, source, found


def _grid(base: Config, given: Mapping[str, Any], found: ImagesFound) -> dict[str, Any]:
    """Image size and patch, as far as they are not given."""
    own = None
    if "encoder" in given:
        with torch.device("meta"):
            own = patch_size(create_encoder(base.model.encoder, image_size=(224, 224)))[0]
    if "image_size" in given and "patch_size" in given:
        return {}
    if "image_size" in given:
        height, width = base.data.size
        if own and height % own == width % own == 0 and min(height, width) >= MIN_GRID * own:
            return {}
        return {"patch_size": choose_patch(height, width)}
    if "patch_size" in given or (own and min(found.height, found.width) >= MIN_GRID * own):
        side = choose_side(found.height, found.width, base.model.patch_size or own or 16)
        return {"image_size": (side, side)}
    side, patch = choose_grid(found.height, found.width)
    return {"image_size": (side, side), "patch_size": patch}


def time_loading(config: Config, source: Source, *, seconds: float) -> Loading:
    """Crop images as training does, on one core; from RAM, where a run would keep them there.

    Args:
        config: Of the run.
        source: Its images.
        seconds: About how long.
    """
    data = config.data
    need = estimate(source, size=data.size, jpeg_scaling=data.jpeg_scaling, num_read=LOOK_AT)
    cached = need.kept == 1 and need.bytes <= SHARE_OF_MEMORY * free_memory() and config.run.cache in ("auto", "ram")
    cache = SharedImages(len(source), 2 * LOOK_AT * need.largest + 2**20) if cached else None
    images = training_images(config, source, cache=cache)
    indices = source.spread(LOOK_AT)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for index in indices if cached else indices[:1]:
            images.batch([(0, index)])
        done, start = 0, time.perf_counter()
        while done == 0 or time.perf_counter() - start < seconds:
            images.batch([(1 + done // len(indices), indices[done % len(indices)])])
            done += 1
        rate = done * data.crops_per_image / (time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return Loading(rate, need.bytes if cached else 0)
