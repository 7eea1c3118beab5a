"""What an evaluation can be told: kept apart from what it does, so that ``--help`` need not import it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Pooling = Literal["class", "mean", "both"]
"""The class token, the mean of the patch tokens, or both side by side, each of length one."""


@dataclass(frozen=True)
class KnnConfig:
    """k-nearest-neighbour evaluation."""

    checkpoint: str
    """Run folder or checkpoint file."""
    train: str
    """Labelled images to look for neighbours among."""
    val: str
    """Labelled images to classify."""
    k: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours; top1 is quoted for the first."""
    temperature: float = 0.07
    """Weight of a neighbour: exp(cosine similarity / temperature)."""
    pooling: Pooling = "mean"
    """Feature of an image: class token, mean of the patch tokens, or both."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to run."""
    workers: int = 0
    """Data processes."""
    max_damaged: float = 0.01
    """Stop when more than this share of a source's images cannot be decoded."""


@dataclass(frozen=True)
class ForegroundConfig:
    """Foreground evaluation."""

    checkpoint: str
    """Run folder or checkpoint file."""
    images: str
    """Images; shapes:N brings its own masks."""
    masks: str = ""
    """Folder of masks, one per image with the same name up to the ending; bright = foreground."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to run."""
    max_damaged: float = 0.01
    """Stop when more than this share of the images cannot be decoded."""
