"""How often a classifier is right: overall, with its uncertainty, and class by class. Whatever the classifier is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix
from torch import Tensor

from hardpatch.figures.sections import Table, decimals

MAX_NAMES = 60
"""With more classes than this, a confusion picture shows no names: they would not be readable."""


class Interval(NamedTuple):
    """A 95 % confidence interval, percent."""

    low: float
    high: float


class ClassAccuracy(NamedTuple):
    """One class of the validation images."""

    name: str
    num_images: int
    top1: float | None
    """Share of its images that are recognised, percent; None where it has none."""
    precision: float | None
    """Share of the images taken for it that are of it, percent; None where none are."""
    mistaken_for: str
    """The other class that its images are taken for most often; empty where never."""


def top_k_accuracy(scores: Float[Tensor, "q c"], labels: Int[Tensor, " q"], k: int) -> float:
    """Share of images, in percent, whose class is among the k of the highest scores."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return float((best == labels.unsqueeze(1)).any(dim=1).double().mean() * 100)


def wilson_interval(num_correct: int, num_images: int) -> Interval:
    """Wilson's 95 % interval of an accuracy: honest for few images and near 0 or 100 %, where the usual ± is not.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    interval = binomtest(num_correct, num_images).proportion_ci(0.95, method="wilson")
    return Interval(float(interval.low) * 100, float(interval.high) * 100)


def paired_difference(
    right: Sequence[bool] | np.ndarray, against: Sequence[bool] | np.ndarray
) -> tuple[float, Interval]:
    """Mean of the paired differences (1, 0 or -1 an image) in points, with its interval by the normal approximation.

    Two encoders that fail on the same images are told apart more sharply than their own intervals suggest.

    Args:
        right: Images that the one classifies rightly.
        against: The same images, by the other.
    """
    difference = 100.0 * (np.asarray(right, float) - np.asarray(against, float))
    lead, half = float(difference.mean()), 1.96 * float(difference.std() / np.sqrt(len(difference)))
    return lead, Interval(lead - half, lead + half)


def count_confusions(
    predicted: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], num_classes: int
) -> Int[np.ndarray, "c c"]:
    """How many images of each class (row) are taken for each class (column)."""
    counts: Int[np.ndarray, "c c"] = confusion_matrix(labels, predicted, labels=np.arange(num_classes))
    return counts


def per_class_accuracy(confusions: Int[np.ndarray, "c c"], classes: Sequence[str]) -> list[ClassAccuracy]:
    """Accuracy class by class, in the order of ``classes``."""
    correct, images, taken = confusions.diagonal(), confusions.sum(axis=1), confusions.sum(axis=0)
    others = confusions - np.diag(correct)
    return [
        ClassAccuracy(
            name,
            int(images[i]),
            100 * int(correct[i]) / int(images[i]) if images[i] else None,
            100 * int(correct[i]) / int(taken[i]) if taken[i] else None,
            classes[int(others[i].argmax())] if others[i].any() else "",
        )
        for i, name in enumerate(classes)
    ]


def classes_table(per_class: Sequence[dict[str, Any]], *, most: int = 12) -> Table:
    """Class by class from the worst to the best; of many classes as many of either end.

    Args:
        per_class: Fields of :class:`ClassAccuracy`; classes without images are left out.
        most: Classes that are shown.
    """
    measured = sorted((item for item in per_class if item["num_images"]), key=lambda item: item["top1"])
    rows = [
        (item["name"], str(item["num_images"]), decimals(item["top1"], 1), decimals(item["precision"], 1),
         item["mistaken_for"])
        for item in measured
    ]  # fmt: skip
    if len(rows) > most:
        rows[most // 2 : -(most // 2)] = [("...", "", "", "", "")]
    return Table(("class", "images", "recognised %", "precision %", "mistaken for"), rows)


def draw_confusions(confusions: Int[np.ndarray, "c c"], classes: Sequence[str], *, title: str = "") -> Figure:
    """Draw what is taken for what: one row per true class, each row as shares of its images.

    Args:
        title: Above the picture.
    """
    shares = confusions / np.maximum(confusions.sum(axis=1, keepdims=True), 1)
    num, named = len(classes), len(classes) <= MAX_NAMES
    side = min(11.0, 2.6 + 0.2 * num) if named else 8.0
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(shares, cmap="BuPu", vmin=0, vmax=1)
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name in classes]
    ticks, size = (range(num), 8 if num <= 30 else 6) if named else ([], 8)
    axis.set_xticks(ticks, names if named else [], rotation=90, fontsize=size)
    axis.set_yticks(ticks, names if named else [], fontsize=size)
    axis.tick_params(length=0)
    axis.set_xlabel("taken for", fontsize=9)
    axis.set_ylabel("is", fontsize=9)
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[:].set_visible(False)
    if num <= 12:
        for row, column in np.argwhere(confusions):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, str(confusions[row, column]), ha="center", va="center", fontsize=8, color=colour)
    bar = figure.colorbar(picture, ax=axis, shrink=0.6, label="share of the row")
    bar.ax.tick_params(labelsize=8)
    return figure
