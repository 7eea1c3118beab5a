"""The embedded synthetic set: what it promises to a reader of an experiment on it."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from hardpatch.data.sources.drawn_shapes import (
    BACKGROUNDS,
    BLOCKS_PER_TILE,
    CLASSES,
    LEVELS,
    TILES_PER_SIDE,
    make_shape,
)

PLAIN, PATTERN, CAMOUFLAGE = range(len(LEVELS))
ROUND = len(CLASSES) * len(LEVELS)
"""Images after which every class has been seen once at every level."""


def shapes(level, *, count=48, size=(64, 64), seed=0):
    """The first ``count`` images of one level."""
    indices = [i for i in range(count * len(LEVELS)) if i // len(CLASSES) % len(LEVELS) == level]
    made = [make_shape(seed, i, *size) for i in indices[:count]]
    assert all(shape.level == level for shape in made)
    return made


def per_patch(array, patch):
    """(H, W, ...) -> (N, patch * patch, ...)."""
    height, width = array.shape[0] // patch, array.shape[1] // patch
    cut = array.reshape(height, patch, width, patch, *array.shape[2:]).swapaxes(1, 2)
    return cut.reshape(height * width, patch * patch, *array.shape[2:])


def test_an_image_is_a_function_of_seed_and_index():
    for index in range(ROUND):
        one, again = make_shape(3, index, 32, 48), make_shape(3, index, 32, 48)
        assert np.array_equal(one.image, again.image)
        assert np.array_equal(one.mask, again.mask)


def test_other_seeds_and_indices_give_other_images():
    images = [make_shape(seed, index, 32, 32).image.tobytes() for seed in range(3) for index in range(ROUND)]
    assert len(set(images)) == 3 * ROUND


def test_neighbouring_seeds_and_indices_do_not_share_images():
    """(0, 1) and (1, 0) must not be the same stream, nor (seed, index) a sum."""
    masks = {(s, i): make_shape(s, i, 64, 64).mask for s in range(3) for i in (0, ROUND, 2 * ROUND)}
    assert len({mask.tobytes() for mask in masks.values()}) == len(masks)


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (97, 41), (8, 8), (224, 160)])
def test_any_size(size):
    for index in range(ROUND):
        shape = make_shape(0, index, *size)
        assert shape.image.shape == (*size, 3)
        assert shape.image.dtype == np.uint8
        assert shape.mask.shape == size
        assert shape.mask.dtype == bool


def test_classes_and_levels_are_balanced():
    made = [make_shape(0, i, 16, 16) for i in range(2 * ROUND)]
    pairs = np.zeros((len(CLASSES), len(LEVELS)), int)
    for shape in made:
        pairs[shape.label, shape.level] += 1
    assert (pairs == 2).all()


@pytest.mark.parametrize("size", [(64, 64), (64, 128)])
def test_object_covers_a_sane_share_and_never_leaves_the_image(size):
    for index in range(4 * ROUND):
        mask = make_shape(0, index, *size).mask
        assert 0.03 < mask.mean() < 0.55
    mean = np.mean([make_shape(0, i, 64, 64).mask.mean() for i in range(4 * ROUND)])
    assert 0.15 < mean < 0.4


def test_silhouette_alone_carries_the_class():
    """The object is as large at every level, and its place says nothing about its class."""
    for level in range(len(LEVELS)):
        share = np.mean([shape.mask.mean() for shape in shapes(level)])
        assert 0.15 < share < 0.4
    centres = np.array([np.argwhere(shape.mask).mean(0) for shape in shapes(PLAIN, count=96)])
    assert np.abs(centres.mean(0) - 31.5).max() < 4


def test_camouflage_hides_brightness_and_contrast():
    """Object and background have the same mean and variance, up to the cut at the silhouette's edge."""
    mean_gap, deviation_gap = [], []
    for shape in shapes(CAMOUFLAGE, count=96):
        grey = shape.image.mean(-1) / 255
        inside, outside = grey[shape.mask], grey[~shape.mask]
        contrast = grey.max() - grey.min()
        mean_gap.append((inside.mean() - outside.mean()) / contrast)
        deviation_gap.append((inside.std() - outside.std()) / contrast)
    assert abs(np.mean(mean_gap)) < 0.01
    assert np.abs(mean_gap).max() < 0.12
    assert abs(np.mean(deviation_gap)) < 0.01


def test_camouflage_has_as_many_edges_inside_as_outside():
    inside, outside = [], []
    for shape in shapes(CAMOUFLAGE, count=96, size=(64, 64)):
        grey = shape.image.mean(-1)
        edges = np.abs(np.diff(grey, axis=1))[:, 1::2] > 1  # blocks are 2 pixels wide
        both = (shape.mask[:, 1:] & shape.mask[:, :-1])[:, 1::2]
        neither = (~shape.mask[:, 1:] & ~shape.mask[:, :-1])[:, 1::2]
        inside.append(edges[both].mean())
        outside.append(edges[neither].mean())
    assert abs(np.mean(inside) - np.mean(outside)) < 0.06


def variance_auroc(level, *, size, patch):
    """How well patch variance tells object patches from background, mean over images."""
    scores = []
    for shape in shapes(level, size=size):
        variance = per_patch(shape.image / 255, patch).var(axis=1).sum(-1)
        share = per_patch(shape.mask, patch).mean(1)
        clear = (share == 0) | (share == 1)
        if len(set(share[clear])) == 2:
            scores.append(roc_auc_score(share[clear] == 1, variance[clear]))
    assert len(scores) > 20
    return np.mean(scores)


@pytest.mark.parametrize(("size", "patch"), [((64, 64), 8), ((112, 112), 8), ((96, 128), 8)])
def test_patch_variance_finds_the_plain_object_but_not_the_camouflaged(size, patch):
    assert variance_auroc(PLAIN, size=size, patch=patch) > 0.9
    assert 0.35 < variance_auroc(CAMOUFLAGE, size=size, patch=patch) < 0.6


@pytest.mark.parametrize("level", [PATTERN, CAMOUFLAGE])
@pytest.mark.parametrize("size", [(64, 64), (96, 32)])
def test_background_repeats_with_the_tile_and_the_object_does_not(level, size):
    repeated = []
    for shape in shapes(level, size=size, count=32):
        image, mask = shape.image.astype(int), shape.mask
        for axis, period in enumerate(length // TILES_PER_SIDE for length in size):
            ahead, mask_ahead = np.roll(image, -period, axis), np.roll(mask, -period, axis)
            same = (image == ahead).all(-1)
            assert same[~mask & ~mask_ahead].all()
            if (both := mask & mask_ahead).sum() > 50:
                repeated.append(same[both].mean())
    assert len(repeated) > 20
    assert 0.4 < np.mean(repeated) < 0.6
    assert max(repeated) < 1


def test_pattern_background_is_busy():
    """Unlike the plain level's gradient: so variance alone does not find the object."""
    for shape in shapes(PATTERN):
        background = shape.image[~shape.mask]
        assert len(np.unique(background, axis=0)) == 2


def test_object_has_two_colours_and_camouflage_shares_them_with_its_background():
    for level in range(len(LEVELS)):
        for shape in shapes(level, count=16):
            colours = {tuple(colour) for colour in np.unique(shape.image[shape.mask], axis=0)}
            assert len(colours) == 2
            behind = {tuple(colour) for colour in np.unique(shape.image[~shape.mask], axis=0)}
            assert (colours == behind) == (level == CAMOUFLAGE)


def test_tile_is_balanced_at_the_camouflage_level():
    """Exactly half of a tile has each colour: no patch of the background is brighter than another."""
    for shape in shapes(CAMOUFLAGE, size=(64, 64)):
        grey = shape.image.mean(-1)
        tiles = per_patch(grey, 2 * BLOCKS_PER_TILE)
        means = tiles.mean(1)
        assert np.ptp(means[per_patch(~shape.mask, 2 * BLOCKS_PER_TILE).all(1)]) < 1e-9
        assert np.ptp(means[per_patch(shape.mask, 2 * BLOCKS_PER_TILE).all(1)]) < 1e-9


def test_a_background_is_what_its_label_says_at_any_size():
    """The tile is found again in the corner of images whose object leaves it free."""
    regular = {
        "rows": lambda tile: (tile == tile[:, :1]).all(),
        "columns": lambda tile: (tile == tile[:1]).all(),
        "antidiagonal": lambda tile: (np.roll(tile, (1, -1), (0, 1)) == tile).all(),
        "diagonal": lambda tile: (np.roll(tile, (1, 1), (0, 1)) == tile).all(),
        "checks": lambda tile: (np.roll(tile, (2, 2), (0, 1)) == tile).all() and tile.mean() == 0.5,
        "dots": lambda tile: tile.mean() in (0.25, 0.75),
    }
    seen = set()
    for number in range(360):
        shape = make_shape(3, number, 32, 32)
        assert shape.background == make_shape(3, number, 8, 8).background
        if BACKGROUNDS[shape.background] in regular and not shape.mask[:4, :4].any():
            tile = shape.image[:4, :4].sum(2)
            tile = (tile == tile.max()).astype(int)
            seen.add(BACKGROUNDS[shape.background])
            fitting = {name for name, fits in regular.items() if fits(tile)}
            assert BACKGROUNDS[shape.background] in fitting
            assert not fitting & {"rows", "columns"} - {BACKGROUNDS[shape.background]}
    assert seen == set(regular)
