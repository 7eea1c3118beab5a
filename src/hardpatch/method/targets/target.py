"""What a reconstruction target is, and how wrong a reconstruction is.

A target turns images into one vector per patch and owns the per-patch loss, because losses differ by target (squared
error for pixels, cross-entropy for tokens). The loss predictor and the mining see that per-patch loss, or
:class:`hardpatch.method.targets.pixels.PixelHardness`. Every kind of target is a file of this folder and a row of
:data:`hardpatch.method.choices.TARGETS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch.nn.functional as F
from jaxtyping import Float, Num
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from hardpatch.method.vit import Geometry


@runtime_checkable
class Target(Protocol):
    """What every reconstruction target offers."""

    dim: int
    """P, the width of the reconstructor's output for one patch."""
    needs_teacher: bool
    """Is it made of the teacher's features?"""

    def __call__(
        self, images: Float[Tensor, "b c h w"], features: Float[Tensor, "b t d"] | None = None
    ) -> Num[Tensor, "b n q"]:
        """The target of every patch, without gradient.

        Args:
            images: Normalised images.
            features: The teacher's tokens of the full images, prefix tokens first, where there is a teacher.
        """
        ...

    def patch_loss(self, prediction: Float[Tensor, "b m p"], target: Num[Tensor, "b m q"]) -> Float[Tensor, "b m"]:
        """The reconstruction loss of each patch."""
        ...


@runtime_checkable
class SizedCrops(Protocol):
    """Normalised crops, each (1, C, H, W), which are read one after another; how many is known before."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...


@runtime_checkable
class FittedTarget(Target, Protocol):
    """A target with a state of its own, fitted to the images before the first step and saved with the run."""

    num_crops: int
    """Crops of the images that it is fitted to, at most."""

    def fit(self, crops: SizedCrops, *, seed: int) -> dict[str, Tensor]:
        """The state that fits these normalised crops, a function of the seed; :meth:`adopt` takes it over.

        Raises:
            InputError: The images do not suffice.
        """
        ...

    def fitted_state(self) -> dict[str, Tensor]:
        """The state, whose shapes are known before it is fitted."""
        ...

    def adopt(self, state: dict[str, Tensor]) -> None:
        """Take over a state that was fitted before."""
        ...


class TargetContext(NamedTuple):
    """What a target may be built from: the student's images and encoder, and the options of the config."""

    geometry: Geometry
    """How the student's images are cut."""
    encoder: VisionTransformer
    """The student's encoder; only its sizes may be asked, for it may have no content."""
    mean: tuple[float, ...]
    """Channel means by which images are normalised, of values in 0..1."""
    std: tuple[float, ...]
    """Channel standard deviations, likewise."""
    target_model: str = ""
    """Name of the timm model behind ``timm_features``."""
    tokenizer: str = ""
    """``module:function`` behind ``tokens``; empty: the codebook."""
    num_tokens: int = 1024
    """Entries of the codebook."""
    seed: int = 0
    """The run's seed."""


def feature_loss(prediction: Float[Tensor, "b m p"], target: Float[Tensor, "b m p"]) -> Float[Tensor, "b m"]:
    """Per-patch loss of feature targets: both L2-normalised, squared error summed over channels, as published."""
    difference = F.normalize(prediction.float(), dim=-1) - F.normalize(target.float(), dim=-1)
    return difference.square().sum(dim=-1)
