"""``shapes:N``: an embedded set of synthetic images with class labels, foreground masks and difficulty levels.

Made for this method: the background of every image can be predicted from a few of its patches, the texture of the
object on it cannot. So a working loss predictor finds the object, without labels. At three levels:

    plain        a smooth colour gradient behind a textured object: patch variance finds the object as well
    pattern      stripes, checks or dots behind it: busy, but regular
    camouflage   background and object are random blocks of the same two colours; the background repeats one small
                 tile, the object never repeats: same variance, same edges, only predictability tells them apart

An image has two labels: its silhouette, a global form that takes long to learn, and its background, a texture that
reconstruction teaches soon.

Images are made on the fly, each from (seed, index) alone; nothing is downloaded or stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

LEVELS = ("plain", "pattern", "camouflage")
BACKGROUNDS = ("gradient", "rows", "columns", "antidiagonal", "diagonal", "checks", "dots", "irregular")
"""The first is that of every plain image, the last that of every camouflaged one, the rest are the patterns."""
TILES_PER_SIDE = 8
"""Background patterns repeat this many times over the image."""
BLOCKS_PER_TILE = 4
"""Side of a tile in blocks of one colour."""

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Coordinates = npt.NDArray[np.float64]


class Shape(NamedTuple):
    """One synthetic image."""

    image: npt.NDArray[np.uint8]
    """(H, W, 3)."""
    mask: Mask
    """(H, W), True = object."""
    label: int
    """Index into :data:`CLASSES`."""
    level: int
    """Index into :data:`LEVELS`."""
    background: int
    """Index into :data:`BACKGROUNDS`."""


def _polygon(corners: int, inner: float) -> Callable[[Coordinates, Coordinates], Mask]:
    """A star with ``corners`` tips; ``inner`` is the radius between two tips (1 = at the tips' radius)."""
    angles = np.arange(2 * corners) * np.pi / corners
    radii = np.where(np.arange(2 * corners) % 2 == 0, 1.0, inner).astype(np.float32)
    points = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1).astype(np.float32)

    def inside(x: Coordinates, y: Coordinates) -> Mask:
        crossings = np.zeros(x.shape, dtype=bool)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0)):
            between = (y0 > y) != (y1 > y)
            if y1 != y0:
                crossings ^= between & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
        return crossings

    return inside


CLASSES: dict[str, Callable[[Coordinates, Coordinates], Mask]] = {
    "disc": lambda x, y: x**2 + y**2 < 0.72,
    "triangle": _polygon(3, 0.5),
    "square": _polygon(4, np.sqrt(0.5)),
    "star": _polygon(5, 0.45),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.33) & (np.maximum(abs(x), abs(y)) < 0.95),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.68) < 0.27,
    "bar": lambda x, y: (abs(x) < 1.0) & (abs(y) < 0.42),
    "crescent": lambda x, y: (x**2 + y**2 < 0.9) & ((x - 0.5) ** 2 + y**2 > 0.45),
}
"""Silhouettes inside the unit disc; the label is the silhouette alone, never colour or texture."""


def make_shape(seed: int, index: int, height: int, width: int) -> Shape:
    """Make image ``index`` of the set ``seed``.

    Args:
        seed: Which set; disjoint seeds give independent images.
        index: Position in the set. Silhouettes and levels take turns, so that every prefix is balanced in them; in
            backgrounds it is not, because two levels have one each and the third has six.
        height: Pixels.
        width: Pixels.
    """
    random = np.random.default_rng((seed, index))
    label, level = index % len(CLASSES), (index // len(CLASSES)) % len(LEVELS)
    mask = _silhouette(random, list(CLASSES.values())[label], height, width)
    colours = _two_colours(random)
    rows = np.arange(height) * TILES_PER_SIDE * BLOCKS_PER_TILE // height
    columns = np.arange(width) * TILES_PER_SIDE * BLOCKS_PER_TILE // width
    if LEVELS[level] == "plain":
        kind, background = "gradient", _gradient(random, height, width)
    else:
        kind, tile = _pattern_tile(random) if LEVELS[level] == "pattern" else ("irregular", _random_tiles(random, 1))
        background = colours[tile[np.ix_(rows % BLOCKS_PER_TILE, columns % BLOCKS_PER_TILE)]]
    # The object's blocks: at the camouflage level in the background's colours and proportions.
    object_colours = colours if LEVELS[level] == "camouflage" else _two_colours(random)
    blocks = _random_tiles(random, TILES_PER_SIDE)
    image = np.where(mask[..., None], object_colours[blocks[np.ix_(rows, columns)]], background)
    return Shape((image * 255).round().astype(np.uint8), mask, label, level, BACKGROUNDS.index(kind))


def _silhouette(
    random: np.random.Generator, inside: Callable[[Coordinates, Coordinates], Mask], height: int, width: int
) -> Mask:
    """Place a silhouette at a random position, size (about a third of the image) and rotation."""
    side = min(height, width)
    radius = random.uniform(0.36, 0.48) * side
    centre_y = random.uniform(radius, height - radius)
    centre_x = random.uniform(radius, width - radius)
    turn = random.uniform(0, 2 * np.pi)
    y, x = np.ogrid[:height, :width]
    u, v = (x + 0.5 - centre_x) / radius, (y + 0.5 - centre_y) / radius
    return inside(np.cos(turn) * u + np.sin(turn) * v, np.cos(turn) * v - np.sin(turn) * u)


def _two_colours(random: np.random.Generator) -> Array:
    """Two colours of clearly different brightness, (2, 3) in 0..1."""
    dark, bright = random.uniform(0.0, 0.45, 3), random.uniform(0.55, 1.0, 3)
    return np.stack([dark, bright]).astype(np.float32)


def _random_tiles(random: np.random.Generator, per_side: int) -> npt.NDArray[np.int64]:
    """``per_side``² different random tiles side by side, each with as many blocks of one colour as of the other."""
    size = BLOCKS_PER_TILE
    order = random.permuted(np.tile(np.arange(size * size) % 2, (per_side * per_side, 1)), axis=1)
    tiles = order.reshape(per_side, per_side, size, size).swapaxes(1, 2)
    return tiles.reshape(per_side * size, per_side * size)


def _gradient(random: np.random.Generator, height: int, width: int) -> Array:
    """Bilinear blend of four random corner colours, (H, W, 3)."""
    corners = random.uniform(0.1, 0.9, (2, 2, 3)).astype(np.float32)
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    x = np.linspace(0, 1, width, dtype=np.float32)[None, :, None]
    top = corners[0, 0] * (1 - x) + corners[0, 1] * x
    bottom = corners[1, 0] * (1 - x) + corners[1, 1] * x
    blend: Array = top * (1 - y) + bottom * y
    return blend


def _pattern_tile(random: np.random.Generator) -> tuple[str, npt.NDArray[np.int64]]:
    """A regular tile of 4×4 blocks of two colours, at a random phase, and its name among :data:`BACKGROUNDS`."""
    i, j = np.indices((BLOCKS_PER_TILE, BLOCKS_PER_TILE))
    tiles = (
        i // 2,
        j // 2,
        (i + j) % 4 // 2,
        (i - j) % 4 // 2,
        (i // 2 + j // 2) % 2,
        ((i < 2) & (j < 2)).astype(np.int64),
    )
    number = random.integers(len(tiles))
    tile = np.roll(tiles[number], tuple(random.integers(0, BLOCKS_PER_TILE, 2)), axis=(0, 1))
    return BACKGROUNDS[1 + number], tile
