"""Pictures of segmentations and of detections: what was there, what was found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from hardpatch.evaluate.dense.class_masks import IGNORED
from hardpatch.figures.display import Display

STRENGTH = 0.55
"""Share of a colour over the image."""
MOST_NAMES = 20
"""Classes that a legend can hold."""


def class_colours(num_classes: int) -> Float[np.ndarray, "k 3"]:
    """A colour per class in 0..1; equal numbers of classes give equal colours."""
    if num_classes <= 10:
        return np.array(matplotlib.colormaps["tab10"](np.arange(num_classes)))[:, :3]
    hues = np.arange(num_classes) * 0.618034 % 1  # the golden ratio: neighbours in number are far apart in hue
    levels = np.stack([hues, np.full(num_classes, 0.75), np.where(np.arange(num_classes) % 2, 0.7, 0.95)], axis=1)
    return np.asarray(matplotlib.colors.hsv_to_rgb(levels))


class Segmented(NamedTuple):
    """An image with its classes, given and found."""

    image: Shaped[Tensor, "c h w"]
    truth: Integer[np.ndarray, "h w"]
    found: dict[str, Integer[np.ndarray, "h w"]]
    """By the title of the column."""


def overlay(
    image: UInt8[np.ndarray, "h w 3"], classes: Integer[np.ndarray, "h w"], colours: Float[np.ndarray, "k 3"]
) -> UInt8[np.ndarray, "h w 3"]:
    """Classes as colours over a grey image; of two classes only the second has one. Ignored pixels are black."""
    grey = np.repeat(image.mean(axis=-1, keepdims=True) / 255, 3, axis=-1)
    mixed = (1 - STRENGTH) * grey + STRENGTH * colours[np.clip(classes, 0, None)]
    if len(colours) == 2:
        mixed = np.where((classes == 0)[..., None], grey, mixed)
    mixed = np.where((classes == IGNORED)[..., None], 0, mixed)
    return np.asarray((mixed * 255).round().astype(np.uint8))


def draw_segmentations(items: Sequence[Segmented], names: Sequence[str], display: Display, title: str) -> Figure:
    """A row per image: itself, the given classes, and what was found."""
    colours = class_colours(len(names))
    columns = ["image", "truth", *items[0].found]
    figure, axes = _grid(len(items), columns, items[0].image, title)
    seen: set[int] = set()
    for row, item in enumerate(items):
        image = display.pixels(item.image[None])[0]
        axes[row, 0].imshow(image)
        for column, classes in enumerate((item.truth, *item.found.values()), 1):
            axes[row, column].imshow(overlay(image, classes, colours), interpolation="nearest")
            seen |= set(np.unique(classes).tolist()) - {IGNORED}
    shown = sorted(seen - {0} if len(names) == 2 else seen)
    if 0 < len(shown) <= MOST_NAMES:
        figure.legend(
            handles=[Patch(color=colours[number], label=names[number]) for number in shown],
            loc="outside lower center", ncols=min(len(shown), 5), fontsize=8, frameon=False,
        )  # fmt: skip
    return figure


class Detected(NamedTuple):
    """Instances in an image, given or found."""

    boxes: Float[np.ndarray, "n 4"]
    """Left, top, right, bottom in pixels."""
    labels: list[str]
    masks: Bool[np.ndarray, "n h w"] | None


def draw_detections(
    rows: Sequence[tuple[Shaped[Tensor, "c h w"], dict[str, Detected]]], display: Display, title: str
) -> Figure:
    """A row per image: itself, then its instances by column; every instance has a colour of its own."""
    columns = ["image", *rows[0][1]]
    figure, axes = _grid(len(rows), columns, rows[0][0], title)
    for row, (picture, found) in enumerate(rows):
        image = display.pixels(picture[None])[0]
        axes[row, 0].imshow(image)
        for column, detected in enumerate(found.values(), 1):
            _draw_instances(axes[row, column], image, detected)
    return figure


def _draw_instances(axis: Axes, image: UInt8[np.ndarray, "h w 3"], detected: Detected) -> None:
    colours = class_colours(max(11, len(detected.labels)))
    shown = np.repeat(image.mean(axis=-1, keepdims=True) / 255, 3, axis=-1)
    if detected.masks is not None:
        for mask, colour in zip(detected.masks, colours):
            shown[mask] = (1 - STRENGTH) * shown[mask] + STRENGTH * colour
    axis.imshow(shown, interpolation="nearest")
    for (left, top, right, bottom), label, colour in zip(detected.boxes, detected.labels, colours):
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=0.8))
        if label:
            axis.text(left, top, label, fontsize=5, color="white", va="bottom",
                      bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.6})  # fmt: skip


def _grid(rows: int, columns: Sequence[str], first: Shaped[Tensor, "c h w"], title: str) -> tuple[Figure, np.ndarray]:
    """Empty axes without frames, with titles above the first row."""
    height = 2.0 * min(2.0, first.shape[1] / first.shape[2])
    figure = Figure(figsize=(2.0 * len(columns), height * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, name in zip(axes[0], columns):
        axis.set_title(name, fontsize=9)
    figure.suptitle(title, fontsize=9)
    return figure, axes
