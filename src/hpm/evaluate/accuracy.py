"""How often a classifier is right: overall, with its uncertainty, and class by class. Whatever the classifier is."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def top_k_accuracy(scores: Float[Tensor, "q c"], labels: Int[Tensor, " q"], k: int) -> float:
    """Share of images, in percent, whose class is among the k of the highest scores."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return float((best == labels.unsqueeze(1)).any(dim=1).double().mean() * 100)
