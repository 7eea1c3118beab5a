"""Colours for images of many channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def principal_components(images: Sequence[Tensor]) -> Float[Tensor, "3 c"]:
    """The three directions of the largest variance over all pixels, each scaled to unit variance; of two channels the
    third is nothing. Signs are fixed so that bright stays bright."""
    pixels = torch.cat([image.flatten(1) for image in images], dim=1)
    variances, directions = torch.linalg.eigh(torch.cov(pixels))
    variances, directions = variances.flip(0)[:3], directions.flip(1)[:, :3].T
    sums = directions.sum(dim=1, keepdim=True)
    rows = directions * torch.where(sums < 0, -1.0, 1.0) / variances.clamp(min=1e-12).sqrt().unsqueeze(1)
    return torch.cat([rows, rows.new_zeros(3 - len(rows), rows.shape[1])])
