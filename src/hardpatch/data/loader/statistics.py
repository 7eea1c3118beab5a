"""Mean and standard deviation of the pixels of a source: exact, streamed, by many processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from torch.utils.data import BatchSampler, Dataset

from hardpatch.data.images.decode import DecodeError, Sample
from hardpatch.data.loader.processes import batches_of
from hardpatch.data.loader.reading import read_whole
from hardpatch.data.sources import Source
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import tracked

_BATCH = 16


class Moments(NamedTuple):
    """What is known of some pixels, per channel."""

    pixels: int
    mean: Float64[np.ndarray, " c"]
    squares: Float64[np.ndarray, " c"]
    """Sum of squared differences from the mean."""

    def and_of(self, other: Moments) -> Moments:
        """Of both together.

        Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
        1979.
        """
        pixels = self.pixels + other.pixels
        if not other.pixels:
            return self
        shift = other.mean - self.mean
        return Moments(
            pixels,
            self.mean + shift * (other.pixels / pixels),
            self.squares + other.squares + shift**2 * (self.pixels * other.pixels / pixels),
        )


class Statistics(NamedTuple):
    """Of all pixels of a source; values in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    """That were read."""
    damaged: list[tuple[str, str]]
    """Images that were left out, and why."""


def moments(sample: Sample) -> Moments:
    """Of the valid pixels of one image; exact for bytes, whose sums are integers."""
    pixels = sample.image.flatten(1)
    if sample.valid is not None:
        pixels = pixels[:, sample.valid.flatten()]
    count = pixels.shape[1]
    if not count:
        empty = np.zeros(len(pixels))
        return Moments(0, empty, empty)
    if pixels.dtype == torch.uint8:
        total = pixels.sum(1, dtype=torch.int64).numpy().astype(object)
        squared = pixels.int().square().sum(1, dtype=torch.int64).numpy().astype(object)
        spread = (squared * count - total * total) / count  # integers of any size, divided once
        return Moments(count, (total / count).astype(np.float64), spread.astype(np.float64))
    values = pixels.double().numpy()
    mean = values.mean(1)
    return Moments(count, mean, np.square(values - mean[:, None]).sum(1))


class _Read(Dataset[tuple[Moments | None, list[tuple[str, str]]]]):
    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Moments | None, list[tuple[str, str]]]:
        index = self.indices[place]
        try:
            return moments(read_whole(self.source, index)), []
        except (DecodeError, OSError) as error:
            return None, [(self.source.name(index), str(error))]


class _Part(NamedTuple):
    moments: Moments | None
    images: int
    damaged: list[tuple[str, str]]


def _merged(items: Iterable[tuple[Moments | None, list[tuple[str, str]]]]) -> _Part:
    whole, images = None, 0
    damaged: list[tuple[str, str]] = []
    for found, broken in items:
        damaged += broken
        if found is not None:
            images += 1
            whole = found if whole is None else whole.and_of(found)
    return _Part(whole, images, damaged)


def measure(source: Source, *, workers: int = 0, indices: Sequence[int] | None = None) -> Statistics:
    """Mean and standard deviation per channel over all valid pixels of all images that can be read.

    Args:
        source: The images.
        workers: Processes that decode; the result does not depend on them.
        indices: Of these images only.

    Raises:
        InputError: No pixel can be read.
    """
    chosen = range(len(source)) if indices is None else indices
    order = BatchSampler(range(len(chosen)), _BATCH, drop_last=False)
    parts = batches_of(_Read(source, chosen), order, collate=_merged, workers=workers)
    whole, images = None, 0
    damaged: list[tuple[str, str]] = []
    for part in tracked(parts, "measuring", total=len(order), images_per_item=_BATCH) if indices is None else parts:
        images, damaged = images + part.images, damaged + part.damaged
        if part.moments is not None:
            whole = part.moments if whole is None else whole.and_of(part.moments)
    if whole is None or not whole.pixels:
        first = f"; the first: {': '.join(damaged[0])}" if damaged else ""
        raise InputError(f"data: none of the {len(chosen)} images has pixels that can be read{first}")
    deviation = np.sqrt(np.maximum(whole.squares / whole.pixels, 1e-12 * 255**2))
    return Statistics(tuple((whole.mean / 255).tolist()), tuple((deviation / 255).tolist()), images, damaged)


def measure_statistics(source: Source, *, max_images: int = 1000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel in 0..1, over at most ``max_images`` images spread over the source.

    Raises:
        InputError: No pixel can be read.
    """
    found = measure(source, indices=source.spread(max_images))
    return found.mean, found.std
