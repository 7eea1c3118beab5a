"""Mining at the price of MAE: every means by itself, and what a step costs, counted."""

import pytest
import torch

from hardpatch.config.config import Config
from hardpatch.config.recipes import recipe
from hardpatch.config.values import with_fields
from hardpatch.cost.flops import step_cost
from hardpatch.method.student import Teacher
from hardpatch.method.vit import embed, encode, grid_size, resample_positions
from hardpatch.runs.build import build_method, build_student
from hardpatch.runtime.errors import InputError
from tiny import TINY, assert_same_state, final_state, pretrain, stop_after, tiny_config, tiny_student

torch.set_num_threads(1)


# Images of other sizes


def test_positions_of_larger_patches_are_the_means_of_those_they_cover():
    table = torch.randn(1, 4 * 6, 5)
    pooled = resample_positions(table, (4, 6), (2, 3))
    maps = table.reshape(4, 6, 5)
    expected = torch.stack(
        [maps[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((0, 1)) for i in range(2) for j in range(3)]
    )
    torch.testing.assert_close(pooled[0], expected)
    assert resample_positions(table, (4, 6), (4, 6)) is table
    assert resample_positions(table, (4, 6), (3, 5)).shape == (1, 15, 5)


def test_resampled_positions_keep_the_order_of_places():
    """A table that is a ramp along the rows stays one, also where the grids do not divide."""
    ramp = torch.arange(7.0).repeat_interleave(7).reshape(1, 49, 1)
    rows = resample_positions(ramp, (7, 7), (5, 5)).reshape(5, 5)
    assert (rows.diff(dim=0) > 1.0).all()
    torch.testing.assert_close(rows, rows[:, :1].expand(5, 5), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_medium_patch16_gap_256",
        "deit_tiny_distilled_patch16_224",
    ],
)
def test_images_of_another_size_are_embedded_as_a_model_of_that_size_would(name):
    from hardpatch.method.vit import create_encoder

    sizes = {"patch_size": 8, "width": 32, "depth": 1, "heads": 2}
    large = create_encoder(name, image_size=(48, 32), **sizes)
    small = create_encoder(name, image_size=(24, 16), **sizes)
    state = large.state_dict()
    prefix = large.pos_embed.shape[1] - 24
    state["pos_embed"] = torch.cat(
        [large.pos_embed[:, :prefix], resample_positions(large.pos_embed[:, prefix:], (6, 4), (3, 2))], dim=1
    )
    small.load_state_dict(state)
    images = torch.randn(2, 3, 24, 16)
    torch.testing.assert_close(embed(large, images), embed(small, images))
    torch.testing.assert_close(encode(large.eval(), images), small.eval().forward_features(images))


def test_a_teacher_on_smaller_images_sees_their_average_and_speaks_of_every_patch():
    student = tiny_student(decoder="cross", teacher_reduction=2)
    teacher = Teacher(student)
    images = torch.randn(2, 3, 32, 32)
    assert teacher.predict_loss(images).shape == (2, 16)
    torch.testing.assert_close(
        teacher.encode(images), encode(student.encoder, torch.nn.functional.avg_pool2d(images, 2)), atol=1e-6, rtol=1e-5
    )
    coarse = tiny_student(teacher_reduction=2)
    scores = Teacher(coarse).predict_loss(images).reshape(2, 4, 4)
    assert torch.equal(scores[:, ::2, ::2], scores[:, 1::2, 1::2]), "one score for the four patches under one token"


def test_scores_of_smaller_images_go_to_the_patches_that_they_cover():
    """On a grid that is no square, where rows and columns cannot be confused."""
    student = tiny_student(teacher_reduction=2, image_size=(32, 48)).eval()
    features = student.encode_full(torch.randn(2, 3, 32, 48))
    fine = student.score(features, (4, 6)).reshape(2, 4, 6)
    student.reduction = 1
    coarse = student.score(features, (2, 3)).reshape(2, 2, 3)
    torch.testing.assert_close(fine, coarse.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2))


def test_a_predictor_of_cross_attention_is_asked_at_mask_tokens():
    student = tiny_student(decoder="cross").eval()
    features = student.encode_full(torch.randn(2, 3, 32, 32))
    before = student.score(features, (4, 4))
    with torch.no_grad():
        student.mask_token.add_(torch.randn_like(student.mask_token))
    assert not torch.allclose(before, student.score(features, (4, 4)), atol=1e-4)


def test_masking_and_learning_apart_are_a_step():
    config = tiny_config(predictor_view="both", decoded_share=0.5)
    student = tiny_student()
    method, teacher = build_method(config, student), Teacher(student)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    expected = method.step(student, teacher, images, noise, num_hard=5)
    batch = method.mask(student, teacher, images, noise, num_hard=5)
    assert torch.equal(method.learn(student, batch).total, expected.total)
    halved = method.learn(student, batch, torch.tensor([0.5, 0.25, 1.0]))
    torch.testing.assert_close(halved.reconstruction, 0.5 * expected.reconstruction)
    torch.testing.assert_close(halved.prediction, 0.25 * expected.prediction)
    torch.testing.assert_close(halved.total, 0.5 * expected.reconstruction + 0.25 * expected.prediction)


FAST = {
    "masks_per_image": 2,
    "decoder": "cross",
    "decoded_share": 0.5,
    "predictor_view": "both",
    "teacher_reduction": 2,
}


def test_a_stopped_run_goes_on_exactly(tmp_path, monkeypatch):
    """Stopped by a signal at step 5 and three steps later."""
    from hardpatch.runtime.errors import Interrupted

    fields = {name: value for name, value in TINY.items() if name != "data"} | FAST
    pretrain("shapes:48", tmp_path / "whole", **fields)
    for step in (5, 8):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(Interrupted):
                pretrain("shapes:48", tmp_path / "parts", **fields)
        assert final_state(tmp_path / "parts")["step"] == step
    pretrain("shapes:48", tmp_path / "parts", **fields)
    assert_same_state(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))


# Counted cost


def test_cost_follows_the_table_of_the_method():
    """Forward multiply-adds of ViT-B/16 at 224 px against MAE's 29.3 G (student three times, teacher once).

    Less the projection of the hidden patches, which only the published code does.
    """
    mae = step_cost(recipe("mae")).total
    assert mae / 2e9 == pytest.approx(29.3 - 147 * 768 * 768 / 1e9 * 3, rel=0.01)
    exact = step_cost(recipe("hpm"))
    assert exact.total / mae == pytest.approx(2.33, abs=0.02)
    shallow = step_cost(recipe("hpm-shallow"))
    assert exact.teacher > shallow.teacher


def test_what_serves_several_views_is_shared_among_them():
    one = step_cost(tiny_config())
    shared = step_cost(tiny_config(masks_per_image=4))
    assert shared.teacher == pytest.approx(one.teacher / 4)
    assert shared.student == one.student, "a student's pass for every view"
    smaller = step_cost(tiny_config(image_size=64, predictor_view="full", teacher_reduction=2))
    assert smaller.teacher < 0.3 * step_cost(tiny_config(image_size=64, predictor_view="full")).teacher


@pytest.mark.parametrize(("fields", "message"), [
    ({"masks_per_image": 3}, "masks_per_image: must divide batch_size 256"),
    ({"teacher_reduction": 2, "target": "ema_features"}, "teacher_reduction: must be 1 with target"),
    ({"decoded_share": 1.5}, "decoded_share: input should be less than or equal to 1"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        with_fields(Config(), fields)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="teacher_reduction: must divide the grid of 4x4"):
        build_student(tiny_config(teacher_reduction=3, predictor_view="full"))
    student = build_student(tiny_config())
    assert grid_size(student.encoder) == (4, 4)
    with pytest.raises(InputError, match="decoded_share: must leave at least 2"):
        build_method(tiny_config(decoded_share=0.05), student)
