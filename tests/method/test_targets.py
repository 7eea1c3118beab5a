"""Targets made of the image or the teacher: HOG against scikit-image, features, and that every target trains."""

import itertools

import numpy as np
import pytest
import timm
import torch
from skimage.feature import hog
from timm.models import save_for_hf
from torch._subclasses.fake_tensor import FakeTensorMode

from hardpatch.config.config import Config
from hardpatch.config.values import with_fields
from hardpatch.figures.display import Display
from hardpatch.figures.hardness import draw_hardness, measure_hardness, visualize
from hardpatch.method.student import Teacher
from hardpatch.method.targets.hog import HogTarget, cell_histograms
from hardpatch.method.targets.pixels import PixelTarget
from hardpatch.method.targets.target import FittedTarget, Target, feature_loss
from hardpatch.method.targets.teacher import EmaFeatureTarget
from hardpatch.method.vit import create_encoder, patchify
from hardpatch.runs.build import build_method, build_student, build_target
from hardpatch.runs.load import LoadedRun
from hardpatch.runtime.log import read_metrics
from tiny import TINY, final_state, pretrain

torch.set_num_threads(1)


def some_images(*shape, kind="random"):
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if kind == "smooth":
        images = torch.nn.functional.avg_pool2d(images, 5, stride=1, padding=2)
    if kind == "pixels":  # exact multiples of 45 degrees, many exact zeros
        images = (images * 3).round()
    return images


def slow_hog(image, cell):
    """(rows, columns, channels, 9) of an image (C, H, W)."""
    channels = [
        hog(channel.numpy(), orientations=9, pixels_per_cell=cell, cells_per_block=(1, 1), block_norm="L2",
            feature_vector=False)[:, :, 0, 0]
        for channel in image
    ]  # fmt: skip
    return np.stack(channels, axis=2)


@pytest.mark.parametrize("kind", ["random", "smooth", "pixels", "constant"])
@pytest.mark.parametrize(
    ("size", "cell", "channels"),
    [((32, 48), (8, 8), 3), ((42, 28), (14, 14), 1), ((24, 36), (8, 12), 5), ((15, 25), (5, 5), 2)],
)
def test_cell_histograms_equal_skimage(size, cell, channels, kind):
    images = some_images(2, channels, *size, kind=kind) if kind != "constant" else torch.full((2, channels, *size), 3.0)
    found = cell_histograms(images, cell).unflatten(1, (channels, 9)).permute(0, 3, 4, 1, 2)
    for image, histograms in zip(images, found, strict=True):
        np.testing.assert_allclose(histograms.numpy(), slow_hog(image, cell), atol=1e-5)


@pytest.mark.parametrize(("patch", "cell"), [((16, 16), (8, 8)), ((14, 14), (14, 14)), ((12, 16), (12, 8))])
def test_hog_target_gathers_the_cells_of_each_patch(patch, cell):
    images = some_images(2, 3, 2 * patch[0], 3 * patch[1])
    target = HogTarget(patch, channels=3)
    found = target(images)
    assert found.shape == (2, 6, target.dim)
    for image, descriptors in zip(images, found, strict=True):
        cells = slow_hog(image, cell)
        high, wide = patch[0] // cell[0], patch[1] // cell[1]
        for number, (row, column) in enumerate(itertools.product(range(2), range(3))):
            expected = cells[row * high : (row + 1) * high, column * wide : (column + 1) * wide]
            np.testing.assert_allclose(descriptors[number], expected.ravel(), atol=1e-5)


def test_hog_stays_float32_under_autocast():
    target, images = HogTarget((8, 8), channels=3), some_images(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = target(images)
        loss = target.patch_loss(found.bfloat16(), found)
    assert torch.equal(found, target(images))
    assert loss.dtype == torch.float32


def test_hog_loss_is_the_mean_squared_error():
    prediction, target = torch.randn(2, 3, 27), torch.randn(2, 3, 27)
    loss = HogTarget((5, 5), channels=3).patch_loss(prediction, target)
    assert loss[1, 2].item() == pytest.approx(np.mean((prediction[1, 2] - target[1, 2]).numpy() ** 2), rel=1e-5)


def test_ema_features_are_the_teachers_patch_tokens():
    encoder = create_encoder(
        "vit_small_patch14_reg4_dinov2", image_size=(28, 42), width=16, depth=1, heads=2
    ).eval()  # five prefix tokens
    target = EmaFeatureTarget(encoder)
    assert target.dim == 16
    assert target.needs_teacher
    images = some_images(2, 3, 28, 42)
    tokens = encoder.forward_features(images)
    assert torch.equal(target(images, tokens), tokens[:, 5:])
    with pytest.raises(ValueError, match="features=None"):
        target(images)


def test_feature_loss_equals_numpy():
    prediction, target = torch.randn(2, 3, 8), 10 * torch.randn(2, 3, 8)
    loss = feature_loss(prediction, target)
    for b, m in itertools.product(range(2), range(3)):
        a, c = prediction[b, m].numpy(), target[b, m].numpy()
        expected = np.sum((a / np.linalg.norm(a) - c / np.linalg.norm(c)) ** 2)
        assert loss[b, m].item() == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A tiny ViT, saved as timm saves."""
    torch.manual_seed(3)
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
    folder = tmp_path_factory.mktemp("frozen")
    save_for_hf(timm.create_model("vit_tiny_patch16_224", **sizes), folder, model_args=sizes, safe_serialization=True)
    return f"local-dir:{folder}"


def target_fields(name, frozen):
    return {
        "pixels": {"target": "pixels"},
        "norm_pix": {"target": "norm_pix"},
        "hog": {"target": "hog"},
        "ema_features": {"target": "ema_features"},
        "timm_features": {"target": "timm_features", "target_model": frozen},
        "tokens": {"target": "tokens", "num_tokens": 16},
        "own tokens": {"target": "tokens", "tokenizer": "own_tokenizers:brightness"},
    }[name]


EVERY_TARGET = ["pixels", "norm_pix", "hog", "ema_features", "timm_features", "tokens", "own tokens"]
OBLONG = {"image_size": (32, 48), "encoder_depth": 1}


@pytest.fixture
def _few_crops(monkeypatch):
    monkeypatch.setattr("hardpatch.method.targets.tokens.CodebookTarget.num_crops", 48)


def run(out, **changes):
    values = TINY | changes
    return pretrain(values.pop("data"), out, **values)


@pytest.mark.usefixtures("_few_crops")
@pytest.mark.parametrize("predicted_loss", ["none", "absolute", "relative"])
@pytest.mark.parametrize("name", EVERY_TARGET[2:])
def test_every_target_trains_with_every_predicted_loss(tmp_path, frozen, name, predicted_loss):
    fields = target_fields(name, frozen) | OBLONG | {"mask": "random" if predicted_loss == "none" else "hard"}
    result = run(tmp_path / "run", epochs=1, log_steps=1, predicted_loss=predicted_loss, **fields)
    records = [record for record in read_metrics(tmp_path / "run") if "reconstruction_loss" in record]
    assert len(records) == result["steps"] == 6
    assert all(np.isfinite(record["reconstruction_loss"]) for record in records)
    assert all((record["prediction_loss"] > 0) == (predicted_loss != "none") for record in records)


def some_method(name, frozen, **changes):
    """Student and method of a tiny oblong run, a codebook drawn instead of fitted."""
    config = with_fields(Config(), TINY | OBLONG | target_fields(name, frozen) | changes)
    target = build_target(config)
    if isinstance(target, FittedTarget):
        generator = torch.Generator().manual_seed(2)
        target.adopt({name: torch.randn(t.shape, generator=generator) for name, t in target.fitted_state().items()})
    student = build_student(config, target_dim=target.dim)
    return student, build_method(config, student, target)


@pytest.mark.parametrize("name", EVERY_TARGET)
def test_every_target_is_learnt(frozen, name):
    student, method = some_method(name, frozen)
    teacher = Teacher(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    images, losses = some_images(8, 3, 32, 48, kind="smooth"), []
    for step in range(30):
        noise = torch.rand(8, 24, generator=torch.Generator().manual_seed(step % 3))
        loss = method.step(student, teacher, images, noise, num_hard=3)
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.reconstruction.item())
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


@pytest.mark.parametrize("name", EVERY_TARGET)
def test_no_target_makes_the_step_wait_for_the_device(frozen, name):
    """Reading a value (``.item()``, ``nonzero``, a branch on a tensor) is an error on fake tensors."""
    student, method = some_method(name, frozen)
    teacher = Teacher(student)
    with FakeTensorMode(allow_non_fake_inputs=True):
        losses = method.step(student, teacher, torch.empty(3, 3, 32, 48), torch.empty(3, 24), num_hard=torch.tensor(3))
        losses.total.backward()
    assert losses.total.shape == ()


@pytest.mark.usefixtures("_few_crops")
@pytest.mark.parametrize("name", ["hog", "ema_features", "timm_features", "tokens"])
def test_every_target_is_shown(tmp_path, frozen, name):
    """In the figures of training, and in those of ``hardpatch visualize``."""
    fields = target_fields(name, frozen) | OBLONG
    run(tmp_path / "run", epochs=1, checkpoint_steps=6, figures=True, num_figure_images=1, **fields)
    assert (tmp_path / "run" / "figures" / "hardness_00000006.png").exists()
    assert -1 <= visualize(tmp_path / "run", "shapes:2", tmp_path / "hard.png", count=2) <= 1


@pytest.mark.usefixtures("_few_crops")
@pytest.mark.parametrize("name", ["hog", "ema_features", "timm_features", "tokens"])
def test_five_channels(tmp_path, frozen, name):
    images = torch.randint(256, (12, 5, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (tmp_path / "data").mkdir()
    for number, image in enumerate(images):
        np.save(tmp_path / "data" / f"{number:02}.npy", image.permute(1, 2, 0).numpy())
    fields = target_fields(name, frozen) | OBLONG
    result = run(tmp_path / "run", data=str(tmp_path / "data"), channels=5, batch_size=4, epochs=2, **fields)
    assert result["steps"] == 6
    assert np.isfinite(result["reconstruction_loss"])


@pytest.mark.parametrize("name", EVERY_TARGET)
def test_built_targets_keep_the_protocol(frozen, name):
    config = with_fields(Config(), TINY | OBLONG | target_fields(name, frozen))
    target = build_target(config)
    assert isinstance(target, Target)
    student = build_student(config, target_dim=target.dim)
    assert student.reconstructor.head.out_features == target.dim
    assert build_method(config, student, target).target is target
    assert torch.equal(build_student(config).mask_token, student.mask_token)


def test_the_start_of_a_run_does_not_depend_on_how_its_target_is_loaded(frozen):
    """Building a frozen model draws random numbers; the student's are its own."""
    config = with_fields(Config(), TINY | target_fields("timm_features", frozen))
    states = [build_student(config, target_dim=16).state_dict(), build_student(config).state_dict()]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(("target", "columns"), [("norm_pix", 5), ("hog", 4)])
def test_only_pixels_are_shown_as_reconstruction(tmp_path, target, columns):
    run(tmp_path / "run", epochs=1, target=target)
    loaded = LoadedRun(tmp_path / "run")
    images = loaded.normalise(torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8))
    hardness = measure_hardness(
        loaded.student, loaded.teacher, loaded.method, images, share=0.5, generator=torch.Generator().manual_seed(0)
    )
    figure = draw_hardness(images, hardness, Display(loaded.normalise), (4, 4), "title")
    assert (hardness.reconstruction is not None) == (target == "norm_pix")
    assert len(figure.axes) == 2 * columns + 1, "and the scale of the maps"
    assert [axis.get_title() for axis in figure.axes[:columns]][-1] == (
        "reconstruction\n(mean and contrast\nof the patch itself)" if target == "norm_pix" else "hidden"
    )


def test_checkpoints_hold_nothing_of_targets_that_are_not_fitted(tmp_path, frozen):
    run(tmp_path / "pixels", epochs=1)
    run(tmp_path / "frozen", epochs=1, **target_fields("timm_features", frozen))
    plain, features = final_state(tmp_path / "pixels"), final_state(tmp_path / "frozen")
    assert plain["target"] == features["target"] == {}
    assert plain["student"].keys() == features["student"].keys()
    assert len(plain["optimizer"]["state"]) == len(features["optimizer"]["state"])


def test_pixel_targets_are_patches():
    images = some_images(2, 5, 16, 24)
    target = PixelTarget((8, 8), channels=5, normalise=False)
    assert torch.equal(target(images), patchify(images, (8, 8)))
    assert target.dim == 320
