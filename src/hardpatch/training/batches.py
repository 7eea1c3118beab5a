"""The batches of a run: from which step on, through which cache, cropped where."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext

from hardpatch.config.config import Config
from hardpatch.data.loader.cache import SharedImages, open_cache
from hardpatch.data.loader.device import (
    ImagesOnDevice,
    WholeImages,
    batches_decoded_on_device,
    batches_kept_on_device,
    copied_behind,
)
from hardpatch.data.loader.loading import (
    Batch,
    TrainingImages,
    TrainingOrder,
    default_workers,
    last_read,
    training_batches,
)
from hardpatch.data.sources import Source
from hardpatch.runtime.log import warn
from hardpatch.training.state import Run


def open_batches(run: Run) -> tuple[Generator[Batch, None, None], AbstractContextManager[None]]:
    """The batches of a run from its step on, on the device; all processes have to ask.

    Returns:
        The batches, and what names a data process that dies with the image that it was reading, while it is entered.

    Raises:
        InputError: A cache that was asked for does not fit.
    """
    config, device = run.config, run.device
    views = config.method.masks_per_image * config.data.crops_per_image  # of every image of the source
    order = TrainingOrder(
        len(run.source), batch_size=config.optimisation.batch_size // views, first_step=run.state.step,
        total_steps=run.schedule.total_steps, seed=config.optimisation.seed, position=run.position,
        blocks=run.source.blocks(),
    )  # fmt: skip
    workers = default_workers() if config.run.workers is None else config.run.workers
    if config.run.cache == "device":
        if device.type == "cpu":
            warn("cache: 'device' is the CPU's memory here; --cache ram crops with less work and in data processes")
        on_device = ImagesOnDevice(training_images(config, run.source), device=device, workers=workers)
        return batches_kept_on_device(on_device, order), nullcontext()
    if config.run.augmentation == "device":
        wholes = last_read(WholeImages(training_images(config, run.source), encoded=device.type == "cuda"), workers)
        return batches_decoded_on_device(wholes, order, device=device, workers=workers), wholes.naming()
    data = config.data
    cache = open_cache(run.source, config.run.cache, size=data.size, jpeg_scaling=data.jpeg_scaling)
    images = training_images(config, run.source, cache=cache)
    noted = last_read(images, workers)
    batches = training_batches(images, order, workers=workers, pin_memory=device.type == "cuda", noted=noted)
    return copied_behind(batches, device), noted.naming()


def training_images(config: Config, source: Source, *, cache: SharedImages | None = None) -> TrainingImages:
    """The images of a source as training crops them."""
    data = config.data
    return TrainingImages(
        source, size=data.size, crop_scale=data.crop_scale, flip=data.flip, seed=config.optimisation.seed,
        views=data.crops_per_image, jpeg_scaling=data.jpeg_scaling, cache=cache,
    )  # fmt: skip
