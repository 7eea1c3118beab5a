"""Sliding windows: what an encoder of one size says of an image of any size."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Num
from torch import Tensor

from hardpatch.evaluate.dense.segment_heads import enlarge

CLASSES_AT_ONCE = 8
"""Classes whose logits are held at an image's own size at one time."""


def window_corners(size: tuple[int, int], window: tuple[int, int], *, overlap: float) -> list[tuple[int, int]]:
    """Upper left corners of windows that cover an image, evenly spread and none reaching further than needed.

    Args:
        overlap: Least share of a window that the next one sees again.
    """

    def starts(length: int, side: int) -> list[int]:
        rest = length - side
        if rest <= 0:
            return [0]
        count = math.ceil(rest / max(1, int(side * (1 - overlap)))) + 1
        return [round(i * rest / (count - 1)) for i in range(count)]

    return [(top, left) for top in starts(size[0], window[0]) for left in starts(size[1], window[1])]


def cut(
    image: Num[Tensor, "c h w"], corner: tuple[int, int], window: tuple[int, int], *, fill: float
) -> Num[Tensor, "c y x"]:
    """A window of an image, filled up on the right and below where the image is smaller."""
    part = image[:, corner[0] : corner[0] + window[0], corner[1] : corner[1] + window[1]]
    return F.pad(part, (0, window[1] - part.shape[2], 0, window[0] - part.shape[1]), value=fill)


def slide(
    predict: Callable[[Float[Tensor, "b c y x"]], Float[Tensor, "b k y x"]],
    image: Float[Tensor, "c h w"],
    *,
    window: tuple[int, int],
    overlap: float,
    batch_size: int = 16,
) -> Float[Tensor, "k h w"]:
    """Logits of every pixel, the mean over the windows that see it.

    Args:
        image: Normalised.
        overlap: Of neighbouring windows.
    """
    height, width = image.shape[1:]
    corners = window_corners((height, width), window, overlap=overlap)
    total, count = torch.zeros(()), torch.zeros(height, width, device=image.device)
    for start in range(0, len(corners), batch_size):
        chosen = corners[start : start + batch_size]
        logits = predict(torch.stack([cut(image, corner, window, fill=0) for corner in chosen]))
        if total.ndim == 0:
            total = torch.zeros(logits.shape[1], height, width, device=image.device)
        for (top, left), part in zip(chosen, logits):
            rows, columns = slice(top, top + window[0]), slice(left, left + window[1])
            inside = total[:, rows, columns]
            inside += part[:, : inside.shape[1], : inside.shape[2]]
            count[rows, columns] += 1
    return total / count


def most_likely(logits: Float[Tensor, "k y x"], size: tuple[int, int]) -> Int64[Tensor, "h w"]:
    """The class of every pixel of an image of another size; logits are enlarged a few classes at a time."""
    best = torch.full(size, -math.inf, device=logits.device)
    chosen = torch.zeros(size, dtype=torch.int64, device=logits.device)
    for start in range(0, len(logits), CLASSES_AT_ONCE):
        part, index = enlarge(logits[None, start : start + CLASSES_AT_ONCE], size)[0].max(dim=0)
        better = part > best
        best, chosen = torch.where(better, part, best), torch.where(better, index + start, chosen)
    return chosen
