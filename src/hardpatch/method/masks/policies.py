"""Mask policies: which patches the student does not see.

Every policy is "priorities, then top-M": a pure function of the predicted losses, of uniform noise and of how many
patches are to be the hardest ones, without a loop over images and without a host-device sync:

    policy(scores (B, N), noise (B, N), num_hidden=M, num_hard=int(M * a_t)) -> hidden (B, N) bool, exactly M True

Patches without data (``valid`` False) are hidden or visible by chance, never by score.

What the scores are is the mask's ``guide``: the predicted loss (HPM), the teacher's attention (AttMask), or nothing.
The table of all masks, :data:`MASKS`, stands at the end; those that follow a spatial pattern are in
:mod:`hpm.patterns`.

The noise comes from outside, one row per image of the *global* batch, so that a mask does not depend on how the
batch is split over processes or micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hpm.patterns import COLOURS, Grid, block_priority, cell_priority, colour_priority
from hpm.seeding import more_noise


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
        valid: Bool[Tensor, "b n"] | None = None,
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
    valid: Bool[Tensor, "b n"] | None = None,
) -> Bool[Tensor, "b n"]:
    """MAE's masks: uniformly random; ``scores`` and ``num_hard`` are ignored."""
    return hide_top(noise, num_hidden)


def hide_hard(
    scores: Float[Tensor, "b n"] | None,
    noise: Float[Tensor, "b n"],
    *,
    num_hidden: int,
    num_hard: int | Int[Tensor, ""],
    valid: Bool[Tensor, "b n"] | None = None,
) -> Bool[Tensor, "b n"]:
    """HPM's masks: the ``num_hard`` patches of highest predicted loss, the rest uniform.

    With the teacher's class-token attention for scores these are AttMask's: the most attended are hidden.

    Args:
        scores: Predicted loss of every patch, higher = harder.
        noise: Uniform in [0, 1).
        num_hidden: M.
        num_hard: ``int(M * a_t)``. A tensor keeps a compiled step free of recompilation while the share grows.
        valid: Patches with data; None: all. The others are never chosen by score, and an image with fewer patches of
            data has as many fewer chosen, so that some of them stay visible.

    Returns:
        True = hidden, exactly M per image; with ``num_hard == 0`` the masks are purely random.

    Source: the paper's section on easy-to-hard mask generation; for attention Kakogeorgiou et al., "What to Hide from
    Your Students: Attention-Guided Masked Image Modeling", ECCV 2022, arXiv 2203.12719.
    """
    if scores is None:
        raise ValueError("a guided mask needs predicted losses or attention, got scores=None")
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
        num_hard = num_hard * valid.sum(dim=1, keepdim=True) // valid.shape[1]
    difficulty_rank = scores.argsort(dim=1, descending=True).argsort(dim=1)  # 0 = hardest
    return hide_top(torch.where(difficulty_rank < num_hard, noise + 1, noise), num_hidden)


def hide_easy(
    scores: Float[Tensor, "b n"] | None,
    noise: Float[Tensor, "b n"],
    *,
    num_hidden: int,
    num_hard: int | Int[Tensor, ""],
    valid: Bool[Tensor, "b n"] | None = None,
) -> Bool[Tensor, "b n"]:
    """The opposite of :func:`hide_hard`: the ``num_hard`` patches of *lowest* predicted loss, the rest uniform.

    Source: the argmin row of the paper's table of mask strategies.
    """
    return hide_hard(None if scores is None else -scores, noise, num_hidden=num_hidden, num_hard=num_hard, valid=valid)


def hide_proportional(
    scores: Float[Tensor, "b n"] | None,
    noise: Float[Tensor, "b n"],
    *,
    num_hidden: int,
    num_hard: int | Int[Tensor, ""],
    valid: Bool[Tensor, "b n"] | None = None,
) -> Bool[Tensor, "b n"]:
    """``num_hard`` patches drawn in proportion to how hard they are, without replacement; the rest uniform.

    In proportion to exp(score): the relative loss makes sigmoid(s_i - s_j) = exp(s_i) / (exp(s_i) + exp(s_j)) the
    probability that i is harder than j, so exp(s) is each patch's strength in the Bradley-Terry model of these
    comparisons. Drawing one after another in proportion to strength is the Plackett-Luce model; the ``num_hard``
    highest of score + Gumbel noise are such a draw. (Scores of the absolute loss are standardised losses; exp of them
    is a softmax of temperature 1.)

    The Gumbel noise is independent of ``noise``, so the rest of M is uniform whatever was drawn.

    Source: the paper's alternative of sampling by predicted loss; Yellott, "The relationship between Luce's choice
    axiom, Thurstone's theory of comparative judgment, and the double exponential distribution", 1977.
    """
    if scores is not None:
        uniform = more_noise(noise, noise.shape[1])
        scores = scores.float() - (-uniform.log()).log()
    return hide_hard(scores, noise, num_hidden=num_hidden, num_hard=num_hard, valid=valid)


def hide_pattern(priority: Callable[[Float[Tensor, "b n"], int], Float[Tensor, "b n"]]) -> MaskPolicy:
    """The policy that hides by a function of noise and ``num_hidden`` alone; it ignores scores and ``num_hard``."""

    def hide(
        scores: Float[Tensor, "b n"] | None,
        noise: Float[Tensor, "b n"],
        *,
        num_hidden: int,
        num_hard: int | Int[Tensor, ""],
        valid: Bool[Tensor, "b n"] | None = None,
    ) -> Bool[Tensor, "b n"]:
        return hide_top(priority(noise, num_hidden), num_hidden)

    return hide


def hide_blocks(grid: Grid) -> MaskPolicy:
    """BEiT's masks: hidden rectangles. Patches at the border are hidden less often than those in the middle."""
    return hide_pattern(lambda noise, num_hidden: block_priority(noise, grid, num_hidden))


def hide_around_blocks(grid: Grid) -> MaskPolicy:
    """Inverse block masks: *visible* rectangles. Patches at the border are hidden more often.

    Source: Baevski et al., "Efficient Self-supervised Learning with Contextualized Target Representations" (data2vec
    2.0), arXiv 2212.07525, which keeps a block visible; its rectangles here are those of :func:`hide_blocks`.
    """
    return hide_pattern(lambda noise, num_hidden: -block_priority(noise, grid, noise.shape[1] - num_hidden))


def hide_evenly(grid: Grid) -> MaskPolicy:
    """UM-MAE's uniform sampling: the same share of every 2x2 cell is hidden."""
    return hide_pattern(lambda noise, num_hidden: cell_priority(noise, grid))


def hide_colour(colour: str) -> Callable[[Grid], MaskPolicy]:
    """ColorMAE's masks: the highest values of filtered noise."""
    return lambda grid: hide_pattern(lambda noise, num_hidden: colour_priority(noise, grid, colour))


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

    policy: Callable[[Grid], MaskPolicy]
    """Builds the policy for a grid of (rows, columns) patches."""
    guide: Guide | None
    """What guides it; None: nothing, and then the hard share has no meaning."""


MASKS: dict[str, Mask] = {
    "hard": Mask(lambda grid: hide_hard, "predicted_loss"),
    "easy": Mask(lambda grid: hide_easy, "predicted_loss"),
    "proportional": Mask(lambda grid: hide_proportional, "predicted_loss"),
    "attention": Mask(lambda grid: hide_hard, "attention"),
    "random": Mask(lambda grid: hide_random, None),
    "block": Mask(hide_blocks, None),
    "inverse_block": Mask(hide_around_blocks, None),
    "uniform_grid": Mask(hide_evenly, None),
    **{f"{colour}_noise": Mask(hide_colour(colour), None) for colour in COLOURS},
}
"""Every kind of mask by its name in the config."""
