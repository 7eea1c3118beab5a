"""Boxes of objects: read as annotations, and found in a map of scores.

    table.csv    columns path, xmin, ymin, xmax, ymax; a line per box, none or empty cells where an image has no box
    boxes.npy    (n, 4): row k is the one box of image k; a row of equal numbers (0 0 0 0) is no box

Coordinates are pixels of the image as it is stored; both ends belong to the box.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from torch import Tensor

from hardpatch.data.images.decode import DecodeError
from hardpatch.data.loader.loading import Cover
from hardpatch.data.sources import Source
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import warn

QUANTILES = tuple(round(0.05 * step, 2) for step in range(1, 20))
"""Thresholds at which boxes are looked for in a map of scores: shares of its patches that lie below."""
COLUMNS = ("xmin", "ymin", "xmax", "ymax")


class _Row(NamedTuple):
    """One annotated box; where it stands, for messages."""

    place: str
    corners: tuple[float, float, float, float]


def read_boxes(path: Path, source: Source, size: tuple[int, int]) -> dict[int, Bool[Tensor, "k h w"]]:
    """The boxes of every readable image that has some, each as a mask of the image as the encoder sees it.

    Args:
        path: A ``.csv`` or ``.npy`` in one of the forms above.
        source: The images; those of a table are matched by the end of their path.
        size: Height and width to which images are brought.

    Returns:
        By the image's number; images without a box, or whose boxes all lie outside the part that the encoder sees, are
        not in it.

    Raises:
        InputError: The file cannot be read or does not fit the images, a box is none, or there is not one.
    """
    rows = _read_array(path, source) if path.suffix.lower() == ".npy" else _read_table(path, source)
    cover, found = Cover(size), {}
    for index, boxes in rows.items():
        try:
            height, width = source.read(index).image.shape[-2:]
        except (DecodeError, OSError):  # a damaged image is left out, and reported where the others are measured
            continue
        masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
        for mask, row in zip(masks, boxes, strict=True):
            left, top, right, bottom = row.corners
            if left > right or top > bottom or left < 0 or top < 0 or right > width or bottom > height:
                raise InputError(
                    f"boxes: {row.place}: must lie within the {width}x{height} pixels of {source.name(index)} and go "
                    f"from smaller to larger numbers, got {', '.join(f'{corner:g}' for corner in row.corners)}"
                )
            mask[int(top) : int(bottom) + 1, int(left) : int(right) + 1] = True
        seen = cover(masks)
        if (kept := seen.flatten(1).any(dim=1)).any():
            found[index] = seen[kept]
    if not found:
        raise InputError(f"boxes: empty: {str(path)!r} has no box for any of the {len(source):,} images")
    return found


def _read_array(path: Path, source: Source) -> dict[int, list[_Row]]:
    """One box per image, by number."""
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"boxes: cannot read {str(path)!r}: {error}") from error
    if values.ndim != 2 or values.shape[1] != 4 or not np.issubdtype(values.dtype, np.number):
        raise InputError(f"boxes: {str(path)!r} must be an array of numbers (n, 4), got {values.shape} {values.dtype}")
    if len(values) != len(source):
        raise InputError(f"boxes: {str(path)!r} has {len(values):,} rows, and there are {len(source):,} images")
    return {
        index: [_Row(f"row {index}", _corners(row))]
        for index, row in enumerate(values.astype(float).tolist())
        if len(set(row)) > 1 and not np.isnan(row).any()
    }


def _corners(values: Sequence[float]) -> tuple[float, float, float, float]:
    left, top, right, bottom = values
    return left, top, right, bottom


def _read_table(path: Path, source: Source) -> dict[int, list[_Row]]:
    """Any number of boxes per image, matched by the end of the path, with or without the ending of the file."""
    if path.suffix.lower() != ".csv":
        raise InputError(f"boxes: must be a .csv or .npy, got {str(path)!r}")
    try:
        reader = csv.DictReader(io.StringIO(path.read_text("utf-8-sig")))
        lines = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"boxes: cannot read {str(path)!r}: {error}") from error
    if missing := [name for name in ("path", *COLUMNS) if name not in (reader.fieldnames or ())]:
        raise InputError(
            f"boxes: {str(path)!r} needs the columns path, {', '.join(COLUMNS)}; missing {', '.join(missing)}"
        )
    by_end: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index in range(len(source)):
        name = PurePosixPath(source.name(index).replace("\\", "/").replace(":", "/"))
        for parts in {name.parts, name.with_suffix("").parts}:
            for start in range(len(parts)):
                by_end[parts[start:]].append(index)
    rows: dict[int, list[_Row]] = defaultdict(list)
    strangers = []
    for number, line in enumerate(lines, 2):
        place = f"{path.name}, line {number}"
        found = _images_of(line["path"] or "", by_end)
        if len(found) > 1:
            raise InputError(
                f"boxes: {place}: several images end in {line['path']!r}, {source.name(found[0])} and "
                f"{source.name(found[1])}; give more of the path"
            )
        cells = [(line[name] or "").strip() for name in COLUMNS]
        if not found:
            strangers.append(line["path"])
        elif any(cells):
            try:
                rows[found[0]].append(_Row(place, _corners([float(cell) for cell in cells])))
            except ValueError:
                raise InputError(f"boxes: {place}: must be four numbers, got {', '.join(map(repr, cells))}") from None
    if strangers:
        warn(f"boxes: {len(strangers):,} of {len(lines):,} lines name no image of these, the first {strangers[0]!r}")
    return rows


def _images_of(path: str, by_end: dict[tuple[str, ...], list[int]]) -> list[int]:
    """Images whose name ends in a path; one without an ending where none has it."""
    written = PurePosixPath(path.strip().replace("\\", "/").removeprefix("./"))
    parts = tuple(part for part in written.parts if part not in ("/", ".."))
    if not parts:
        return []
    return by_end.get(parts) or by_end.get((*parts[:-1], PurePosixPath(parts[-1]).stem), [])


def extents(masks: Bool[np.ndarray, "k h w"]) -> Int[np.ndarray, "k 4"]:
    """Left, top, right and bottom (the last two just outside) of what is True in each mask; every mask has some."""
    rows, columns = np.asarray(masks.any(axis=2)), np.asarray(masks.any(axis=1))
    return np.stack(
        [
            columns.argmax(axis=1),
            rows.argmax(axis=1),
            columns.shape[1] - columns[:, ::-1].argmax(axis=1),
            rows.shape[1] - rows[:, ::-1].argmax(axis=1),
        ],
        axis=1,
    )


def largest_parts(maps: Bool[np.ndarray, "m h w"]) -> Bool[np.ndarray, "m h w"]:
    """The largest connected part of every map (by edges, not corners); the first in reading order among equals."""
    neighbours = np.zeros((3, 3, 3), dtype=bool)
    neighbours[1] = ndimage.generate_binary_structure(2, 1)  # within a map, never from one to the next
    numbered, count = ndimage.label(maps, neighbours)
    sizes = np.bincount(numbered.ravel(), minlength=count + 1)
    map_of = np.zeros(count + 1, dtype=int)
    map_of[numbered] = np.arange(len(maps))[:, None, None]
    largest = np.full(len(maps), -1)
    parts = np.arange(1, count + 1)
    ascending = parts[np.lexsort((-parts, sizes[1:]))]
    largest[map_of[ascending]] = ascending  # of several the last one stays: the largest
    return np.asarray(numbered == largest[:, None, None])


def box_overlaps(
    scores: Float[np.ndarray, "b n"],
    boxes: Sequence[Int[np.ndarray, "_ 4"]],
    *,
    grid: tuple[int, int],
    patch: tuple[int, int],
) -> Float[np.ndarray, "b q"]:
    """How well the box around the highest scores fits an object, at every threshold of :data:`QUANTILES`.

    At each threshold the box is drawn around the largest connected part of the patches that reach it.

    Args:
        scores: Of the patches.
        boxes: Of every image's objects, in pixels: left, top, right, bottom, the last two just outside.
        grid: Rows and columns of patches.
        patch: Height and width of a patch in pixels.

    Returns:
        Intersection over union with the object that fits best.
    """
    thresholds = np.quantile(scores, QUANTILES, axis=1).T  # (b, q)
    maps = scores[:, None] >= thresholds[:, :, None]
    found = extents(largest_parts(maps.reshape(-1, *grid))).reshape(len(scores), -1, 4)
    found = found * np.array([patch[1], patch[0], patch[1], patch[0]])
    return np.stack([overlap(mine, theirs).max(axis=1) for mine, theirs in zip(found, boxes, strict=True)])


def overlap(a: Int[np.ndarray, "q 4"], b: Int[np.ndarray, "k 4"]) -> Float[np.ndarray, "q k"]:
    """Intersection over union of every box of one list with every box of another."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    areas = [(side[:, 2:] - side[:, :2]).prod(axis=1) for side in (a, b)]
    return np.asarray(shared / (areas[0][:, None] + areas[1][None] - shared))
