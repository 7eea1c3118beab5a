"""What a reconstruction target is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor


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


def feature_loss(prediction: Float[Tensor, "b m p"], target: Float[Tensor, "b m p"]) -> Float[Tensor, "b m"]:
    """Per-patch loss of feature targets: both L2-normalised, squared error summed over channels, as published."""
    difference = F.normalize(prediction.float(), dim=-1) - F.normalize(target.float(), dim=-1)
    return difference.square().sum(dim=-1)
