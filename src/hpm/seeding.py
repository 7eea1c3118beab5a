"""Randomness without state: every random draw of a run is a pure function of the seed and of where it happens.

Crops depend on (seed, epoch, image), masks on (seed, step), orders on (seed, epoch). So a run that is resumed at any
step, with any number of data workers, processes or micro-batches, draws the same numbers, and a checkpoint need not
hold a random state.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from jaxtyping import Float
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


def derive_seed(seed: int, stream: Stream, *place: int) -> int:
    """A 63-bit seed for one purpose at one place (an epoch, a step, an image)."""
    words = np.random.SeedSequence((seed, int(stream), *place)).generate_state(2, np.uint64)
    return int(words[0] >> np.uint64(1))


def mask_noise(
    seed: int, step: int, *, batch_size: int, num_patches: int, device: torch.device
) -> Float[Tensor, "b n"]:
    """Uniform noise for the masks of one global batch, drawn on ``device``."""
    generator = torch.Generator(device).manual_seed(derive_seed(seed, Stream.MASKS, step))
    return torch.rand(batch_size, num_patches, generator=generator, device=device)
