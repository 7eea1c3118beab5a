"""From a source to batches on the device: crops, workers. The order is :mod:`hpm.data.order`'s."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from hpm.data.decode import DecodeError, Sample
from hpm.data.last_read import LastRead
from hpm.data.order import Ahead
from hpm.data.order import Position as Position
from hpm.data.order import TrainingOrder as TrainingOrder
from hpm.data.sources import Source
from hpm.errors import InputError
from hpm.seeding import Stream, derive_seed
from hpm.stopping import ignore_in_worker, signals_held

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


class TrainingImages(Dataset[Crop]):
    """Randomly cropped images of a source, each crop a function of (seed, epoch, index).

    A damaged image is reported and the next readable one of the source takes its place.
    """

    def __init__(
        self, source: Source, *, size: tuple[int, int], crop_scale: tuple[float, float], flip: bool, seed: int
    ) -> None:
        self.source = source
        self.seed = seed
        steps: list[nn.Module] = [
            v2.RandomResizedCrop(size, crop_scale, interpolation=InterpolationMode.BICUBIC, antialias=True)
            if crop_scale != (1, 1)
            else Cover(size)
        ]
        if flip:
            steps.append(v2.RandomHorizontalFlip())
        self.augment = v2.Compose(steps)

    def __getitem__(self, key: tuple[int, int]) -> Crop:
        epoch, index = key
        sample, damaged = read_or_next(self.source, index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, Stream.AUGMENTATION, epoch, index))
            if sample.valid is None:
                return Crop(self.augment(sample.image), damaged)
            image, valid = self.augment(tv_tensors.Image(sample.image), tv_tensors.Mask(sample.valid))
            return Crop(image.as_subclass(Tensor), damaged, valid.as_subclass(Tensor))


def read_or_next(source: Source, index: int, *, patience: int = 100) -> tuple[Sample, list[Damage]]:
    """Read an image, or where it is damaged the first readable one after it.

    Raises:
        InputError: ``patience`` images in a row are damaged.
    """
    damaged: list[Damage] = []
    for offset in range(min(patience, len(source))):
        number = (index + offset) % len(source)
        try:
            return source.read(number), damaged
        except (DecodeError, OSError) as error:
            damaged.append(Damage(source.name(number), str(error)))
    first = damaged[0]
    raise InputError(f"data: {len(damaged)} images in a row cannot be read; the first: {first.name}: {first.reason}")


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
        scale = max(self.size[0] / height, self.size[1] / width)
        resized = v2.functional.resize(
            image,
            [max(self.size[0], round(height * scale)), max(self.size[1], round(width * scale))],
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


def measure_statistics(source: Source, *, max_images: int = 1000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel in 0..1, over at most ``max_images`` images spread over the source."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for index in source.spread(max_images):
        sample = read_or_next(source, index)[0]
        pixels = sample.image.double().flatten(1) / 255
        if sample.valid is not None:
            pixels = pixels[:, sample.valid.flatten()]
        count, total = count + pixels.shape[1], total + pixels.sum(1)
        squares = squares + pixels.square().sum(1)
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=1e-12).sqrt()
    return tuple(mean.tolist()), tuple(deviation.tolist())


def default_workers() -> int:
    """One data process per core beyond the first, at most 8, shared among this machine's training processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, min(8, cores // local_processes - 1))


def _stack(items: list[Crop]) -> Batch:
    damaged = [damage for item in items for damage in item.damaged]
    if all(item.valid is None for item in items):
        return Batch(stack_images([item.image for item in items]), damaged)
    size = items[0].image.shape[-2:]
    valid = [torch.ones(size, dtype=torch.bool) if item.valid is None else item.valid for item in items]
    return Batch(stack_images([item.image for item in items]), damaged, torch.stack(valid))


def stack_images(images: list[Tensor]) -> Shaped[Tensor, "b c h w"]:
    """One tensor of images; float32 as soon as one of them is."""
    if any(image.is_floating_point() for image in images):
        images = [image.float() for image in images]
    return torch.stack(images)


def training_batches(
    images: TrainingImages, order: TrainingOrder, *, workers: int, pin_memory: bool
) -> Generator[Batch, None, None]:
    """Micro-batches in the given order; the workers live through the whole run.

    Raises:
        InputError: Too many images in a row cannot be read.
    """
    yield from batches_in_order(
        images, order, collate=_stack, workers=workers, pin_memory=pin_memory, prepare=images.source.prepare
    )


def batches_in_order(
    images: Dataset[Item],
    order: TrainingOrder,
    *,
    collate: Callable[[list[Item]], Stacked],
    workers: int,
    pin_memory: bool,
    prepare: Callable[[Sequence[int]], None] = lambda _: None,
) -> Generator[Stacked, None, None]:
    """Micro-batches of any images that are asked for by (pass, index); the workers live through the whole run.

    Args:
        images: To be asked for.
        order: In which.
        collate: Makes a micro-batch.
        workers: Data processes.
        pin_memory: For a device that copies from pinned memory.
        prepare: Fetches blocks of the source that will be needed, where it has any.

    Raises:
        InputError: Too many images in a row cannot be read, or a worker died; it is named with what it was reading.
    """
    noted = LastRead(images, workers)
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
    except RuntimeError as error:
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


class _OrderedImages(Dataset[tuple[int, Tensor, Tensor | None, Damage | None]]):
    def __init__(self, source: Source, indices: list[int], size: tuple[int, int]) -> None:
        self.source = source
        self.indices = indices
        self.cover = Cover(size)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, Tensor, Tensor | None, Damage | None]:
        index = self.indices[position]
        try:
            sample = self.source.read(index)
        except (DecodeError, OSError) as error:
            return index, torch.empty(0), None, Damage(self.source.name(index), str(error))
        mask = None if sample.mask is None else self.cover(sample.mask[None])[0]
        return index, self.cover(sample.image), mask, None


def _stack_ordered(items: list[tuple[int, Tensor, Tensor | None, Damage | None]]) -> OrderedBatch:
    good = [(index, image, mask) for index, image, mask, damage in items if damage is None]
    masks = [mask for _, _, mask in good if mask is not None]
    return OrderedBatch(
        images=stack_images([image for _, image, _ in good]) if good else torch.empty(0, 1, 1, 1, dtype=torch.uint8),
        indices=[index for index, _, _ in good],
        masks=torch.stack(masks) if masks and len(masks) == len(good) else None,
        damaged=[damage for *_, damage in items if damage is not None],
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
