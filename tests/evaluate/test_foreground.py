"""Foreground figures on cases that can be worked out by hand, and the measures against loops."""

import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from timm.models import save_for_hf

from hardpatch.config.config import Config
from hardpatch.config.evaluations import ForegroundConfig
from hardpatch.config.values import with_fields
from hardpatch.evaluate import foreground
from hardpatch.evaluate.foreground import (
    edge_density,
    find_in_images,
    foreground_patches,
    mean_finding,
    measure_patches,
    patch_variance,
)
from hardpatch.method.student import Teacher
from hardpatch.method.vit import class_attention, create_encoder, has_class_attention
from hardpatch.runs.build import build_method, build_normalise, build_student
from hardpatch.runtime.errors import InputError
from random_run import random_run
from tiny import TINY

torch.set_num_threads(1)
FOREGROUND = np.array([[True, True, False, False], [False, False, True, True]])
SCORES = np.array([[4.0, 3.0, 2.0, 1.0], [0.1, 0.2, 0.3, 0.4]])


def find(scores, foreground):
    """The figures that need no boxes."""
    return mean_finding(find_in_images(scores, foreground))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_perfect_scores():
    """The second image's scores are all below the first's: only the order within an image counts."""
    assert find(SCORES, FOREGROUND) == (1, 1, 1)


def test_inverted_scores():
    auroc, precision, pointing = find(-SCORES, FOREGROUND)
    assert (auroc, pointing) == (0, 0)
    assert precision == pytest.approx((1 / 3 + 2 / 4) / 2)  # the two foreground patches come third and fourth


def test_a_mixed_case_by_hand():
    foreground = np.array([[True, False, True, False, False]])
    auroc, precision, pointing = find(np.array([[5.0, 4.0, 3.0, 2.0, 1.0]]), foreground)
    assert auroc == pytest.approx(5 / 6)  # of six pairs one, (third, second), is in the wrong order
    assert precision == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert pointing == 1


def test_figures_are_means_over_images():
    found = find(SCORES * np.array([[1.0], [-1.0]]), FOREGROUND)
    assert (found.auroc, found.pointing_game) == (0.5, 0.5)
    assert found.average_precision == pytest.approx((1 + (1 / 3 + 2 / 4) / 2) / 2)


def test_random_scores_find_nothing():
    generator = np.random.default_rng(0)
    foreground = np.zeros((150, 100), dtype=bool)
    foreground[:, :25] = True
    found = find(generator.random((150, 100)), foreground)
    assert found.auroc == pytest.approx(0.5, abs=0.02)
    assert found.average_precision == pytest.approx(0.27, abs=0.03)
    assert found.pointing_game == pytest.approx(0.25, abs=0.1)


def test_images_without_contrast_are_left_out():
    scores, foreground = np.vstack([SCORES, -SCORES]), np.vstack([FOREGROUND, np.ones((2, 4), dtype=bool)])
    foreground[3] = False
    assert find(scores, foreground) == (1, 1, 1)
    assert all(math.isnan(figure) for figure in find(scores[2:], foreground[2:]))


def test_a_patch_is_foreground_when_more_than_half_of_it_is():
    masks = torch.zeros(2, 4, 6, dtype=torch.bool)  # two rows and two columns of patches of 2 x 3 pixels
    masks[0, 0, :3] = True  # exactly half of patch 0
    masks[0, :2, 3:5] = True  # four of six pixels of patch 1
    masks[1, 2:, :3] = True  # all of patch 2
    masks[1, 3, 5] = True  # one pixel of patch 3
    assert foreground_patches(masks, (2, 3)).tolist() == [
        [False, True, False, False],
        [False, False, True, False],
    ]


def patches_of(images, patch):
    """(image, patch number, channels first pixels) of every patch, by slicing."""
    columns = images.shape[-1] // patch[1]
    for b, image in enumerate(images.double().numpy()):
        for n in range(columns * (images.shape[-2] // patch[0])):
            top, left = n // columns * patch[0], n % columns * patch[1]
            yield b, n, image[:, top : top + patch[0], left : left + patch[1]]


@pytest.mark.parametrize(("patch", "channels"), [((4, 4), 3), ((2, 6), 1)])
def test_patch_variance_equals_a_loop(patch, channels):
    images = torch.rand(2, channels, 8, 12)
    images[:, 0] += 5  # the channels' different means are no variance
    actual = patch_variance(images, patch)
    assert actual.shape == (2, 96 // (patch[0] * patch[1]))
    for b, n, pixels in patches_of(images, patch):
        expected = np.mean([channel.var(ddof=1) for channel in pixels])
        assert actual[b, n].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("patch", "channels"), [((4, 4), 3), ((2, 6), 1)])
def test_edge_density_equals_a_loop(patch, channels):
    images = torch.rand(2, channels, 8, 12)
    grey = images.double().mean(dim=1).numpy()
    magnitude = np.zeros((2, 1, 8, 12))
    for b, y, x in np.ndindex(2, 8, 12):
        down = grey[b, y + 1, x] - grey[b, y, x] if y < 7 else 0
        right = grey[b, y, x + 1] - grey[b, y, x] if x < 11 else 0
        magnitude[b, 0, y, x] = math.hypot(down, right)
    actual = edge_density(images, patch)
    for b, n, pixels in patches_of(torch.from_numpy(magnitude), patch):
        assert actual[b, n].item() == pytest.approx(pixels.mean(), rel=1e-4)


def test_edges_are_where_the_edge_is():
    images = torch.zeros(1, 3, 8, 8)
    images[..., 6:] = 1  # a vertical edge inside the right column of patches
    assert edge_density(images, (4, 4))[0].tolist() == [0, 0.25, 0, 0.25]


@pytest.mark.parametrize(
    ("name", "num_prefix"),
    [
        ("vit_tiny_patch16_224", 1),
        ("deit_tiny_distilled_patch16_224", 2),
        ("vit_small_patch14_reg4_dinov2", 5),
    ],
)
def test_class_attention_equals_a_loop_and_timm(name, num_prefix):
    torch.manual_seed(0)
    patch = 14 if "patch14" in name else 16
    vit = create_encoder(name, image_size=(3 * patch, 2 * patch), width=16, depth=3, heads=2).eval()
    images, last, caught = torch.randn(2, 3, 3 * patch, 2 * patch), vit.blocks[-1], {}
    actual = class_attention(vit, images)
    last.attn.fused_attn = False
    last.attn.attn_drop.register_forward_hook(lambda module, args, output: caught.update(timm=args[0]))
    last.norm1.register_forward_hook(lambda module, args, output: caught.update(tokens=output))
    with torch.no_grad():
        vit.forward_features(images)
        qkv = last.attn.qkv(caught["tokens"]).double()
    assert vit.num_prefix_tokens == num_prefix
    torch.testing.assert_close(actual, caught["timm"].mean(dim=1)[:, 0, num_prefix:])
    for b in range(2):
        expected = np.zeros(6)
        for head in range(2):
            query, key = (qkv[b, :, part * 16 + head * 8 : part * 16 + head * 8 + 8].numpy() for part in (0, 1))
            weights = np.exp([query[0] @ key[t] / math.sqrt(8) for t in range(num_prefix + 6)])
            expected += (weights / weights.sum())[num_prefix:] / 2
        np.testing.assert_allclose(actual[b].numpy(), expected, rtol=1e-4)
    assert not torch.allclose(actual, actual[:, :1].expand(-1, 6), rtol=1e-2)


@pytest.mark.parametrize(
    ("name", "supported"),
    [
        ("vit_tiny_patch16_224", True),
        ("vit_small_patch16_18x2_224", False),  # two attentions side by side
        ("vit_base_patch16_xp_224", False),  # attention and MLP in one product; no class token either
        ("vit_wee_patch16_reg1_gap_256", False),  # no class token
    ],
)
def test_encoders_without_a_plain_last_block_have_no_attention_measure(name, supported):
    config = with_fields(Config(), TINY | {"encoder": name})
    student = build_student(config)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    measured = measure_patches(
        student, Teacher(student), build_method(config, student), build_normalise(config), images,
        generator=torch.Generator(), bf16=False,
    )  # fmt: skip
    assert has_class_attention(student.encoder) == supported
    assert (measured["attention"] is not None) == supported
    assert measured["predicted_loss"] is not None
    if not supported:
        with pytest.raises(ValueError, match="class token and a plain last block"):
            class_attention(student.encoder, torch.zeros(2, 3, 32, 32))


def test_figures_equal_scikit_learns_also_with_ties():
    from sklearn.metrics import average_precision_score, roc_auc_score

    generator = np.random.default_rng(3)
    scores = generator.integers(0, 6, (40, 30)).astype(float)
    foreground = generator.random((40, 30)) < 0.3
    found = find(scores, foreground)
    assert found.auroc == pytest.approx(np.mean([roc_auc_score(f, s) for f, s in zip(foreground, scores)]))
    assert found.average_precision == pytest.approx(
        np.mean([average_precision_score(f, s) for f, s in zip(foreground, scores)])
    )


# Other models beside the run


def test_the_same_images_by_other_models(tmp_path):
    """Another run measures everything, timm's weights their attention; a run beside itself is itself."""
    here, other = (
        random_run(tmp_path / "here"),
        random_run(tmp_path / "other", image_size=64, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2)),
    )
    sizes = {"img_size": 48, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes)
    model.pretrained_cfg.update(input_size=(3, 48, 48), num_classes=5)
    save_for_hf(model, tmp_path / "vit", model_args=sizes, safe_serialization=True)
    against = (str(here), str(other), f"timm:local-dir:{tmp_path / 'vit'}")
    config = ForegroundConfig(str(here), "shapes:24", against=against, device="cpu")
    result = foreground.run(config)
    assert list(result.others) == ["untrained", *against]
    assert result.others[against[0]] == result.measures
    assert result.others["untrained"]["predicted_loss"] != result.measures["predicted_loss"]
    assert result.others["untrained"]["patch_variance"] == result.measures["patch_variance"]
    alone = foreground.run(replace(config, checkpoint=str(other), against=(), untrained=False))
    assert result.others[against[1]] == alone.measures, "at its own size and normalisation"
    known = {name for name, finding in result.others[against[2]].items() if finding is not None}
    assert known == {"attention"}
    assert result.figures()["others"]["untrained"]["attention"]["auroc"] > 0
    assert alone.others == {}


def test_another_model_that_is_none_is_refused_before_anything_is_measured(tmp_path):
    run = random_run(tmp_path / "here")
    with pytest.raises(InputError, match=r"against: .*nowhere.* does not exist"):
        foreground.run(ForegroundConfig(str(run), "shapes:24", against=(str(tmp_path / "nowhere"),), device="cpu"))
