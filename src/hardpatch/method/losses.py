"""The losses of the loss predictor, and how well it ranks patches."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

PredictedLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(scores (B, M), patch loss (B, M), valid (B, M) or None) -> L_pred, a scalar."""


def relative_loss(
    scores: Float[Tensor, "b m"], patch_loss: Float[Tensor, "b m"], valid: Bool[Tensor, "b m"] | None = None
) -> Float[Tensor, ""]:
    """Relative predicted loss: which of two patches of an image is harder? Binary cross-entropy over all pairs.

    Over ordered pairs with different losses, the cross-entropy of sigmoid(s_i - s_j) against [l_i > l_j]. Both orders
    of a pair give the same value, so the mean runs once over the pairs with l_i > l_j. The published 1e-6 inside the
    logarithm stays: it bounds the loss of one pair, and trajectories are only equal with it.

    Args:
        scores: Predicted loss s.
        patch_loss: True loss l; no gradient flows into it.
        valid: Patches that take part; None: all.
    """
    patch_loss = patch_loss.detach()
    harder = patch_loss.unsqueeze(2) > patch_loss.unsqueeze(1)  # (B, M, M): is i harder than j?
    if valid is not None:
        harder = harder & valid.unsqueeze(2) & valid.unsqueeze(1)
    margin = scores.float().unsqueeze(2) - scores.float().unsqueeze(1)
    cross_entropy = -(torch.sigmoid(margin) + 1e-6).log()
    return (cross_entropy * harder).sum() / harder.sum().clamp(min=1)


def absolute_loss(
    scores: Float[Tensor, "b m"], patch_loss: Float[Tensor, "b m"], valid: Bool[Tensor, "b m"] | None = None
) -> Float[Tensor, ""]:
    """Absolute predicted loss: mean squared error against the true loss, standardised within each image.

    Args:
        scores: Predicted loss.
        patch_loss: True loss; no gradient flows into it.
        valid: Patches that take part; None: all.
    """
    patch_loss = patch_loss.detach()
    if valid is None:
        variance, mean = torch.var_mean(patch_loss, dim=1, keepdim=True)
        return F.mse_loss(scores.float(), (patch_loss - mean) / (variance + 1e-6).sqrt())
    count = valid.sum(dim=1, keepdim=True)
    mean = (patch_loss * valid).sum(dim=1, keepdim=True) / count.clamp(min=1)
    variance = ((patch_loss - mean).square() * valid).sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
    return mean_over((scores.float() - (patch_loss - mean) / (variance + 1e-6).sqrt()).square(), valid)


def num_pairs(counted: Bool[Tensor, "b m"]) -> Float[Tensor, ""]:
    """Unordered pairs of patches of the same image that count, over all images: what the relative loss averages."""
    patches = counted.sum(dim=1).float()
    return (patches * (patches - 1) / 2).sum()


def num_patches(counted: Bool[Tensor, "b m"]) -> Float[Tensor, ""]:
    """Patches that count, over all images: what reconstruction and absolute loss average."""
    return counted.sum().float()


PREDICTED_LOSSES: dict[str, PredictedLoss | None] = {
    "relative": relative_loss,
    "absolute": absolute_loss,
    "none": None,
}


def rank_correlation(
    a: Float[Tensor, "b m"], b: Float[Tensor, "b m"], valid: Bool[Tensor, "b m"] | None = None
) -> Float[Tensor, " b"]:
    """Spearman's rank correlation of each row; ties are ranked in the order in which they stand.

    Args:
        a: Any values.
        b: Others.
        valid: Entries that take part; None: all. A row of fewer than two is 0.
    """
    both = torch.stack([a, b])
    if valid is not None:
        both = both.masked_fill(~valid, torch.inf)  # last, so that the others keep the ranks among themselves
    ranks = both.argsort(dim=-1, stable=True).argsort(dim=-1).float()
    if valid is None:
        ranks = ranks - ranks.mean(dim=-1, keepdim=True)
    else:
        ranks = (ranks - (valid.sum(dim=-1, keepdim=True) - 1) / 2) * valid
    return (ranks[0] * ranks[1]).sum(-1) / (ranks.square().sum(-1).prod(0).sqrt() + 1e-12)


def mean_over(values: Float[Tensor, "b m"], valid: Bool[Tensor, "b m"] | None) -> Float[Tensor, ""]:
    """Mean of the values that take part, 0 of none; ``valid`` None: all do."""
    return values.mean() if valid is None else (values * valid).sum() / valid.sum().clamp(min=1)
