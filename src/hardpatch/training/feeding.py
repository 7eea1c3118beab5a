"""What a step is fed: images on the device, and what the teacher said of them where that is kept for several steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from hardpatch.data.loader.loading import Batch, Normalise
from hardpatch.method.method import Answers
from hardpatch.method.vit import resize, whole_patches
from hardpatch.runs.build import Stage


class Meal(NamedTuple):
    """One micro-batch."""

    images: Float[Tensor, "b c h w"]
    """Normalised, of the stage's size."""
    answers: Answers | None
    """What the teacher said of them; None: it is asked anew in every step."""
    valid: Bool[Tensor, "b n"] | None = None
    """Patches of pixels that are all data; None: all are."""


class Feed:
    """Fetches the micro-batches of every ``steps_per_batch``-th step, and gives them again to the steps between.

    Args:
        ask: What the teacher says of normalised images in a stage; None: it is asked in every step.
        normalise: On the device.
        patch: Height and width of a patch, pixels.
        steps_per_batch: Steps for which a batch is kept.
        num_micro_batches: Micro-batches of a step.
    """

    def __init__(
        self,
        ask: Callable[[Stage, Tensor], Answers] | None,
        normalise: Normalise,
        *,
        patch: tuple[int, int],
        steps_per_batch: int,
        num_micro_batches: int,
    ) -> None:
        self.ask = ask
        self.normalise = normalise
        self.patch = patch
        self.steps_per_batch = steps_per_batch
        self.num_micro_batches = num_micro_batches
        self._kept: list[Meal] = []

    def meals(self, step: int, stage: Stage, fetch: Callable[[], Batch]) -> Iterator[Meal]:
        """The micro-batches of a step, in order; ``fetch`` gives a batch on the device where a new one is needed."""
        if step % self.steps_per_batch:
            yield from self._kept
            return
        self._kept = []
        size = stage.grid[0] * self.patch[0], stage.grid[1] * self.patch[1]
        for _ in range(self.num_micro_batches):
            batch = fetch()
            images = resize(self.normalise(batch.images), size)
            valid = None if batch.valid is None else whole_patches(batch.valid, size, self.patch)
            if self.steps_per_batch == 1:
                yield Meal(images, None, valid)
            else:
                self._kept.append(Meal(images, None if self.ask is None else self.ask(stage, images), valid))
                yield self._kept[-1]
