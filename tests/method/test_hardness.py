"""What makes a patch hard, if not its loss: hardness that ignores noise."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hardpatch.config.config import Config
from hardpatch.config.values import with_fields
from hardpatch.figures.hardness import measure_hardness
from hardpatch.method.losses import rank_correlation
from hardpatch.method.method import FullView, MaskedBatch
from hardpatch.method.student import StudentOutput, Teacher
from hardpatch.method.targets.pixels import PixelHardness, PixelTarget
from hardpatch.method.vit import patchify, take
from hardpatch.runs.build import build_method, build_student, build_target
from hardpatch.runs.load import LoadedRun
from hardpatch.runtime.errors import InputError
from tiny import TINY, pretrain, tiny_config

torch.set_num_threads(1)


def measured(hardness, prediction, target, images=None):
    """Of patches that are all decoded."""
    images = torch.zeros(len(target), 3, 8, 8) if images is None else images
    return hardness(prediction, target, images, torch.arange(target.shape[1]).expand(len(target), -1))


@pytest.mark.parametrize(("patch", "block"), [((8, 16), 4), ((8, 8), 8), ((6, 4), 2)])
def test_error_of_blocks_is_the_error_of_pooled_images(patch, block):
    one, other = torch.randn(2, 3, 5, 48, 32)
    expected = F.avg_pool2d(one - other, block).square()
    expected = patchify(expected, (patch[0] // block, patch[1] // block)).mean(dim=-1)
    coarse = measured(PixelHardness(patch, block=block), patchify(one, patch), patchify(other, patch))
    torch.testing.assert_close(coarse, expected)


def test_blocks_of_one_pixel_are_the_loss():
    prediction, target = torch.randn(2, 3, 5, 3 * 8 * 8)
    loss = PixelTarget((8, 8), channels=3, normalise=False).patch_loss(prediction, target)
    torch.testing.assert_close(measured(PixelHardness((8, 8)), prediction, target), loss)


@pytest.mark.parametrize("block", [1, 4])
def test_error_in_pixels_is_that_of_the_reconstruction(block):
    """Of some patches, in two views of each image."""
    target = PixelTarget((8, 8), channels=3, normalise=True)
    images = torch.randn(2, 3, 32, 32) * torch.linspace(0.01, 2, 32)
    index = torch.stack([torch.randperm(16)[:5].sort().values for _ in range(4)])
    wanted = take(target(images), index)
    prediction = torch.randn_like(wanted)
    twice = images.repeat_interleave(2, dim=0)
    pixels = take(patchify(twice, (8, 8)), index)
    everywhere = torch.zeros(4, 16, 192).scatter(1, index.unsqueeze(-1).expand(-1, -1, 192), prediction)
    filled = take(target.to_pixels(everywhere, twice), index)
    expected = measured(PixelHardness((8, 8), block=block), filled, pixels)
    hardness = PixelHardness((8, 8), block=block, in_pixels=True)
    torch.testing.assert_close(hardness(prediction, wanted, images, index), expected, atol=1e-5, rtol=1e-4)


def test_noise_is_hard_by_loss_and_easy_by_the_error_of_blocks():
    """A patch of noise of which nothing was predicted, and one with an edge that was put half as high as it is."""
    torch.manual_seed(0)
    noise = torch.randn(1, 3, 16, 16)
    edge = torch.ones(1, 3, 16, 16)
    edge[..., :8] = -1
    target = patchify(torch.cat([noise, edge], dim=3), (16, 16))
    prediction = target * torch.tensor([0.0, 0.5]).reshape(1, 2, 1)
    loss = PixelTarget((16, 16), channels=3, normalise=True).patch_loss(prediction, target)[0]
    coarse = measured(PixelHardness((16, 16), block=4), prediction, target)[0]
    assert loss[0] > 3 * loss[1]
    assert coarse[1] == pytest.approx(0.25)
    assert coarse[0] < 0.1


CHOICES = [{"hardness_block": 4}, {"hardness_in_pixels": True}, {"hardness_block": 2, "hardness_in_pixels": True}]


def built(**fields):
    """Method and student of a tiny run on norm_pix."""
    config = tiny_config(target="norm_pix", **fields)
    target = build_target(config)
    student = build_student(config, target_dim=target.dim)
    return build_method(config, student, target), student


@pytest.mark.parametrize("fields", CHOICES)
def test_predictor_and_rank_correlation_are_held_against_it_and_the_loss_stays(fields):
    method, _ = built(**fields)
    chosen = PixelHardness(
        (8, 8), block=fields.get("hardness_block", 1), in_pixels=fields.get("hardness_in_pixels", False)
    )
    seen = []
    method = replace(method, predicted_loss=lambda scores, hardness, valid: seen.append(hardness) or scores.sum())
    images = torch.randn(2, 3, 32, 32) * torch.linspace(0.1, 2, 32)
    decoded = torch.arange(method.num_hidden).expand(2, -1)
    target = take(method.target(images), decoded)
    prediction, scores = torch.randn(target.shape, requires_grad=True), torch.randn(target.shape[:2])
    teacher = torch.randn(2, 16)
    hidden = torch.arange(16).expand(2, -1) < method.num_hidden
    batch = MaskedBatch(images, hidden, decoded, None, FullView(torch.randn(2, 17, 32), teacher, teacher))
    losses = method.losses(StudentOutput(prediction, scores, None), batch)
    expected = chosen(prediction.detach(), target, images, decoded)
    torch.testing.assert_close(seen[0], expected)
    assert not seen[0].requires_grad
    torch.testing.assert_close(losses.reconstruction, (prediction - target).square().mean())
    agreement = rank_correlation(teacher[:, : method.num_hidden], expected).mean()
    torch.testing.assert_close(losses.rank_correlation, agreement)


def test_figures_show_what_the_predictor_is_held_against():
    method, student = built(hardness_block=4)
    images = torch.randn(2, 3, 32, 32)
    shown = [
        measure_hardness(
            student, Teacher(student), replace(method, hardness=hardness), images, share=0.5,
            generator=torch.Generator().manual_seed(0),
        )
        for hardness in (method.hardness, None)
    ]  # fmt: skip
    assert torch.equal(shown[0].true_loss, shown[1].true_loss)
    assert shown[1].hardness is shown[1].true_loss
    assert (shown[0].hardness < shown[0].true_loss).all(), "means of 16 pixels of noise are nearer to 0 than the pixels"


@pytest.mark.parametrize("fields", CHOICES)
def test_a_run_mines_by_it(tmp_path, fields):
    values = TINY | {"target": "norm_pix"} | fields
    pretrain(values.pop("data"), tmp_path / "run", **values)
    hardness = LoadedRun(tmp_path / "run").method.hardness
    chosen = fields.get("hardness_block", 1), fields.get("hardness_in_pixels", False)
    assert (hardness.block, hardness.in_pixels) == chosen


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target": "hog", "hardness_block": 4}, "hardness_block: must be 1 with target 'hog'"),
        (
            {"mask": "random", "predicted_loss": "none", "hardness_block": 4},
            "hardness_block: with predicted_loss 'none'",
        ),
        ({"hardness_block": 0}, "hardness_block"),
        ({"hardness_in_pixels": True}, "hardness_in_pixels: goes with target 'norm_pix' .* got target 'pixels'"),
        (
            {"mask": "random", "predicted_loss": "none", "target": "norm_pix", "hardness_in_pixels": True},
            "predicted_loss 'none'",
        ),
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


def test_under_norm_pix_a_whole_patch_has_no_mean():
    config = tiny_config(hardness_block=8)
    build_method(config, build_student(config, target_dim=192))
    normalised = tiny_config(hardness_block=8, target="norm_pix")
    student = build_student(normalised, target_dim=192)
    with pytest.raises(InputError, match="hardness_block: must be smaller than a patch"):
        build_method(normalised, student)
