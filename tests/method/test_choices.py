"""The tables of masks and targets: what a row says is what it builds, and a row from outside is as good as ours."""

import dataclasses

import pytest
import timm
import torch
from timm.models import save_for_hf

from hardpatch.config.config import Config, MethodConfig
from hardpatch.config.values import with_fields
from hardpatch.method.choices import MASKS, TARGETS, MaskKind, TargetKind, listed, resolve
from hardpatch.method.hpm import HPM
from hardpatch.method.masks import MaskInput
from hardpatch.method.targets.pixels import PixelTarget
from hardpatch.method.targets.target import FittedTarget, Target
from hardpatch.runs.build import build_hpm, build_method, build_student, build_target
from hardpatch.runs.load import LoadedRun, load_encoder
from hardpatch.runtime.errors import InputError, Interrupted
from hardpatch.training.gate import DEFAULT_THRESHOLD, mining_threshold
from tiny import TINY, assert_same_state, final_state, pretrain, stop_after, tiny_config

torch.set_num_threads(1)


def run(out, **changes):
    values = TINY | changes
    return pretrain(values.pop("data"), out, **values)


# Our rows


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A value for every option that a target requires."""
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
    folder = tmp_path_factory.mktemp("frozen")
    save_for_hf(timm.create_model("vit_tiny_patch16_224", **sizes), folder, model_args=sizes, safe_serialization=True)
    return {"target_model": f"local-dir:{folder}"}


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_what_its_row_says(name, options):
    kind = TARGETS[name]
    config = tiny_config(target=name, **{option: options[option] for option in kind.required})
    target = build_target(config)
    assert isinstance(target, Target)
    assert target.needs_teacher == kind.needs_teacher
    assert isinstance(target, PixelTarget) == kind.of_pixels
    assert getattr(target, "normalise", False) == kind.normalised
    assert set(kind.required) <= set(kind.options) <= {field.name for field in dataclasses.fields(MethodConfig)}
    if not kind.needs_teacher and not isinstance(target, FittedTarget):
        assert target(torch.randn(2, 3, 32, 32)).shape[:2] == (2, 16), "it asks for no features"


@pytest.mark.parametrize("name", TARGETS)
def test_what_a_target_requires_must_be_given(name):
    for option in TARGETS[name].required:
        with pytest.raises(InputError, match=f"{option}: must be given with target '{name}', got ''"):
            tiny_config(target=name)


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_guided_as_its_row_says(name):
    """With a guide it uses its scores; without one it takes no notice of them."""
    kind, policy = MASKS[name], resolve(MASKS[name].policy)
    config = tiny_config(mask=name)
    method = build_method(config, build_student(config))
    assert (method.guide, method.mask_policy) == (kind.guide, policy)
    assert method.needs_teacher == (kind.guide is not None)
    scores, noise = torch.randn(2, 3, 16), torch.rand(3, 16)
    priorities = [policy(MaskInput(guide, noise, (4, 4), 12, 6)) for guide in scores]
    assert torch.equal(*priorities) == (kind.guide is None)


def test_help_lists_every_row():
    for table in (MASKS, TARGETS):
        told = listed(table)
        assert all(f"{name}: {kind.about}" in told for name, kind in table.items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "norm_pixels"}, r"target: must be one of 'pixels', .*did you mean.*norm_pix"),
        ({"mask": "uniform-grid"}, r"mask: must be one of 'hard', .*did you mean uniform_grid"),
        ({"target": ""}, "target: must be one of"),
    ],
)
def test_an_unknown_name_is_refused(tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "run", **fields)
    assert not (tmp_path / "run").exists()


# Rows from outside


class ToyTarget:
    """The mean colour of each patch."""

    needs_teacher = False

    def __init__(self, patch, dim):
        self.patch, self.dim = patch, dim

    def __call__(self, images, features=None):
        return torch.nn.functional.avg_pool2d(images, self.patch).flatten(2).transpose(1, 2)

    def patch_loss(self, prediction, target):
        return (prediction.float() - target).square().mean(dim=-1)


class FittedToy(ToyTarget):
    """The same, less the mean over all images."""

    num_crops = 20

    def __init__(self, patch, dim):
        super().__init__(patch, dim)
        self.state = {"mean": torch.full((dim,), torch.nan), "count": torch.zeros((), dtype=torch.int64)}

    def __call__(self, images, features=None):
        return super().__call__(images) - self.state["mean"].to(images.device)

    def fit(self, crops, *, seed):
        return {"mean": torch.cat(list(crops)).mean(dim=(0, 2, 3)), "count": torch.tensor(len(crops))}

    def fitted_state(self):
        return self.state

    def adopt(self, state):
        self.state = {name: tensor.clone() for name, tensor in state.items()}


def toy_mask(given):
    """The harder half before the easier one, each by chance."""
    return given.noise + (given.scores > given.scores.median(dim=1, keepdim=True).values) * (given.num_hard > 0)


def built_as(kind):
    return lambda context: kind(context.geometry.patch, context.geometry.channels)


@pytest.fixture
def _toys(monkeypatch):
    monkeypatch.setitem(TARGETS, "toy", TargetKind(build=built_as(ToyTarget), about="mean colours"))
    monkeypatch.setitem(TARGETS, "fitted_toy", TargetKind(build=built_as(FittedToy), about="mean colours, centred"))
    monkeypatch.setitem(MASKS, "toy", MaskKind(policy=toy_mask, guide="predicted_loss", about="the harder half"))


@pytest.mark.usefixtures("_toys")
def test_a_target_and_a_mask_from_outside_train_and_load(tmp_path):
    result = run(tmp_path / "run", target="toy", mask="toy", figures=True, num_figure_images=1, checkpoint_steps=12)
    assert result["steps"] == 12
    assert result["predictor_rank_correlation"] is not None, "the mask is guided, so there is a teacher"
    loaded = LoadedRun(tmp_path / "run")
    assert isinstance(loaded.method.target, ToyTarget)
    assert loaded.method.mask_policy is toy_mask
    assert loaded.student.reconstructor.head.out_features == 3
    images = torch.randn(2, 3, 32, 32)
    assert loaded.method.target(images).shape == (2, 16, 3)
    assert load_encoder(tmp_path / "run").forward_features(images).shape == (2, 17, 32)
    assert (tmp_path / "run/figures/hardness_00000012.png").exists()


@pytest.mark.usefixtures("_toys")
def test_rules_hold_for_rows_from_outside():
    def config(**fields):
        return with_fields(Config(), {"mask": "toy", **fields})

    with pytest.raises(InputError, match="mask: 'toy' chooses by predicted loss"):
        config(predicted_loss="none")
    with pytest.raises(InputError, match="hardness_block: must be 1 with target 'toy', which is not made of pixels"):
        config(target="toy", hardness_block=4)
    assert mining_threshold(config(init_from="runs/old")) == DEFAULT_THRESHOLD, "a guided mask gets the gate"


@pytest.mark.usefixtures("_toys")
def test_a_fitted_target_from_outside_is_saved_resumed_and_loaded(tmp_path, monkeypatch):
    run(tmp_path / "whole", target="fitted_toy")
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted):
            run(tmp_path / "stopped", target="fitted_toy")
    monkeypatch.setattr(FittedToy, "fit", lambda *_, **__: pytest.fail("fitted again"))
    run(tmp_path / "stopped", target="fitted_toy")
    whole, stopped = final_state(tmp_path / "whole"), final_state(tmp_path / "stopped")
    assert_same_state(whole, stopped)
    assert whole["target"].keys() == {"mean", "count"}
    assert whole["target"]["count"] == 20
    target = LoadedRun(tmp_path / "stopped").method.target
    assert isinstance(target, FittedTarget)
    for name, tensor in whole["target"].items():
        assert torch.equal(stopped["target"][name], tensor)
        assert torch.equal(target.fitted_state()[name], tensor)


@pytest.mark.usefixtures("_toys")
def test_the_cost_of_a_fitted_target_is_counted_before_it_is_fitted():
    model = build_hpm(tiny_config(target="fitted_toy", mask="toy"), counted_only=True)
    assert isinstance(model, HPM)
    assert not model.method.target.fitted_state()["mean"].isnan().any()
