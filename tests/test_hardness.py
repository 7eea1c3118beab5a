"""What makes a patch hard, if not its loss: hardness that ignores noise."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hpm.build import build_method, build_student, build_target
from hpm.config import Config, with_fields
from hpm.errors import InputError
from hpm.method import StudentOutput, Teacher, rank_correlation
from hpm.targets import CoarseError, PixelTarget
from hpm.visualize import measure_hardness
from hpm.vit import patchify, take
from tiny import tiny_config

torch.set_num_threads(1)


@pytest.mark.parametrize(("patch", "block"), [((8, 16), 4), ((8, 8), 8), ((6, 4), 2)])
def test_coarse_error_is_the_error_of_pooled_images(patch, block):
    one, other = torch.randn(2, 3, 5, 48, 32)
    expected = F.avg_pool2d(one - other, block).square()
    expected = patchify(expected, (patch[0] // block, patch[1] // block)).mean(dim=-1)
    measured = CoarseError(patch, block=block)(patchify(one, patch), patchify(other, patch))
    torch.testing.assert_close(measured, expected)


def test_blocks_of_one_pixel_are_the_loss():
    prediction, target = torch.randn(2, 3, 5, 3 * 8 * 8)
    loss = PixelTarget((8, 8), channels=3, normalise=False).patch_loss(prediction, target)
    torch.testing.assert_close(CoarseError((8, 8), block=1)(prediction, target), loss)


def test_noise_is_hard_by_loss_and_easy_by_coarse_error():
    """A patch of noise of which nothing was predicted, and one with an edge that was put half as high as it is."""
    torch.manual_seed(0)
    noise = torch.randn(1, 3, 16, 16)
    edge = torch.ones(1, 3, 16, 16)
    edge[..., :8] = -1
    target = patchify(torch.cat([noise, edge], dim=3), (16, 16))
    prediction = target * torch.tensor([0.0, 0.5]).reshape(1, 2, 1)
    loss = PixelTarget((16, 16), channels=3, normalise=True).patch_loss(prediction, target)[0]
    coarse = CoarseError((16, 16), block=4)(prediction, target)[0]
    assert loss[0] > 3 * loss[1]
    assert coarse[1] == pytest.approx(0.25)
    assert coarse[0] < 0.1


def _step(**fields):
    config = tiny_config(target="norm_pix", hardness_block=4, **fields)
    target = build_target(config)
    student = build_student(config, target_dim=target.dim)
    return build_method(config, student, target), student


def test_the_predictor_learns_the_coarse_error_and_the_loss_stays():
    method, _ = _step()
    seen = []
    method = replace(method, predicted_loss=lambda scores, hardness, valid: seen.append(hardness) or scores.sum())
    images = torch.randn(2, 3, 32, 32)
    decoded = torch.arange(method.num_hidden).expand(2, -1)
    target = take(method.target(images), decoded)
    prediction, scores = torch.randn(target.shape, requires_grad=True), torch.randn(target.shape[:2])
    losses = method.losses(StudentOutput(prediction, scores, None), images, decoded, torch.randn(2, 16))
    coarse = CoarseError((8, 8), block=4)(prediction.detach(), target)
    torch.testing.assert_close(seen[0], coarse)
    assert not seen[0].requires_grad
    torch.testing.assert_close(losses.reconstruction, (prediction - target).square().mean())


def test_the_rank_correlation_is_that_with_the_coarse_error():
    method, _ = _step()
    images = torch.randn(2, 3, 32, 32)
    decoded = torch.arange(method.num_hidden).expand(2, -1)
    target = take(method.target(images), decoded)
    prediction, teacher = torch.randn(target.shape), torch.randn(2, 16)
    losses = method.losses(StudentOutput(prediction, None, None), images, decoded, teacher)
    expected = rank_correlation(teacher[:, : method.num_hidden], CoarseError((8, 8), block=4)(prediction, target))
    torch.testing.assert_close(losses.rank_correlation, expected.mean())


def test_figures_show_what_the_predictor_is_held_against():
    method, student = _step()
    images = torch.randn(2, 3, 32, 32)
    shown = {
        block: measure_hardness(
            student, Teacher(student), replace(method, coarse_error=error), images, share=0.5,
            generator=torch.Generator().manual_seed(0),
        ).true_loss
        for block, error in ((4, method.coarse_error), (1, None))
    }  # fmt: skip
    assert (shown[4] < shown[1]).all(), "means of 16 pixels of noise are nearer to 0 than the pixels"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target": "hog", "hardness_block": 4}, "hardness_block: must be 1 with target 'hog'"),
        (
            {"mask": "random", "predicted_loss": "none", "hardness_block": 4},
            "hardness_block: with predicted_loss 'none'",
        ),
        ({"hardness_block": 0}, "hardness_block"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, said):
    with pytest.raises(InputError, match=said):
        with_fields(Config(), fields)


def test_blocks_must_divide_a_patch():
    config = tiny_config(hardness_block=3)
    student = build_student(config, target_dim=192)
    with pytest.raises(InputError, match="hardness_block: must divide a patch of 8x8 pixels, got 3"):
        build_method(config, student)
