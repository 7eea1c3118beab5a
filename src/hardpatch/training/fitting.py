"""Targets that are fitted to the images of a run before its first step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hardpatch.config.config import Config
from hardpatch.data.loader.loading import Normalise, TrainingImages
from hardpatch.data.sources import Source
from hardpatch.method.targets.target import FittedTarget
from hardpatch.runs.build import build_normalise
from hardpatch.runtime import distributed
from hardpatch.runtime.log import tracked
from hardpatch.training.batches import training_images


class Crops:
    """Normalised crops spread over the training images, as training cuts them, each read when it is asked for.

    Of few images, several crops each: those that the first epochs will show.

    Args:
        images: The training images.
        normalise: The run's normalisation.
        most: Crops, at most.
    """

    def __init__(self, images: TrainingImages, normalise: Normalise, *, most: int) -> None:
        total = len(images.source)
        indices = torch.linspace(0, total - 1, min(total, most)).long().tolist()
        self.crops = [(epoch, index) for epoch in range(most // len(indices)) for index in indices]
        self.images, self.normalise = images, normalise

    def __len__(self) -> int:
        return len(self.crops)

    def __iter__(self) -> Iterator[Tensor]:
        for crop in tracked(self.crops, "fitting the target", total=len(self.crops)):
            yield self.normalise(self.images[crop].image.unsqueeze(0))


def fit_target(config: Config, source: Source, target: FittedTarget) -> dict[str, Any]:
    """Fit a target on the main process, for all of them.

    Raises:
        InputError: The images do not suffice.
    """
    crops = Crops(training_images(config, source), build_normalise(config), most=target.num_crops)
    return distributed.from_main(lambda: target.fit(crops, seed=config.optimisation.seed))
