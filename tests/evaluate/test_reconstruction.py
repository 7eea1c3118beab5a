"""Reconstructions that need no learning, against slow twins."""

import numpy as np
import pytest
import torch

from hardpatch.evaluate.reconstruction import compare_reconstruction, interpolate
from hardpatch.method.hpm import HPM
from hardpatch.method.vit import patchify

PATCH, GRID = (4, 4), (4, 6)


def model(target):
    torch.manual_seed(0)
    return HPM.create(
        "vit_tiny_patch16_224", image_size=(16, 24), channels=2, patch_size=4, target=target, decoder_dim=32,
        decoder_depth=1, decoder_heads=2, predictor_depth=1,
    )  # fmt: skip


def test_a_plane_is_interpolated_exactly_and_visible_pixels_stay():
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(24.0), indexing="ij")
    images = torch.stack([torch.stack([2 * y - x, 3 * x]), torch.stack([y + 5, x - y])])
    hidden = torch.zeros(24, dtype=torch.bool)
    hidden[[7, 8, 14]] = True  # within the others
    assert torch.allclose(interpolate(images, hidden, PATCH, GRID), images, atol=1e-4)


def test_beyond_the_visible_pixels_the_nearest_counts():
    images = torch.zeros(1, 1, 16, 24)
    images[..., :4] = 7.0
    hidden = torch.ones(24, dtype=torch.bool)
    hidden[::6] = False  # the first column of patches is visible
    assert (interpolate(images, hidden, PATCH, GRID) == 7).all()


@pytest.mark.parametrize("target", ["pixels", "norm_pix"])
def test_losses_are_those_of_a_slow_twin(target):
    hpm, images = model(target), torch.randn(3, 2, 16, 24)
    valid = torch.ones(3, 16, 24, dtype=torch.bool)
    valid[1, :4, :4] = False  # the first patch of the second image
    found = compare_reconstruction(
        hpm.student, hpm.method, images, generator=torch.Generator().manual_seed(1), valid=valid
    )
    hidden = torch.zeros(24, dtype=torch.bool)
    hidden[torch.randperm(24, generator=torch.Generator().manual_seed(1))[: hpm.method.num_hidden]] = True
    filled = interpolate(images, hidden, PATCH, GRID)
    with torch.no_grad():
        made = hpm.student.eval()(images, hidden.expand(3, -1), num_hidden=hpm.method.num_hidden).prediction
    for number in range(3):
        true, between = patchify(images, PATCH)[number], patchify(filled, PATCH)[number]
        own, flat, linear = [], [], []
        for place, patch in enumerate(hidden.nonzero()[:, 0].tolist()):
            if number == 1 and patch == 0:
                continue
            pixels, guess = true[patch], between[patch]
            predicted = made[number, place]
            if target == "norm_pix":
                deviation = (pixels.var() + 1e-6).sqrt()
                wanted = (pixels - pixels.mean()) / deviation
                flat.append(float(wanted.square().mean()))
                linear.append(float(((guess - guess.mean()) / deviation - wanted).square().mean()))
            else:
                wanted = pixels
                flat.append(float((pixels.mean() - pixels).square().mean()))
                linear.append(float((guess - pixels).square().mean()))
            own.append(float((predicted - wanted).square().mean()))
        for losses, twin in zip(found, (own, flat, linear), strict=True):
            assert losses[number] == pytest.approx(np.mean(twin), rel=1e-4)


def test_targets_that_are_no_pixels_have_no_rivals():
    hpm = model("hog")
    assert (
        compare_reconstruction(hpm.student, hpm.method, torch.randn(1, 2, 16, 24), generator=torch.Generator()) is None
    )
