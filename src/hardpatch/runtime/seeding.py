"""Randomness without state: every random draw of a run is a pure function of the seed and of where it happens.

Crops depend on (seed, epoch, image), masks on (seed, step), orders on (seed, epoch). So a run that is resumed at any
step, with any number of data workers, processes or micro-batches, draws the same numbers, and a checkpoint need not
hold a random state.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64, UInt64
from torch import Tensor


class Stream(IntEnum):
    """What a random draw is for; draws for different purposes are independent."""

    INITIALISATION = 0
    ORDER = 1
    AUGMENTATION = 2
    MASKS = 3
    STEP = 4
    FIGURES = 5
    TOKENS = 6
    EVALUATION = 7
    LABELS = 8
    MIXING = 9


def derive_seed(seed: int, stream: Stream, *place: int) -> int:
    """A 63-bit seed for one purpose at one place (an epoch, a step, an image)."""
    words = np.random.SeedSequence((seed, int(stream), *place)).generate_state(2, np.uint64)
    return int(words[0] >> np.uint64(1))


def uniform_numbers(
    seed: int, stream: Stream, places: Int64[np.ndarray, "b k"], count: int
) -> Float64[np.ndarray, "b m"]:
    """Uniform numbers at many places at once, without any state: SplitMix64 from a hash of seed, stream and place.

    Args:
        seed: Of the run.
        stream: What they are for.
        places: Each row is a place: an epoch, an image, a view; numbers from 0.
        count: Numbers at each place.

    Returns:
        In [0, 1), 53 bits each.

    Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    key = np.full(len(places), derive_seed(seed, stream), np.uint64)
    for column in places.T.astype(np.uint64):
        key = _mix_words(key + (column + np.uint64(1)) * _GOLDEN_WORD)
    numbers = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN_WORD
    uniform: np.ndarray = (_mix_words(key[:, None] + numbers) >> np.uint64(11)) * 2.0**-53
    return uniform


_GOLDEN_WORD = np.uint64(0x9E3779B97F4A7C15)


def _mix_words(words: UInt64[np.ndarray, "*n"]) -> UInt64[np.ndarray, "*n"]:
    """The mixing of :func:`_mix` for numpy's unsigned integers."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
    mixed: np.ndarray = words ^ (words >> np.uint64(31))
    return mixed


@contextmanager
def generators_seeded(seed: int) -> Iterator[None]:
    """While entered, Python's, numpy's and PyTorch's generators (of the CPU) start from ``seed``; then they are as
    before. For augmentations of other libraries, which draw from all three."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(np.random.SeedSequence(seed).generate_state(4))
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def mask_noise(
    seed: int, step: int, *, batch_size: int, num_patches: int, device: torch.device
) -> Float[Tensor, "b n"]:
    """Uniform noise for the masks of one global batch, drawn on ``device``.

    Each kind of device has a generator of its own: for one seed, a CPU and a GPU draw different noise.
    """
    generator = torch.Generator(device).manual_seed(derive_seed(seed, Stream.MASKS, step))
    return torch.rand(batch_size, num_patches, generator=generator, device=device)


def more_noise(noise: Float[Tensor, "b n"], count: int, *, purpose: int = 0) -> Float[Tensor, "b {count}"]:
    """Further uniform numbers for every image, as many as wanted, from its row of :func:`mask_noise` alone.

    The bits of a row are hashed to one 64-bit key, and the numbers are what SplitMix64 gives from there: for every
    purpose here independent of the row itself and of each other, and without any state. In integers, so that every
    device gives the same.

    Args:
        noise: Uniform in [0, 1).
        count: Numbers per row.
        purpose: Numbers for different purposes are independent; 0 is the masks'.

    Returns:
        Uniform in (0, 1), symmetric about a half and never 0 or 1: multiples of 2^-23, plus a half of it.

    Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    bits = (noise * 2**24).long()
    key = _mix(bits + torch.arange(1, noise.shape[1] + 1, device=noise.device) * _GOLDEN).sum(dim=1, keepdim=True)
    place = torch.arange(1, count + 1, device=noise.device) + (purpose << 32)
    return ((_mix(key + place * _GOLDEN) >> 41 & 2**23 - 1).float() + 0.5) * 2**-23


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""2^64 over the golden ratio, odd, as a signed number."""


def _mix(bits: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """SplitMix64's finaliser: every bit of the input changes half of the bits of the output."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        bits = (bits ^ (bits >> shift & 2 ** (64 - shift) - 1)) * factor  # the and: torch shifts copies of the sign in
    return bits ^ (bits >> 31 & 2**33 - 1)
