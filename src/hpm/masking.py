"""Mask policies: which patches the student does not see.

Every policy is "priorities, then top-M": a pure function of the predicted losses, of uniform noise and of how many
patches are to be the hardest ones, without a loop over images and without a host-device sync:

    policy(scores (B, N), noise (B, N), num_hidden=M, num_hard=int(M * a_t)) -> hidden (B, N) bool, exactly M True

What the scores are is the policy's ``guide``: the predicted loss (HPM), the teacher's attention (AttMask), or nothing.

The noise comes from outside, one row per image of the *global* batch, so that a mask does not depend on how the
batch is split over processes or micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@runtime_checkable
class MaskPolicy(Protocol):
    """The one signature of all mask policies."""

    def __call__(
        self,
        scores: Float[Tensor, "b n"] | None,
        noise: Float[Tensor, "b n"],
        *,
        num_hidden: int,
        num_hard: int | Int[Tensor, ""],
    ) -> Bool[Tensor, "b n"]:
        """Hide exactly ``num_hidden`` patches per image; True = hidden."""
        ...


def num_hidden_patches(num_patches: int, ratio: float) -> int:
    """M, the number of hidden patches: all but the rounded-down visible share (MAE's rule; 147 of 196 at 0.75)."""
    return num_patches - int(num_patches * (1 - ratio))


def hide_top(priority: Float[Tensor, "b n"], num_hidden: int) -> Bool[Tensor, "b n"]:
    """Hide the ``num_hidden`` patches of highest priority in each image."""
    top = priority.topk(num_hidden, dim=1).indices
    return torch.zeros_like(priority, dtype=torch.bool).scatter_(1, top, True)


def hide_random(
    scores: Float[Tensor, "b n"] | None,
    noise: Float[Tensor, "b n"],
    *,
    num_hidden: int,
    num_hard: int | Int[Tensor, ""],
) -> Bool[Tensor, "b n"]:
    """MAE's masks: uniformly random; ``scores`` and ``num_hard`` are ignored."""
    return hide_top(noise, num_hidden)


def hide_hard(
    scores: Float[Tensor, "b n"] | None,
    noise: Float[Tensor, "b n"],
    *,
    num_hidden: int,
    num_hard: int | Int[Tensor, ""],
) -> Bool[Tensor, "b n"]:
    """HPM's masks: the ``num_hard`` patches of highest predicted loss, the rest uniform.

    Args:
        scores: Predicted loss of every patch, higher = harder.
        noise: Uniform in [0, 1).
        num_hidden: M.
        num_hard: ``int(M * a_t)``. A tensor keeps a compiled step free of recompilation while the share grows.

    Returns:
        True = hidden, exactly M per image; with ``num_hard == 0`` the masks are purely random.

    Source: the paper's section on easy-to-hard mask generation.
    """
    if scores is None:
        raise ValueError("hide_hard needs the predicted losses, got scores=None")
    difficulty_rank = scores.argsort(dim=1, descending=True).argsort(dim=1)  # 0 = hardest
    return hide_top(torch.where(difficulty_rank < num_hard, noise + 1, noise), num_hidden)


def split_patches(hidden: Bool[Tensor, "b n"], num_hidden: int) -> tuple[Int[Tensor, "b k"], Int[Tensor, "b m"]]:
    """Indices of the visible and of the hidden patches, each in image order.

    ``num_hidden`` is given rather than counted: counting would make the host wait for the device.
    """
    order = hidden.to(torch.uint8).argsort(dim=1, stable=True)
    visible, masked = order.tensor_split([order.shape[1] - num_hidden], dim=1)
    return visible, masked


Guide = Literal["predicted_loss", "attention"]
"""What the scores of a policy are."""


class Mask(NamedTuple):
    """A kind of mask."""

    policy: Callable[[tuple[int, int]], MaskPolicy]
    """Builds the policy for a grid of (rows, columns) patches."""
    guide: Guide | None
    """What guides it; None: nothing, and then the hard share has no meaning."""


MASKS: dict[str, Mask] = {
    "hard": Mask(lambda grid: hide_hard, "predicted_loss"),
    "random": Mask(lambda grid: hide_random, None),
}
"""Every kind of mask by its name in the config."""
