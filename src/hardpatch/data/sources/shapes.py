"""The embedded synthetic set as a source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from hardpatch.data.images.decode import Sample
from hardpatch.data.sources.base import Source
from hardpatch.data.sources.drawn_shapes import BACKGROUNDS, CLASSES, LEVELS, make_shape

ShapeLabel = Literal["silhouette", "background"]
"""Which of the two labels of an image is its class."""


class ShapesSource(Source):
    """The embedded synthetic set: see :mod:`hardpatch.data.sources.drawn_shapes`.

    Args:
        num_images: Size of the set.
        size: Height and width in pixels.
        seed: Which set.
        label: What the classes are.
    """

    def __init__(self, num_images: int, *, size: tuple[int, int], seed: int, label: ShapeLabel = "silhouette") -> None:
        self.num_images = num_images
        self.size = size
        self.seed = seed
        self.label = label
        self._labels: list[str] = []

    def __len__(self) -> int:
        return self.num_images

    def read(self, index: int) -> Sample:
        """Make one image."""
        shape = make_shape(self.seed, index, *self.size)
        return Sample(torch.from_numpy(shape.image).permute(2, 0, 1), torch.from_numpy(shape.mask))

    def content(self, index: int) -> bytes:
        """Seed, number and size decide an image."""
        return f"{self.seed} {index} {self.size}".encode()

    def name(self, index: int) -> str:
        """Number, silhouette and level."""
        return f"shapes #{index}: {list(CLASSES)[index % len(CLASSES)]}, {_level(index)}"

    @property
    def labels(self) -> Sequence[str]:
        """The silhouettes, or the backgrounds."""
        if not self._labels:
            numbers = range(self.num_images)
            if self.label == "silhouette":
                self._labels = [list(CLASSES)[number % len(CLASSES)] for number in numbers]
            else:  # what an image is does not depend on its size
                self._labels = [BACKGROUNDS[make_shape(self.seed, number, 8, 8).background] for number in numbers]
        return self._labels

    def groups(self) -> Sequence[str]:
        """The difficulty levels."""
        return [_level(index) for index in range(self.num_images)]


def _level(index: int) -> str:
    """Difficulty level of a shape: levels take turns after every class."""
    return LEVELS[index // len(CLASSES) % len(LEVELS)]
