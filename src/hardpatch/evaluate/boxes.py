"""Boxes of objects, read as annotations.

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
from jaxtyping import Bool
from torch import Tensor

from hardpatch.data.images.decode import DecodeError
from hardpatch.data.loader.loading import Cover
from hardpatch.data.sources import Source
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import warn

COLUMNS = ("xmin", "ymin", "xmax", "ymax")


class _Row(NamedTuple):
    """One annotated box; where it stands, for messages."""

    place: str
    corners: tuple[float, float, float, float]


def read_boxes(path: Path, source: Source, size: tuple[int, int]) -> dict[int, Bool[Tensor, "h w"]]:
    """What the boxes of every readable image cover of it, as the encoder sees it.

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
        covered = torch.zeros(1, height, width, dtype=torch.bool)
        for row in boxes:
            left, top, right, bottom = row.corners
            if left > right or top > bottom or left < 0 or top < 0 or right > width or bottom > height:
                raise InputError(
                    f"boxes: {row.place}: must lie within the {width}x{height} pixels of {source.name(index)} and go "
                    f"from smaller to larger numbers, got {', '.join(f'{corner:g}' for corner in row.corners)}"
                )
            covered[:, int(top) : int(bottom) + 1, int(left) : int(right) + 1] = True
        seen = cover(covered)[0]
        if seen.any():
            found[index] = seen
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
