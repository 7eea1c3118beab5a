"""From a source to batches on the device: crops, workers. The order is :mod:`hardpatch.data.loader.order`'s."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Shaped
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from hardpatch.data.images.crops import Box, covering, crop_numbers, draw_box, resample, resample_mask
from hardpatch.data.images.decode import DecodeError, Sample
from hardpatch.data.loader.cache import SharedImages
from hardpatch.data.loader.last_read import LOADER_ERRORS, LastRead
from hardpatch.data.loader.order import Ahead
from hardpatch.data.loader.order import Position as Position
from hardpatch.data.loader.order import TrainingOrder as TrainingOrder
from hardpatch.data.loader.reading import View, read_views
from hardpatch.data.loader.statistics import measure_statistics as measure_statistics
from hardpatch.data.sources import Source
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.machine import usable_cores
from hardpatch.runtime.signals import ignore_in_worker, signals_held

Item = TypeVar("Item")
Stacked = TypeVar("Stacked")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Damage(NamedTuple):
    """An image that could not be read."""

    name: str
    reason: str


class Batch(NamedTuple):
    """Images of one batch, and what was found damaged on the way."""

    images: Shaped[Tensor, "b c h w"]
    """uint8, or float32 in the same units where one of them is not 8-bit."""
    damaged: list[Damage]
    valid: Bool[Tensor, "b h w"] | None = None
    """False = no data; None: all pixels are data."""


class Crop(NamedTuple):
    """An image as it is learnt from."""

    image: Shaped[Tensor, "c h w"]
    damaged: list[Damage]
    """Images that were to be here and could not be read."""
    valid: Bool[Tensor, "h w"] | None = None
    """False = no data; None: all pixels are data."""


class TrainingImages(Dataset[Any]):
    """Randomly cropped images of a source, each crop a function of (seed, epoch, index) and its number among the views.

    A damaged image is reported and the next readable one of the source takes its place.

    Args:
        source: The images.
        size: Height and width of the crops, pixels.
        crop_scale: Smallest and largest area of a crop, share of the image; (1, 1): no crop, only resize.
        flip: Mirror half of the crops.
        seed: Of the run.
        views: Crops of each image, from one decoding of it.
        jpeg_scaling: Decode large JPEGs at a fraction of their size (:mod:`hardpatch.data.images.jpeg`).
        cache: Keeps decoded images for later passes.
    """

    def __init__(
        self,
        source: Source,
        *,
        size: tuple[int, int],
        crop_scale: tuple[float, float],
        flip: bool,
        seed: int,
        views: int = 1,
        jpeg_scaling: bool = True,
        cache: SharedImages | None = None,
    ) -> None:
        self.source = source
        self.size, self.crop_scale, self.flip = size, crop_scale, flip
        self.seed, self.views, self.jpeg_scaling = seed, views, jpeg_scaling
        self.cache = cache
        self.on_read: Callable[[int], None] | None = None
        """Told which image is read."""
        self.cover = Cover(size)

    def __getitem__(self, key: tuple[int, int]) -> Crop:
        """The first view of an image."""
        return self._crops(key[1], crop_numbers(self.seed, [key])[0])[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Batch]:
        """What a data process makes of a micro-batch: all at once."""
        return [self.batch(keys)]

    def batch(self, keys: list[tuple[int, int]]) -> Batch:
        """All views of each image, image after image, each put in its place while the processor still holds it."""
        numbers = crop_numbers(self.seed, keys, views=self.views)
        made = torch.empty(0, dtype=torch.uint8)
        damaged: list[Damage] = []
        masks: dict[int, Tensor] = {}
        place = 0
        for (_, index), rows in zip(keys, numbers):
            for crop in self._crops(index, rows):
                if place == 0:
                    made = _room((len(keys) * self.views, *crop.image.shape), crop.image.dtype)
                elif crop.image.is_floating_point():
                    made = made.float()  # no copy where it is already
                made[place] = crop.image
                if crop.valid is not None:
                    masks[place] = crop.valid
                damaged += crop.damaged
                place += 1
        if not masks:
            return Batch(made, damaged)
        valid = torch.ones(len(made), *self.size, dtype=torch.bool)
        for place, mask in masks.items():
            valid[place] = mask
        return Batch(made, damaged, valid)

    def _crops(self, index: int, numbers: Float64[np.ndarray, "v n"]) -> list[Crop]:
        """The views of an image, or of the first readable one after it."""
        (views, damaged) = first_readable(self.source, index, lambda number: self._views(number, numbers))
        return [Crop(view.image, damaged if number == 0 else [], view.valid) for number, view in enumerate(views)]

    def _views(self, index: int, numbers: Float64[np.ndarray, "v n"]) -> list[View]:
        if self.on_read is not None:
            self.on_read(index)
        return read_views(
            self.source, index, partial(self.boxes, numbers=numbers), self._cut,
            size=self.size, jpeg_scaling=self.jpeg_scaling, cache=self.cache,
        )  # fmt: skip

    @property
    def covers(self) -> bool:
        """Are images resized and cut to their centre, rather than cropped at random?"""
        return self.crop_scale == (1, 1)

    def boxes(self, size: tuple[int, int], numbers: Float64[np.ndarray, "v n"]) -> list[Box]:
        """Where the views of an image lie.

        Args:
            size: Height and width of the image, pixels.
            numbers: Of :func:`hardpatch.data.images.crops.crop_numbers`, for each view.
        """
        if self.covers:
            return [Box(0, 0, *size, self.flip and bool(row[-1] < 0.5)) for row in numbers]
        return [draw_box(row, size, scale=self.crop_scale, flip=self.flip) for row in numbers]

    def _cut(self, sample: Sample, box: Box) -> View:
        """One view of an image that is decoded."""
        if not self.covers:
            valid = None if sample.valid is None else resample_mask(sample.valid, box, self.size)
            return View(resample(sample.image, box, self.size), valid)
        image, covered = self.cover(sample.image), None if sample.valid is None else self.cover(sample.valid[None])[0]
        if not box.flip:
            return View(image, covered)
        return View(image.flip(-1), None if covered is None else covered.flip(-1))


def first_readable(
    source: Source, index: int, read: Callable[[int], Item], *, patience: int = 100
) -> tuple[Item, list[Damage]]:
    """What ``read`` makes of an image, or where it is damaged of the first readable one after it.

    Raises:
        InputError: ``patience`` images in a row are damaged.
    """
    damaged: list[Damage] = []
    for offset in range(min(patience, len(source))):
        number = (index + offset) % len(source)
        try:
            return read(number), damaged
        except (DecodeError, OSError) as error:
            damaged.append(Damage(source.name(number), str(error)))
    first = damaged[0]
    raise InputError(f"data: {len(damaged)} images in a row cannot be read; the first: {first.name}: {first.reason}")


def read_or_next(source: Source, index: int, *, patience: int = 100) -> tuple[Sample, list[Damage]]:
    """Read an image, or where it is damaged the first readable one after it.

    Raises:
        InputError: ``patience`` images in a row are damaged.
    """
    return first_readable(source, index, source.read, patience=patience)


class Cover(v2.Transform):  # type: ignore[misc]  # torchvision is not typed
    """Resize so that the image just covers ``size``, then cut out the centre: how every evaluation sees an image."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def transform(self, image: Tensor, params: dict[str, Any]) -> Tensor:
        """Resize and cut (..., H, W); bool by the nearest pixel."""
        height, width = image.shape[-2:]
        if (height, width) == self.size:
            return image
        resized = v2.functional.resize(
            image,
            list(covering(Box(0, 0, height, width), self.size)),
            interpolation=InterpolationMode.NEAREST if image.dtype == torch.bool else InterpolationMode.BICUBIC,
            antialias=True,
        )
        cut: Tensor = v2.functional.center_crop(resized, list(self.size))
        return cut


class Normalise(nn.Module):
    """Images of values in 0..255 to normalised float images, on whatever device they are."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.tensor(mean).view(-1, 1, 1) * 255)
        self.std = nn.Buffer(torch.tensor(std).view(-1, 1, 1) * 255)

    def forward(self, images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """(x - mean) / std."""
        return (images.float() - self.mean) / self.std

    def to_display(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Back to 0..1."""
        return ((images * self.std + self.mean) / 255).clamp(0, 1)


def default_workers() -> int:
    """One data process per core beyond the first, at most 8, shared among this machine's training processes."""
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, min(8, usable_cores() // local_processes - 1))


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """By numpy, which asks the system for large pages: a tenth of the time from a cache went into small ones."""
    return torch.from_numpy(np.empty(shape, np.float32 if dtype.is_floating_point else np.uint8))


def _only(items: list[Batch]) -> Batch:
    """The batch that the images have made of themselves."""
    return items[0]


def stack_images(images: list[Tensor]) -> Shaped[Tensor, "b c h w"]:
    """One tensor of images; float32 as soon as one of them is."""
    if any(image.is_floating_point() for image in images):
        images = [image.float() for image in images]
    return torch.stack(images)


def training_batches(
    images: TrainingImages,
    order: TrainingOrder,
    *,
    workers: int,
    pin_memory: bool,
    noted: LastRead[Any] | None = None,
) -> Generator[Batch, None, None]:
    """Micro-batches in the given order; the workers live through the whole run.

    Args:
        images: To be asked for.
        order: In which.
        workers: Data processes.
        pin_memory: For a device that copies from pinned memory.
        noted: What :func:`last_read` made of the images, where the caller wants to name a worker that dies, too.

    Raises:
        InputError: Too many images in a row cannot be read.
    """
    yield from batches_in_order(
        images if noted is None else noted, order, collate=_only, workers=workers, pin_memory=pin_memory,
        prepare=images.source.prepare,
    )  # fmt: skip


def last_read(images: Dataset[Item], workers: int) -> LastRead[Item]:
    """Images with a note of which one every worker reads."""
    noted = LastRead(images, workers)
    if isinstance(images, TrainingImages):
        images.on_read = noted.note
    return noted


def batches_in_order(
    images: Dataset[Item] | LastRead[Item],
    order: TrainingOrder,
    *,
    collate: Callable[[list[Item]], Stacked],
    workers: int,
    pin_memory: bool,
    prepare: Callable[[Sequence[int]], None] = lambda _: None,
) -> Generator[Stacked, None, None]:
    """Micro-batches of any images that are asked for by (pass, index); the workers live through the whole run.

    Args:
        images: To be asked for; given as :class:`LastRead`, the caller can name a worker that dies, too.
        order: In which.
        collate: Makes a micro-batch.
        workers: Data processes.
        pin_memory: For a device that copies from pinned memory.
        prepare: Fetches blocks of the source that will be needed, where it has any.

    Raises:
        InputError: Too many images in a row cannot be read, or a worker died; it is named with what it was reading.
    """
    noted = images if isinstance(images, LastRead) else last_read(images, workers)
    loader = DataLoader(
        noted,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_in_worker,
    )
    batches = None
    try:
        with Ahead(order, prepare) as ahead:
            with signals_held():
                batches = iter(loader)
            for number, batch in enumerate(batches):
                ahead.reached(number)
                yield batch
        return
    except InputError as error:  # a worker's comes with its traceback in front
        problem: Exception = InputError(str(error).rpartition("InputError: ")[2].strip())
        error.__traceback__ = None  # it holds on to the workers; collected as garbage, they keep torch waiting for 10 s
    except LOADER_ERRORS as error:
        problem = noted.explained(error)
        problem.__cause__ = error if problem is not error else error.__cause__
    finally:
        del batches
    raise problem


class OrderedBatch(NamedTuple):
    """Images of a source in its own order, without augmentation."""

    images: Shaped[Tensor, "b c h w"]
    """uint8, or float32 in the same units where one of them is not 8-bit."""
    indices: list[int]
    """Positions in the source."""
    masks: Bool[Tensor, "b h w"] | None
    """True = foreground, where the source knows."""
    damaged: list[Damage]
    """Left out of the batch."""
    valid: Bool[Tensor, "b h w"] | None = None
    """False = no data; None: all pixels are data."""


class _Ordered(NamedTuple):
    """An image of a source, or why there is none."""

    position: int
    image: Tensor | None = None
    mask: Tensor | None = None
    valid: Tensor | None = None
    damage: Damage | None = None


class _OrderedImages(Dataset[_Ordered]):
    def __init__(self, source: Source, indices: list[int], size: tuple[int, int]) -> None:
        self.source = source
        self.indices = indices
        self.cover = Cover(size)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> _Ordered:
        index = self.indices[position]
        try:
            sample = self.source.read(index)
        except (DecodeError, OSError) as error:
            return _Ordered(index, damage=Damage(self.source.name(index), str(error)))
        mask, valid = (None if part is None else self.cover(part[None])[0] for part in (sample.mask, sample.valid))
        return _Ordered(index, self.cover(sample.image), mask, valid)


def _stack_ordered(items: list[_Ordered]) -> OrderedBatch:
    images = [item.image for item in items if item.image is not None]
    good = [item for item in items if item.image is not None]
    masks = [item.mask for item in good if item.mask is not None]
    valid = None
    if any(item.valid is not None for item in good):
        everything = torch.ones(images[0].shape[-2:], dtype=torch.bool)
        valid = torch.stack([everything if item.valid is None else item.valid for item in good])
    return OrderedBatch(
        images=stack_images(images) if images else torch.empty(0, 1, 1, 1, dtype=torch.uint8),
        indices=[item.position for item in good],
        masks=torch.stack(masks) if masks and len(masks) == len(good) else None,
        damaged=[item.damage for item in items if item.damage is not None],
        valid=valid,
    )


def ordered_batches(
    source: Source,
    *,
    size: tuple[int, int],
    indices: list[int] | None = None,
    batch_size: int = 128,
    workers: int = 0,
) -> Iterator[OrderedBatch]:
    """Every image once, in order, resized to cover ``size`` and cut to its centre; no batch is dropped.

    Args:
        source: The images.
        size: Height and width in pixels.
        indices: Only these images; all by default.
        batch_size: Images per batch.
        workers: Data processes.
    """
    chosen = list(range(len(source))) if indices is None else indices
    loader = DataLoader(
        _OrderedImages(source, chosen, size),
        batch_size=batch_size,
        collate_fn=_stack_ordered,
        num_workers=workers,
        worker_init_fn=ignore_in_worker,
    )
    with signals_held():
        return iter(loader)
