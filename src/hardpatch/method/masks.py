"""Mask policies: which patches the student does not see.

Every policy is "priorities, then top-M". It gives each patch a priority, a pure function of the predicted losses, of
uniform noise and of how many patches are to be the hardest ones; :func:`hide_top`, called once, hides the M of highest
priority. There is no loop over images and no host-device sync:

    policy(MaskInput(scores (B, N), noise (B, N), grid, M, int(M * a_t))) -> priorities (B, N)
    hide_top(priorities, M) -> hidden (B, N) bool, exactly M True per image

The table of all masks, with what guides each, is :data:`hardpatch.method.choices.MASKS`. The noise comes from outside,
one row per image of the *global* batch, so that a mask does not depend on how the batch is split over processes or
micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from hardpatch.runtime.seeding import more_noise

Grid = tuple[int, int]
"""Rows and columns of patches."""

NUM_RECTANGLES = 16
"""Drawn for every mask. Three do at ratio 0.75; at 0.9 and a long grid of 7 x 31 all fall short in 1 mask of 100, and
noise chooses the last few patches."""
SMALLEST_AREA = 16 / 196
"""Smallest share of the grid under a rectangle: BEiT's 16 of 14 x 14 patches."""
SLIMMEST_ASPECT = 0.3
"""BEiT's: height / width between this and its inverse."""


class MaskInput(NamedTuple):
    """What a mask policy is told of a batch."""

    scores: Float[Tensor, "b n"] | None
    """What guides the mask, predicted loss or attention, higher = hidden first; None for a mask that nothing guides."""
    noise: Float[Tensor, "b n"]
    """Uniform in [0, 1)."""
    grid: Grid
    """Rows and columns of patches."""
    num_hidden: int
    """M."""
    num_hard: int | Int[Tensor, ""] = 0
    """``int(M * a_t)``, the patches to hide by score. A tensor keeps a compiled step free of recompilation while the
    share grows."""
    valid: Bool[Tensor, "b n"] | None = None
    """Patches of pixels that are all data; None: all. The others are hidden or visible by chance, never by score."""


MaskPolicy = Callable[[MaskInput], Float[Tensor, "b n"]]
"""Gives every patch its priority; the ``num_hidden`` highest of each image are hidden."""


def num_hidden_patches(num_patches: int, ratio: float) -> int:
    """M, the number of hidden patches: all but the rounded-down visible share (MAE's rule; 147 of 196 at 0.75)."""
    return num_patches - int(num_patches * (1 - ratio))


def hide_top(priority: Float[Tensor, "b n"], num_hidden: int) -> Bool[Tensor, "b n"]:
    """Hide the ``num_hidden`` patches of highest priority in each image."""
    top = priority.topk(num_hidden, dim=1).indices
    return torch.zeros_like(priority, dtype=torch.bool).scatter_(1, top, True)


def split_patches(hidden: Bool[Tensor, "b n"], num_hidden: int) -> tuple[Int[Tensor, "b k"], Int[Tensor, "b m"]]:
    """Indices of the visible and of the hidden patches, each in image order.

    ``num_hidden`` is given rather than counted: counting would make the host wait for the device.
    """
    order = hidden.to(torch.uint8).argsort(dim=1, stable=True)
    visible, masked = order.tensor_split([order.shape[1] - num_hidden], dim=1)
    return visible, masked


# Guided by scores


def hard(given: MaskInput) -> Float[Tensor, "b n"]:
    """HPM's masks: the ``num_hard`` patches of highest predicted loss, the rest uniform.

    With the teacher's class-token attention for scores these are AttMask's: the most attended are hidden. An image
    with fewer patches of data has as many fewer chosen by score, so that some of them stay visible. With
    ``num_hard == 0`` the masks are purely random.

    Source: the paper's section on easy-to-hard mask generation; for attention Kakogeorgiou et al., "What to Hide from
    Your Students: Attention-Guided Masked Image Modeling", ECCV 2022, arXiv 2203.12719.
    """
    scores, num_hard, valid = given.scores, given.num_hard, given.valid
    if scores is None:
        raise ValueError("a guided mask needs predicted losses or attention, got scores=None")
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
        num_hard = num_hard * valid.sum(dim=1, keepdim=True) // valid.shape[1]
    difficulty_rank = scores.argsort(dim=1, descending=True).argsort(dim=1)  # 0 = hardest
    return torch.where(difficulty_rank < num_hard, given.noise + 1, given.noise)


def easy(given: MaskInput) -> Float[Tensor, "b n"]:
    """The opposite of :func:`hard`: the ``num_hard`` patches of *lowest* predicted loss, the rest uniform.

    Source: the argmin row of the paper's table of mask strategies.
    """
    return hard(given._replace(scores=None if given.scores is None else -given.scores))


def proportional(given: MaskInput) -> Float[Tensor, "b n"]:
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
    if given.scores is None:
        return hard(given)
    uniform = more_noise(given.noise, given.noise.shape[1])
    return hard(given._replace(scores=given.scores.float() - (-uniform.log()).log()))


# Guided by nothing: functions of the noise and of the grid alone


def random(given: MaskInput) -> Float[Tensor, "b n"]:
    """MAE's masks: uniformly random."""
    return given.noise


def block(given: MaskInput) -> Float[Tensor, "b n"]:
    """BEiT's masks: hidden rectangles. Patches at the border are hidden less often than those in the middle."""
    return block_priority(given.noise, given.grid, given.num_hidden)


def inverse_block(given: MaskInput) -> Float[Tensor, "b n"]:
    """Inverse block masks: *visible* rectangles. Patches at the border are hidden more often.

    Source: Baevski et al., "Efficient Self-supervised Learning with Contextualized Target Representations" (data2vec
    2.0), arXiv 2212.07525, which keeps a block visible; its rectangles here are those of :func:`block`.
    """
    return -block_priority(given.noise, given.grid, given.noise.shape[1] - given.num_hidden)


def ranks(key: Num[Tensor, "b n"], ties: Float[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Rank of every value in its row, 0 = smallest; where values are equal, the smaller of ``ties`` comes first."""
    shuffled = ties.argsort(dim=1)
    order = shuffled.gather(1, key.gather(1, shuffled).argsort(dim=1, stable=True))
    return order.argsort(dim=1)


def block_priority(noise: Float[Tensor, "b n"], grid: Grid, num_covered: int) -> Float[Tensor, "b n"]:
    """Random rectangles laid one upon another until exactly ``num_covered`` patches lie under them.

    Areas are uniform from :data:`SMALLEST_AREA` to ``num_covered``, aspect ratios log-uniform, places uniform among
    those inside the grid. Where a rectangle would cover too many, it shrinks towards its middle. So a patch at the
    border is covered less often than one in the middle, as in the paper.

    Source: Bao et al., "BEiT", ICLR 2022, arXiv 2106.08254, algorithm 1. There the largest area is what is still
    missing, and the last rectangle may cover too many; here it is cut, so that all rectangles can be drawn at once
    and the number is exact. How aspect ratios are spread within their range is our choice: log-uniform treats lying
    and standing rectangles alike.
    """
    rows, columns = grid
    area, aspect, top, left = more_noise(noise, 4 * NUM_RECTANGLES).unflatten(1, (4, NUM_RECTANGLES, 1)).unbind(1)
    smallest = min(SMALLEST_AREA * rows * columns, num_covered)
    area = smallest + area * (num_covered - smallest)
    height = (area * SLIMMEST_ASPECT ** (2 * aspect - 1)).sqrt().round().clamp(1, rows)
    width = (area / height).round().clamp(1, columns)
    height = (area / width).round().clamp(1, rows)  # taller again where the grid was too narrow
    top = (top * (rows - height + 1)).floor()
    left = (left * (columns - width + 1)).floor()

    patch = torch.arange(rows * columns, device=noise.device)
    down = ((patch // columns).float() - (top + (height - 1) / 2)).abs() / (height / 2)
    across = ((patch % columns).float() - (left + (width - 1) / 2)).abs() / (width / 2)
    outward = torch.maximum(down, across)  # (B, R, N): 0 in the middle of a rectangle, below 1 inside it
    number = torch.arange(NUM_RECTANGLES, device=noise.device).unsqueeze(1)
    first = torch.where(outward < 1, number + outward, NUM_RECTANGLES).amin(dim=1)
    return -ranks(first, ties=noise).float()


def uniform_grid(given: MaskInput) -> Float[Tensor, "b n"]:
    """UM-MAE's uniform sampling: the same share of every 2x2 cell is hidden, whichever share.

    Within a cell of n patches (on odd grids the last row and column make cells of 2 and 1) the patches come in random
    order at the levels (k + u) / n, with one uniform u per cell. Hiding all levels below t hides floor(n t) or
    ceil(n t) patches of each cell: the counts differ from n t by less than one. At ratio 0.75 on an even grid exactly
    three of each four are hidden. On even grids every patch is hidden equally often; on odd ones nearly so.

    Source: Li et al., "Uniform Masking", arXiv 2205.10063, its uniform sampling (one of each 2x2 visible); odd grids
    and other ratios are ours. Its secondary masking, which replaces visible patches by a token, is not done here.
    """
    noise, grid = given.noise, given.grid
    rows, columns = grid
    padded = F.pad(noise.unflatten(1, grid), (0, columns % 2, 0, rows % 2), value=2)  # in their cell these come last
    cells = padded.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)  # (B, rows/2, columns/2, 4)
    order = cells.argsort(dim=3).argsort(dim=3)
    size = (cells < 1).sum(dim=3, keepdim=True)
    offset = more_noise(noise, cells[0].numel() // 4).reshape(*cells.shape[:3], 1)
    level: Tensor = (order + offset * (1 - 2**-20)) / size  # or order + offset would round up to the next level
    level = level.unflatten(3, (2, 2)).transpose(2, 3).flatten(3).flatten(1, 2)
    return -level[:, :rows, :columns].flatten(1)


def _gaussian(squared: Float[Tensor, "r c"], sigma: float) -> Float[Tensor, "r c"]:
    """Fourier transform of a Gaussian blur of ``sigma`` patches, at squared frequencies in cycles per patch."""
    return torch.exp(-2 * math.pi**2 * sigma**2 * squared)


COLOURS: dict[str, Callable[[Float[Tensor, "r c"]], Float[Tensor, "r c"]]] = {
    "red": lambda squared: _gaussian(squared, 1.0),
    "blue": lambda squared: 1 - _gaussian(squared, 1.0),
    "green": lambda squared: _gaussian(squared, 0.75) - _gaussian(squared, 1.5),
    "purple": lambda squared: 1 - (_gaussian(squared, 0.5) - _gaussian(squared, 2.0)),
}
"""Filters of white noise: the gain at each squared frequency.

Low-pass, high-pass, band-pass (a difference of Gaussians) and band-stop (the rest of one), as the paper describes them.
The sigmas, in patches, are ours: the paper's belong to large noise images from which it cuts windows.
"""


def colour(given: MaskInput, *, name: str) -> Float[Tensor, "b n"]:
    """ColorMAE's masks: the highest values of filtered Gaussian white noise.

    The filter works on the patch grid as if its borders met, so that no patch is special: every one is hidden equally
    often.

    Source: Hinojosa et al., "ColorMAE", ECCV 2024, arXiv 2407.13036.
    """
    noise, grid = given.noise, given.grid
    rows, columns = grid
    # float64 (which MPS lacks): an image transformed alone is rounded otherwise than among others; a mask must not be.
    uniform = (noise if noise.is_mps else noise.double()).clamp(2**-25, 1 - 2**-24)
    white = torch.erfinv(2 * uniform - 1).unflatten(1, grid)
    down = torch.fft.fftfreq(rows, device=white.device, dtype=white.dtype).square().unsqueeze(1)
    across = torch.fft.rfftfreq(columns, device=white.device, dtype=white.dtype).square()
    squared = down + across
    gain = COLOURS[name](squared)
    filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(white) * gain, s=grid)
    return filtered.flatten(1)


red_noise, blue_noise, green_noise, purple_noise = (
    partial(colour, name=name) for name in ("red", "blue", "green", "purple")
)
