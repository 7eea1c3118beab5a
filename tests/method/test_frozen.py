"""Features of frozen timm models: equal to the model's own, on our grid, and nothing of it is trained or saved."""

import itertools
import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf

from hardpatch.config.config import Config
from hardpatch.config.values import with_fields
from hardpatch.method import masks
from hardpatch.method.losses import relative_loss
from hardpatch.method.method import Method
from hardpatch.method.student import Teacher
from hardpatch.method.targets.timm_features import FrozenModel, TimmFeatureTarget, load_frozen, resample
from hardpatch.runs.build import build_optimizer, build_student, build_target
from hardpatch.runs.load import load_encoder
from hardpatch.runtime.errors import InputError
from tiny import TINY, pretrain

torch.set_num_threads(1)
OURS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ITS = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
MODELS = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "registers": ("vit_small_patch14_reg4_dinov2", VIT | {"patch_size": 14, "img_size": 28}),
    "clip": ("vit_base_patch16_clip_224", VIT),
    "siglip": ("vit_base_patch16_siglip_224", VIT),
    "dinov3": ("vit_small_patch16_dinov3", VIT),
    "resnet": ("resnet18", {"channels": (8, 8, 8, 24)}),
    "convnext": ("convnext_atto", {"dims": (8, 8, 8, 24), "depths": (1, 1, 1, 1)}),
    "swin": ("swin_tiny_patch4_window7_224",
             {"img_size": 64, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}),
    "hiera": ("hiera_tiny_224", {"img_size": (64, 64), "embed_dim": 8, "stages": (1, 1, 1, 1)}),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Any of :data:`MODELS`, with weights of its own, as a folder that timm reads."""
    folders = {}

    def save(kind):
        if kind not in folders:
            name, sizes = MODELS[kind]
            torch.manual_seed(0)
            model = timm.create_model(name, **sizes).eval()
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor += 0.1 * torch.rand_like(tensor)  # norms and layer scales that do something
            model.pretrained_cfg.update(mean=ITS[0], std=ITS[1])
            folder = tmp_path_factory.mktemp(kind)
            save_for_hf(model, folder, model_args=sizes, safe_serialization=True)
            folders[kind] = f"local-dir:{folder}"
        return folders[kind]

    return save


def target_of(name, *, grid, image_size, channels=3):
    frozen = load_frozen(name, grid=grid, image_size=image_size, channels=channels)
    mean, std = OURS if channels == 3 else ((0.5,) * channels, (0.2,) * channels)
    return TimmFeatureTarget(frozen, grid=grid, mean=mean, std=std)


def some_images(*shape):
    """Smooth images in 0..1."""
    images = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    return F.avg_pool2d(images, 5, stride=1, padding=2)


def normalised(images, mean, std):
    return (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


@pytest.mark.parametrize("kind", ["vit", "registers", "clip", "siglip", "dinov3"])
def test_vit_features_equal_the_models_own_at_the_size_that_gives_our_grid(saved, kind):
    name, grid = saved(kind), (3, 4)
    target = target_of(name, grid=grid, image_size=(24, 32))
    patch = MODELS[kind][1]["patch_size"]
    size = (3 * patch, 4 * patch)
    model = timm.create_model(name, pretrained=True, img_size=size).eval()
    images = some_images(2, 3, 24, 32)
    resized = F.interpolate(images, size, mode="bicubic", antialias=True)
    with torch.no_grad():
        expected = model.forward_features(normalised(resized, *ITS))[:, model.num_prefix_tokens :]
    found = target(normalised(images, *OURS))
    assert found.shape == (2, 12, 16) == (2, 12, target.dim)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["resnet", "convnext"])
def test_maps_of_a_cnn_are_resampled(saved, kind):
    name = saved(kind)
    target = target_of(name, grid=(8, 12), image_size=(64, 96))
    model = timm.create_model(name, pretrained=True).eval()
    images = some_images(2, 3, 64, 96)
    with torch.no_grad():
        coarse = model.forward_features(normalised(images, *ITS))
    assert coarse.shape == (2, 24, 2, 3)
    expected = F.interpolate(coarse, (8, 12), mode="bilinear")
    found = target(normalised(images, *OURS)).unflatten(1, (8, 12)).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_maps_with_channels_last_and_a_fixed_input_size(saved):
    name = saved("swin")
    target = target_of(name, grid=(4, 8), image_size=(32, 64))
    assert target.input_size == (64, 64)
    model = timm.create_model(name, pretrained=True).eval()
    images = some_images(2, 3, 32, 64)
    resized = F.interpolate(images, (64, 64), mode="bicubic", antialias=True)
    with torch.no_grad():
        features = model.forward_features(normalised(resized, *ITS))
    assert features.shape == (2, 8, 8, 16)
    found = target(normalised(images, *OURS)).unflatten(1, (4, 8))
    expected = features.unflatten(1, (4, 2)).mean(dim=2)  # two rows of its map are one of ours
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_tokens_of_other_families_are_a_map_too(saved):
    name = saved("hiera")
    target = target_of(name, grid=(2, 2), image_size=(32, 32))
    model = timm.create_model(name, pretrained=True).eval()
    images = some_images(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.forward_features(normalised(images, *ITS))
    torch.testing.assert_close(target(normalised(images, *OURS)), expected, rtol=1e-4, atol=1e-4)


def test_resample_keeps_places():
    rows = torch.arange(4.0).view(1, 1, 4, 1).expand(1, 1, 4, 6)
    assert torch.equal(resample(rows, (4, 6)), rows)
    assert resample(rows, (2, 3))[0, 0].tolist() == [[0.5] * 3, [2.5] * 3]
    finer = resample(rows, (8, 6))[0, 0, :, 0]
    assert (finer.diff() >= 0).all()
    assert finer[3] == 1.25
    assert finer[4] == 1.75


def test_other_channels_adapt_the_first_layer_and_say_so(saved, capsys):
    name = saved("vit")
    target = target_of(name, grid=(2, 2), image_size=(32, 32), channels=5)
    assert "trained on 3 channels and gets 5" in capsys.readouterr().err
    model = timm.create_model(name, pretrained=True, in_chans=5).eval()
    images = torch.randn(2, 5, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(target(images), model.forward_features(images)[:, 1:])


def test_nothing_of_the_frozen_model_is_trained(saved):
    config = with_fields(Config(), TINY | {"target": "timm_features", "target_model": saved("resnet"),
                                           "image_size": 64})  # fmt: skip
    target = build_target(config)
    student = build_student(config, target_dim=target.dim)
    optimizer = build_optimizer(config.optimisation, student)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    assert not any(module.training for module in target.model.modules())
    assert not any(parameter.requires_grad for parameter in target.model.parameters())
    method = Method(target, masks.hard, (8, 8), 48, relative_loss)
    images = some_images(2, 3, 64, 64).requires_grad_()
    losses = method.step(student, Teacher(student), images, torch.rand(2, 64), num_hard=3)
    losses.total.backward()
    optimizer.step()
    assert not target(images).requires_grad
    assert all(parameter.grad is None for parameter in target.parameters())
    after = target.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "statistics of norms too"
    frozen = {id(parameter) for parameter in target.parameters()}
    assert frozen.isdisjoint(id(p) for group in optimizer.param_groups for p in group["params"])


def test_a_frozen_model_is_loaded_once_by_a_run_and_never_by_its_encoder(tmp_path, saved, monkeypatch):
    name, loads, create = saved("vit"), [], timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: loads.append(k.get("pretrained")) or create(*a, **k))
    values = TINY | {"target": "timm_features", "target_model": name, "epochs": 1}
    pretrain(values.pop("data"), tmp_path / "run", **values)
    assert loads.count(True) == 1
    load_encoder(tmp_path / "run")
    load_encoder(tmp_path / "run" / "checkpoints" / "last")
    assert loads.count(True) == 1


def test_evaluation_from_a_checkpoint_needs_the_model_only_for_its_loss(tmp_path, saved):
    from hardpatch.evaluate import contenders, foreground
    from hardpatch.runs.load import LoadedRun

    values = TINY | {"target": "timm_features", "target_model": saved("vit"), "epochs": 1}
    pretrain(values.pop("data"), tmp_path / "run", **values)
    result = foreground.run(foreground.ForegroundConfig(checkpoint=str(tmp_path / "run"), images="shapes:4"))
    assert np.isfinite(result.measures["reconstruction_error"].auroc)
    state = LoadedRun(tmp_path / "run")
    before = contenders.untrained_encoder(state.config, state.device).state_dict()
    expected = build_student(state.config).encoder.state_dict()
    assert all(torch.equal(before[name], expected[name]) for name in expected)


def error_of(name, **options):
    with pytest.raises(InputError) as caught:
        target_of(name, **{"grid": (4, 4), "image_size": (32, 32)} | options)
    return str(caught.value)


def test_unknown_names():
    assert "no model 'vit_base_patch16_225'" in error_of("vit_base_patch16_225")
    assert "did you mean vit_base_patch16_224" in error_of("vit_base_patch16_225")
    assert "Invalid pretrained tag" in error_of("vit_base_patch16_224.dinosaur")
    assert "hf-hub:facebook/dino" in error_of("facebook/dino")
    assert "there are no weights for 'coatnet_0_224'" in error_of("coatnet_0_224")


def test_weights_that_cannot_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = error_of("test_vit.r160_in1k")
    assert message.startswith("target_model: the weights of 'test_vit.r160_in1k' cannot be fetched")
    assert "cannot read the description of 'hf-hub:nobody/nothing'" in error_of("hf-hub:nobody/nothing")


def test_folders_that_do_not_load(tmp_path, saved):
    assert "cannot read the description of" in error_of(f"local-dir:{tmp_path / 'nowhere'}")
    folder = tmp_path / "other"
    model = timm.create_model("vit_tiny_patch16_224", **VIT)
    save_for_hf(model, folder, model_args=VIT | {"embed_dim": 32}, safe_serialization=True)
    assert "cannot be loaded: RuntimeError" in error_of(f"local-dir:{folder}")
    save_for_hf(model, folder, model_args=VIT | {"depth": 2}, safe_serialization=True)
    assert "cannot be loaded: RuntimeError" in error_of(f"local-dir:{folder}"), "missing tensors are not passed over"
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert "cannot be loaded" in error_of(f"local-dir:{folder}")
    (folder / "config.json").write_text("{")
    assert "cannot read the description" in error_of(f"local-dir:{folder}")
    (folder / "config.json").write_text(json.dumps({"architecture": "nosuch", "num_classes": 3}))
    assert "Unknown model (nosuch)" in error_of(f"local-dir:{folder}")


def test_features_that_cannot_be_targets(saved):
    assert "single vector, so that all 4x4 patches" in error_of(saved("resnet"))

    class Odd(torch.nn.Module):
        num_features = 3

        def __init__(self, answer):
            super().__init__()
            self.pretrained_cfg = dict(zip(("mean", "std"), OURS, strict=True))
            self.forward_features = answer

    for answer, message in (
        (lambda x: x.mean((2, 3)), "must be tokens or a map of width 3, got (1, 3)"),
        (lambda x: [x], "got list"),
        (lambda x: x.flatten(2).transpose(1, 2)[:, :5], "5 tokens of an image of 32x32 pixels are no grid"),
        (lambda x: x @ x[..., :3, :], "it cannot take images of 32x32 pixels"),
    ):
        with pytest.raises(InputError) as caught:
            TimmFeatureTarget(FrozenModel(Odd(answer), (32, 32)), grid=(4, 4), mean=OURS[0], std=OURS[1])
        assert message in str(caught.value)


def test_places_are_kept(saved):
    """A change in one corner of the image changes the features of that corner most."""
    for kind, grid in itertools.product(("convnext", "swin"), [(4, 4), (8, 8)]):
        target = target_of(saved(kind), grid=grid, image_size=(128, 128))
        images = some_images(1, 3, 128, 128)
        changed = images.clone()
        changed[:, :, 96:, :32] = 1 - changed[:, :, 96:, :32]
        difference = (target(changed) - target(images)).square().sum(-1).unflatten(1, grid)[0]
        row, column = divmod(int(difference.argmax()), grid[1])
        assert row >= 0.75 * grid[0]
        assert column < 0.25 * grid[1]
