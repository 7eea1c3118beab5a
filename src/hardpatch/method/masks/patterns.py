"""Spatial patterns: priorities that ask neither the image nor a model, only the grid and the noise.

Each is a pure function of a row of noise; :mod:`hpm.masking` hides the patches of highest priority. Any grid will do,
also one of a single row.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor

from hpm.seeding import more_noise

Grid = tuple[int, int]
"""Rows and columns of patches."""

NUM_RECTANGLES = 16
"""Drawn for every mask. Three do at ratio 0.75; at 0.9 and a long grid of 7 x 31 all fall short in 1 mask of 100, and
noise chooses the last few patches."""
SMALLEST_AREA = 16 / 196
"""Of the grid: BEiT's 16 of 14 x 14 patches."""
SLIMMEST_ASPECT = 0.3
"""BEiT's: height / width between this and its inverse."""


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


def cell_priority(noise: Float[Tensor, "b n"], grid: Grid) -> Float[Tensor, "b n"]:
    """Hide the same share of every 2x2 cell, whichever share: systematic sampling over the cells.

    Within a cell of n patches (on odd grids the last row and column make cells of 2 and 1) the patches come in random
    order at the levels (k + u) / n, with one uniform u per cell. Hiding all levels below t hides floor(n t) or
    ceil(n t) patches of each cell: the counts differ from n t by less than one. At ratio 0.75 on an even grid exactly
    three of each four are hidden. On even grids every patch is hidden equally often; on odd ones nearly so.

    Source: Li et al., "Uniform Masking", arXiv 2205.10063, its uniform sampling (one of each 2x2 visible); odd grids
    and other ratios are ours. Its secondary masking, which replaces visible patches by a token, is not done here.
    """
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


def colour_priority(noise: Float[Tensor, "b n"], grid: Grid, colour: str) -> Float[Tensor, "b n"]:
    """Filtered Gaussian white noise.

    The filter works on the patch grid as if its borders met, so that no patch is special: every one is hidden equally
    often.

    Source: Hinojosa et al., "ColorMAE", ECCV 2024, arXiv 2407.13036.
    """
    rows, columns = grid
    # float64 (which MPS lacks): an image transformed alone is rounded otherwise than among others; a mask must not be.
    uniform = (noise if noise.is_mps else noise.double()).clamp(2**-25, 1 - 2**-24)
    white = torch.erfinv(2 * uniform - 1).unflatten(1, grid)
    down = torch.fft.fftfreq(rows, device=white.device, dtype=white.dtype).square().unsqueeze(1)
    across = torch.fft.rfftfreq(columns, device=white.device, dtype=white.dtype).square()
    squared = down + across
    gain = COLOURS[colour](squared)
    filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(white) * gain, s=grid)
    return filtered.flatten(1)
