"""What images there are to learn from, and how fast one core loads them: from some of them, spread over the source."""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

from hpm.batches import training_images
from hpm.config import Config
from hpm.data.cache import SHARE_OF_MEMORY, SharedImages, estimate, free_memory
from hpm.data.decode import DecodeError
from hpm.data.sources import Source
from hpm.errors import InputError

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
    decoded_bytes: int
    """Of all images."""


class Loading(NamedTuple):
    """What it takes to crop them."""

    images_per_second: float
    """Of one core."""
    cached: bool
    """Would ``--cache auto`` keep all decoded images in RAM?"""


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
        shapes.append((image.shape[1], image.shape[2], image.numel() * image.element_size()))
    if not shapes:
        raise InputError(f"data: no image of {min(len(source), LOOK_AT)} can be read{reason}")
    heights, widths, sizes = zip(*shapes)
    return ImagesFound(
        number=len(source),
        classes=len(set(source.labels)) if source.labels else 0,
        height=round(statistics.median(heights)),
        width=round(statistics.median(widths)),
        decoded_bytes=round(statistics.fmean(sizes) * len(source)),
    )


def time_loading(config: Config, source: Source, *, seconds: float) -> Loading:
    """Crop images as training does, in this process; from RAM, where a run would keep them there.

    Args:
        config: Of the run.
        source: Its images.
        seconds: About how long.
    """
    data = config.data
    need = estimate(source, size=data.size, jpeg_scaling=data.jpeg_scaling, num_read=LOOK_AT)
    cached = need.kept == 1 and need.bytes <= SHARE_OF_MEMORY * free_memory()
    cache = SharedImages(len(source), 2 * LOOK_AT * need.largest + 2**20) if cached else None
    images = training_images(config, source, cache=cache)
    indices = source.spread(LOOK_AT)
    for index in indices if cached else indices[:1]:
        images.batch([(0, index)])
    done, start = 0, time.perf_counter()
    while done == 0 or time.perf_counter() - start < seconds:
        images.batch([(1 + done // len(indices), indices[done % len(indices)])])
        done += 1
    return Loading(done * data.crops_per_image / (time.perf_counter() - start), cached)
