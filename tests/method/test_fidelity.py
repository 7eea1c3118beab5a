"""The numbers of the published code: forward, losses, gradients and five optimizer steps.

Cases are read from ``../shared/reference`` or from the folder in HPM_REFERENCE_DIR; sizes come from the files.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.optim import param_groups_weight_decay

from hardpatch.method.losses import PREDICTED_LOSSES
from hardpatch.method.masks import hide_random, split_patches
from hardpatch.method.method import Method
from hardpatch.method.student import Student, Teacher
from hardpatch.method.targets.pixels import PixelTarget
from hardpatch.method.targets.target import feature_loss
from hardpatch.method.vit import create_encoder, encode, sincos_positions, take
from hardpatch.weights.names import from_published, to_published
from places import SHARED

FOLDER = Path(os.environ.get("HPM_REFERENCE_DIR", SHARED / "reference"))
CASES = sorted(FOLDER.glob("*.json"))

pytestmark = pytest.mark.skipif(not CASES, reason=f"no reference numbers in {FOLDER}; set HPM_REFERENCE_DIR")


class GivenFeatures:
    """The feature target of a reference case."""

    needs_teacher = False

    def __init__(self, features):
        self.features, self.dim = features, features.shape[-1]

    def __call__(self, images, features=None):
        return self.features

    patch_loss = staticmethod(feature_loss)


class Case:
    def __init__(self, path):
        self.json = json.loads(path.read_text())
        self.tensors = load_file(path.with_suffix(".safetensors"))
        self.images, self.masks = self.tensors["images"], self.tensors["masks"]
        config = self.json["config"]
        encoder = create_encoder(
            "vit_base_patch16_224", image_size=tuple(self.images.shape[-2:]), channels=self.images.shape[1],
            patch_size=config["patch_size"], width=config["embed_dim"], depth=config["depth"],
            heads=config["num_heads"],
        )  # fmt: skip
        if self.json["target"] == "feature":
            target = GivenFeatures(self.tensors["feature_target"])
        else:
            target = PixelTarget(
                (config["patch_size"],) * 2, channels=self.images.shape[1], normalise=self.json["norm_pix"]
            )
        self.student = Student(
            encoder, target_dim=self.tensors["init.decoder_pred.bias"].numel(),
            decoder_dim=config["decoder_embed_dim"], decoder_depth=config["decoder_depth"],
            decoder_heads=config["decoder_num_heads"], predictor_depth=config["decoder_depth"],
        )  # fmt: skip
        self.student.load_state_dict(from_published(self.state("init.")), strict=True)
        self.teacher = Teacher(self.student)
        self.method = Method(
            target=target, mask_policy=hide_random, num_hidden=int(self.masks[0, 0].sum()),
            predicted_loss=PREDICTED_LOSSES["relative" if self.json["relative"] else "absolute"],
        )  # fmt: skip

    def state(self, prefix):
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def case(request):
    return Case(request.param)


def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_forward_equals_the_published_model(case):
    hidden = case.masks[0]
    visible_index, hidden_index = split_patches(hidden, case.method.num_hidden)
    output = case.student(case.images, hidden, num_hidden=case.method.num_hidden)
    assert_close(encode(case.student.encoder, case.images, visible_index), case.tensors["student_features"], 1e-5)
    assert_close(output.prediction, case.tensors["student_prediction_masked"], 1e-5)
    assert_close(output.scores, case.tensors["student_loss_prediction_masked"], 1e-5)
    target = take(case.method.target(case.images), hidden_index)
    assert_close(case.method.target.patch_loss(output.prediction, target), case.tensors["patch_loss_masked"], 1e-5)
    assert_close(encode(case.teacher.model.encoder, case.images), case.tensors["teacher_features"], 1e-5)
    assert_close(case.teacher.predict_loss(case.images), case.tensors["teacher_loss_prediction"], 1e-5)


def test_trajectory_equals_the_published_training(case):
    recipe = case.json["optimizer"]
    groups = param_groups_weight_decay(case.student, recipe["weight_decay"])
    optimizer = torch.optim.AdamW(groups, lr=recipe["lr"], betas=recipe["betas"], eps=recipe["eps"])
    for expected, hidden in zip(case.json["trajectory"], case.masks, strict=True):
        scores = case.teacher.predict_loss(case.images)
        if not case.json["relative"]:  # a common shift of all scores is noise there: see assert_same_weights
            assert scores.double().sum().item() == pytest.approx(expected["teacher_loss_prediction_sum"], rel=1e-4)
        output = case.student(case.images, hidden, num_hidden=case.method.num_hidden)
        losses = case.method.losses(output, case.images, case.method.choose_decoded(hidden, hidden.float()), scores)
        assert losses.reconstruction.item() == pytest.approx(expected["reconstruction_loss"], rel=1e-5, abs=1e-5)
        assert losses.prediction.item() == pytest.approx(expected["predictor_loss"], rel=1e-5, abs=1e-5)
        losses.total.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in case.student.parameters() if p.grad is not None])
        assert norm.item() == pytest.approx(expected["grad_norm"], rel=1e-4)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        case.teacher.update(case.student, case.json["ema_decay"])
    for model, prefix in ((case.student, "final."), (case.teacher.model, "final_ema.")):
        assert_same_weights(to_published(model.state_dict()), case.state(prefix), relative=case.json["relative"])


def assert_same_weights(actual, expected, *, relative):
    """Every tensor within 1e-4, where its value is determined at all.

    Two kinds of parameter have a gradient that is exactly zero, so AdamW (which divides by the gradient's size) moves
    them by pure rounding noise, in every implementation and on every machine: the key part of each qkv bias (softmax
    ignores a shift common to all keys), and the bias of the predictor's last norm under the relative loss (only
    differences of scores count). Apart from these, single entries with a gradient near AdamW's eps are allowed to
    stray: at most 5 in 10,000, while the root mean square of each tensor's difference stays below 2e-5.
    """
    assert actual.keys() == expected.keys()
    strays = total = 0
    for name, reference in expected.items():
        difference = (actual[name] - reference).abs()
        if name.endswith("attn.qkv.bias"):
            query, _, value = difference.chunk(3)
            difference = torch.cat([query, value])
        elif relative and name == "decoder_norm_losspred.bias":
            continue
        assert difference.square().mean().sqrt() <= 2e-5, name
        strays += int((difference > 1e-4).sum())
        total += difference.numel()
    assert strays <= 5e-4 * total, f"{strays} of {total} entries differ by more than 1e-4"


def test_position_tables_equal_the_published_ones(case):
    size, patch = case.images.shape[-2:], case.json["config"]["patch_size"]
    grid = (size[0] // patch, size[1] // patch)
    for name in ("init.pos_embed", "init.decoder_pos_embed"):
        expected = case.tensors[name][0]
        assert_close(sincos_positions(grid, expected.shape[1]), expected[1:], 1e-5)
        assert not expected[0].any()
