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
    against: tuple[str, ...] = ()
    """Other encoders by the same protocol: timm:NAME, timm:local-dir:PATH, or another run."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to run."""
    workers: int = 0
    """Data processes."""
    max_damaged: float = 0.01
    """Stop when more than this share of a source's images cannot be decoded."""


@dataclass(frozen=True)
class LinearConfig:
    """Linear classification of frozen features: the published probe, or logistic regression."""

    checkpoint: str
    """Run folder or checkpoint file."""
    train: str
    """Labelled images to learn from."""
    val: str
    """Labelled images to classify; they decide nothing."""
    mode: Literal["sgd", "logistic"] = "sgd"
    """sgd: the published probe (BatchNorm, linear layer, SGD); logistic: scikit-learn's, on standardised features."""
    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    """Of sgd, for batches of 256. A held-out tenth of the training images chooses; all are trained side by side."""
    inverse_penalties: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """Of logistic, scikit-learn's C; chosen in the same way."""
    epochs: int = 90
    """Of sgd."""
    batch_size: int = 256
    """Of sgd: images per step; all where there are fewer."""
    pooling: Pooling = "mean"
    """Feature of an image: class token, mean of the patch tokens, or both."""
    labels_per_class: tuple[int, ...] = ()
    """Also learn from so few labelled images of every class, e.g. 5 10 50."""
    draws: int = 5
    """Random choices of those few images; quoted are mean and standard deviation."""
    against: tuple[str, ...] = ()
    """Other encoders by the same protocol: timm:NAME, timm:local-dir:PATH, or another run."""
    out: str = ""
    """Folder for the confusion picture and the figures; none: RUN/evaluate."""
    seed: int = 0
    """Decides what is held out, the few labels, the start and the order."""
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
    boxes: str = ""
    """Instead of masks: table.csv (path, xmin, ymin, xmax, ymax) or .npy (n, 4); images without a box do not count."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to run."""
    max_damaged: float = 0.01
    """Stop when more than this share of the images cannot be decoded."""
