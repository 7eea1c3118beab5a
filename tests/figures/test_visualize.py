"""Figures show what the run does: its own masks, guided as it guides them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hardpatch.config.config import Config
from hardpatch.config.values import with_fields
from hardpatch.data.images.decode import Decoder
from hardpatch.data.sources import open_source
from hardpatch.figures.display import Display, hatched
from hardpatch.figures.hardness import Hardness, draw_hardness, measure_hardness, spread_images
from hardpatch.method.choices import MASKS
from hardpatch.method.losses import rank_correlation
from hardpatch.method.student import Teacher
from hardpatch.method.vit import class_attention
from hardpatch.runs.build import build_method, build_normalise, build_student
from hiding import hide
from tiny import TINY


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("predicted_loss", ["relative", "none"])
def test_the_figure_shows_a_mask_of_the_runs_own_kind(mask, predicted_loss):
    if MASKS[mask].guide == "predicted_loss" and predicted_loss == "none":
        pytest.skip("no such run")
    config = with_fields(Config(), TINY | {"mask": mask, "predicted_loss": predicted_loss})
    student = build_student(config)
    teacher, method, seen = Teacher(student), build_method(config, student), []
    images = torch.randn(2, 3, 32, 32)

    def remember(given):
        seen.append((given.scores, given.noise))
        assert given.valid is None
        return method.mask_policy(given)

    hardness = measure_hardness(
        student, teacher, replace(method, mask_policy=remember), images, share=0.5,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    ((guide, noise),) = seen
    expected = {"predicted_loss": teacher.predict_loss, "attention": lambda i: class_attention(student.encoder, i)}
    if method.guide is not None:
        assert torch.equal(guide, expected[method.guide](images))
    hidden = hide(mask, guide, noise, num_hidden=12, num_hard=6, grid=(4, 4))
    assert torch.equal(hardness.hidden, hidden)
    assert (hardness.predicted_loss is None) == (predicted_loss == "none")


def test_what_is_no_data_is_not_mined_not_counted_and_hatched(tmp_path):
    """A third of the width holds the value that means no data."""
    for number in range(4):
        values = np.random.default_rng(number).integers(1, 255, (32, 32, 3), dtype=np.uint8)
        values[:, 20:] = 0
        np.save(tmp_path / f"{number}.npy", values)
    config = with_fields(Config(), TINY | {"mask": "hard", "predicted_loss": "relative", "hard_share_end": 1.0})
    source = open_source(str(tmp_path), decoder=Decoder(no_data=0), image_size=(32, 32))
    pixels, valid = spread_images(source, 4, (32, 32))
    assert valid.sum().item() == 4 * 32 * 20
    student = build_student(config)
    teacher, method, normalise = Teacher(student), build_method(config, student), build_normalise(config)
    hardness = measure_hardness(
        student, teacher, replace(method, num_hidden=6), normalise(pixels), share=1.0,
        generator=torch.Generator().manual_seed(0), valid=valid,
    )  # fmt: skip
    there = hardness.whole.reshape(4, 4, 4)
    assert there[:, :, :2].all()
    assert not there[:, :, 2:].any()  # the third column of patches is data in half of its width
    # Half of the patches are whole, so half of the 6 that are hidden are chosen by predicted loss: the hardest.
    hardest = hardness.predicted_loss.masked_fill(~hardness.whole, -torch.inf).topk(3, dim=1).indices
    assert hardness.hidden.gather(1, hardest).all()
    both = (hardness.predicted_loss[hardness.whole].reshape(4, 8), hardness.true_loss[hardness.whole].reshape(4, 8))
    assert hardness.rank_correlation == pytest.approx(float(rank_correlation(*both).mean()), abs=1e-5)
    figure = draw_hardness(normalise(pixels), hardness, Display(normalise), (4, 4), "title", valid)
    assert "hatched: no data" in figure.get_suptitle()
    image, loss = (axis.images[0].get_array() for axis in figure.axes[:2])
    assert set(np.unique(image[:, 20:])) == {120, 190}
    assert np.ma.getmaskarray(np.ma.masked_invalid(loss))[:, 2:].all()
    assert np.isfinite(loss[:, :2]).all()


def test_pictures_without_holes_are_not_touched():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    assert hatched(pictures, None) is pictures
    valid = torch.ones(2, 8, 8, dtype=torch.bool)
    valid[1, 0, 0] = False
    changed = (hatched(pictures, valid) != pictures).any(axis=3)
    assert changed.sum() == 1
    assert changed[1, 0, 0]


@pytest.mark.parametrize(("agreement", "alpha"), [(1.0, 1.0), (0.0, 0.15)])
def test_predictions_that_do_not_agree_are_pale_and_both_maps_have_one_scale(agreement, alpha):
    true = torch.arange(16.0).repeat(2, 1)
    noise = torch.stack([torch.arange(16.0).roll(1), torch.arange(15.0, -1, -1).roll(1)])
    predicted = true if agreement else noise
    hidden, images = torch.zeros(2, 16, dtype=torch.bool), torch.zeros(2, 3, 8, 8)
    hardness = Hardness(true, true, 100 * predicted, hidden, None, reduction=2)
    figure = draw_hardness(images, hardness, Display(build_normalise(with_fields(Config(), TINY))), (4, 4), "title")
    loss, guess = (axis.images[0] for axis in figure.axes[1:3])
    assert (loss.get_alpha(), guess.get_alpha()) == (1.0, pytest.approx(alpha))
    assert loss.get_clim() == guess.get_clim()
    assert figure.axes[2].get_title().startswith("predicted loss,\n2 x 2")
    assert ("pale: agrees little" in figure.axes[2].get_title()) == (alpha < 1)
    if agreement:
        np.testing.assert_allclose(loss.get_array(), guess.get_array(), rtol=1e-5)  # though in other units
