"""Mining at the price of MAE: every means by itself, the budget that chooses, and what it costs."""

import importlib
from dataclasses import replace

import pytest
import torch
from hardpatch.training.budget import CHOICES, keep_to_budget, teacher_share
from hardpatch.training.feeding import Feed

from hardpatch.config.config import Config
from hardpatch.config.recipes import recipe
from hardpatch.config.values import with_fields
from hardpatch.cost.flops import step_cost
from hardpatch.data.loader.loading import Batch, Normalise
from hardpatch.method.method import Answers
from hardpatch.method.schedules import NUM_STAGES, stage, stage_side
from hardpatch.method.student import Teacher
from hardpatch.method.vit import embed, encode, grid_size, resample_positions, resize
from hardpatch.runs.build import build_method, build_stages, build_student, build_target
from hardpatch.runtime.errors import InputError
from hardpatch.training.loop import pretrain
from tiny import TINY, assert_same_state, final_state, tiny_config, tiny_student

torch.set_num_threads(1)
AS_THEY_ARE = Normalise((0.0,) * 3, (1 / 255,) * 3)


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
    student = tiny_student(decoder="cross", predictor_view="both", teacher_reduction=2)
    teacher = Teacher(student)
    images = torch.randn(2, 3, 32, 32)
    assert teacher.predict_loss(images).shape == (2, 16)
    torch.testing.assert_close(
        teacher.encode(images), encode(student.encoder, torch.nn.functional.avg_pool2d(images, 2)), atol=1e-6, rtol=1e-5
    )
    coarse = tiny_student(predictor_view="full", teacher_reduction=2)
    scores = Teacher(coarse).predict_loss(images).reshape(2, 4, 4)
    assert torch.equal(scores[:, ::2, ::2], scores[:, 1::2, 1::2]), "one score for the four patches under one token"


def test_scores_of_smaller_images_go_to_the_patches_that_they_cover():
    """On a grid that is no square, where rows and columns cannot be confused."""
    student = tiny_student(predictor_view="full", teacher_reduction=2, image_size=(32, 48)).eval()
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


# Progressive resolution


def test_stages_are_equally_long_and_end_at_full_size():
    stages = [stage(step, 100) for step in range(100)]
    assert [stages.count(number) for number in range(NUM_STAGES)] == [25] * 4
    assert stages == sorted(stages)
    assert [stage_side(number, start=0.5) for number in range(4)] == pytest.approx([0.5, 2 / 3, 5 / 6, 1])


@pytest.mark.parametrize(("fields", "grids"), [
    ({}, [(4, 4)]),
    ({"progressive_start": 0.5}, [(2, 2), (3, 3), (3, 3), (4, 4)]),
    ({"progressive_start": 0.5, "image_size": (64, 32)}, [(4, 2), (5, 3), (7, 3), (8, 4)]),
    ({"progressive_start": 0.5, "image_size": 64, "teacher_reduction": 2, "predictor_view": "full"},
     [(4, 4), (6, 6), (6, 6), (8, 8)]),
])  # fmt: skip
def test_stages_of_a_run(fields, grids):
    config = tiny_config(**fields)
    target = build_target(config)
    stages = build_stages(config, build_student(config), target)
    assert [stage.grid for stage in stages] == grids
    for grid, method in stages:
        assert method.num_hidden == grid[0] * grid[1] - int(grid[0] * grid[1] * 0.25)


def test_resize_is_antialiased_and_leaves_full_images_alone():
    images = torch.randn(1, 3, 32, 32)
    assert resize(images, (32, 32)) is images
    stripes = torch.zeros(1, 1, 32, 32)
    stripes[..., ::4] = 1.0  # a quarter of the columns: two neighbours alone would miss them, or see half
    torch.testing.assert_close(resize(stripes, (8, 8))[..., 2:-2], torch.full((1, 1, 8, 4), 0.25))


# Batches that are kept


def test_a_kept_batch_is_fetched_and_judged_once():
    fetched, asked = [], []

    def fetch():
        fetched.append(torch.full((2, 3, 32, 32), len(fetched), dtype=torch.uint8))
        return Batch(fetched[-1], [])

    def ask(stage, images):
        asked.append(images)
        return Answers(images, None, None)

    (only,) = build_stages(tiny_config(), build_student(tiny_config()), build_target(tiny_config()))
    feed = Feed(ask, AS_THEY_ARE, patch=(8, 8), steps_per_batch=3, num_micro_batches=2)
    seen = [[int(meal.images[0, 0, 0, 0]) for meal in feed.meals(step, only, fetch)] for step in range(7)]
    assert seen == [[0, 1]] * 3 + [[2, 3]] * 3 + [[4, 5]]
    assert len(asked) == 6
    plain = Feed(ask, AS_THEY_ARE, patch=(8, 8), steps_per_batch=1, num_micro_batches=1)
    assert next(plain.meals(5, only, fetch)).answers is None, "asked within the step"
    assert len(asked) == 6


def test_answers_from_before_are_not_asked_again():
    config = tiny_config()
    student = tiny_student()
    method, teacher = build_method(config, student), Teacher(student)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    answers = method.ask(teacher, images)
    expected = method.step(student, teacher, images, noise, num_hard=5)
    given = method.step(student, None, images, noise, num_hard=5, answers=answers)
    assert torch.equal(given.total, expected.total)


KINDS = {
    "progressive": {"progressive_start": 0.5},
    "kept": {"steps_per_batch": 3},
    "all": {
        "progressive_start": 0.5,
        "steps_per_batch": 2,
        "masks_per_image": 2,
        "decoder": "cross",
        "decoded_share": 0.5,
        "predictor_view": "both",
        "teacher_reduction": 2,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_exactly(tmp_path, kind, monkeypatch):
    """Stopped by a signal at step 5 and three steps later, or as soon as it may: not within a batch that is kept."""
    from hardpatch.runtime.errors import Interrupted
    from hardpatch.runtime.signals import StopSignal

    fields = {name: value for name, value in TINY.items() if name != "data"} | KINDS[kind]
    pretrain("shapes:48", tmp_path / "whole", **fields)
    asked_to_stop = iter([5, 3])

    class AtStep(StopSignal):
        def __init__(self):
            super().__init__()
            self.calls, self.stop_at = 0, next(asked_to_stop, None)

        @property
        def name(self):
            self.calls += 1
            return "SIGTERM" if self.stop_at and self.calls >= self.stop_at else None

        @name.setter
        def name(self, value):
            pass

    monkeypatch.setattr(importlib.import_module("hardpatch.training.loop"), "StopSignal", AtStep)
    stops = []
    for _ in range(2):
        with pytest.raises(Interrupted):
            pretrain("shapes:48", tmp_path / "parts", **fields)
        stops.append(final_state(tmp_path / "parts")["step"])
    pretrain("shapes:48", tmp_path / "parts", **fields)
    assert all(step % fields.get("steps_per_batch", 1) == 0 for step in stops), stops
    assert len(set(stops)) == 2
    assert 0 < stops[0] < 12
    assert_same_state(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))


# Counted cost, and the budget


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
    kept = step_cost(tiny_config(steps_per_batch=4))
    assert kept.teacher == pytest.approx(one.teacher / 4)
    assert kept.student == one.student
    shared = step_cost(tiny_config(masks_per_image=4))
    assert shared.teacher == pytest.approx(one.teacher / 4)
    assert shared.student == one.student, "a student's pass for every view"
    smaller = step_cost(tiny_config(image_size=64, predictor_view="full", teacher_reduction=2))
    assert smaller.teacher < 0.3 * step_cost(tiny_config(image_size=64, predictor_view="full")).teacher
    progressive = step_cost(tiny_config(image_size=64, progressive_start=0.5))
    assert progressive.total < 0.7 * step_cost(tiny_config(image_size=64)).total


def test_budget_takes_the_first_choice_that_keeps_to_it():
    base = tiny_config(image_size=64, batch_size=8, predictor_view="both")
    assert keep_to_budget(base) is base
    shares = []
    for masks, reduction in CHOICES:
        method, model = replace(base.method, masks_per_image=masks), replace(base.model, teacher_reduction=reduction)
        shares.append(teacher_share(replace(base, method=method, model=model)))
    for budget in (0.9, shares[0] - 0.01, shares[1] - 0.01, min(shares) + 1e-6):
        chosen = keep_to_budget(with_fields(base, {"teacher_budget": budget}))
        expected = CHOICES[next(i for i, share in enumerate(shares) if share <= budget)]
        assert (chosen.method.masks_per_image, chosen.model.teacher_reduction) == expected
        assert teacher_share(chosen) <= budget
        assert keep_to_budget(chosen) == chosen, "a run that goes on chooses the same"


@pytest.mark.parametrize("fields", [
    {"batch_size": 9},  # no number of masks divides it
    {"predictor_view": "masked"},  # the published predictor never saw a small image
])  # fmt: skip
def test_budget_does_not_take_what_does_not_fit(fields):
    config = tiny_config(
        **{"image_size": 64, "batch_size": 8, "predictor_view": "both", "teacher_budget": 0.01} | fields
    )
    with pytest.raises(InputError, match="teacher_budget: must be at least 0"):
        keep_to_budget(config)


@pytest.mark.parametrize("fields", [{"target": "ema_features"}, {"mask": "attention"}])
def test_budget_leaves_a_teacher_that_is_asked_everywhere_its_full_images(fields):
    base = tiny_config(image_size=64, batch_size=8, predictor_view="both", **fields)
    most_masks = teacher_share(replace(base, method=replace(base.method, masks_per_image=4)))
    chosen = keep_to_budget(with_fields(base, {"teacher_budget": most_masks + 1e-6}))
    assert (chosen.method.masks_per_image, chosen.model.teacher_reduction) == (4, 1)
    with pytest.raises(InputError, match="teacher_budget: must be at least 0"):
        keep_to_budget(with_fields(base, {"teacher_budget": most_masks - 1e-3}))


def test_budget_lowers_nothing_that_was_given():
    base = tiny_config(image_size=64, batch_size=8, predictor_view="both", masks_per_image=4)
    chosen = keep_to_budget(with_fields(base, {"teacher_budget": teacher_share(base) - 1e-3}))
    assert (chosen.method.masks_per_image, chosen.model.teacher_reduction) == (4, 2)


@pytest.mark.parametrize(("fields", "message"), [
    ({"progressive_start": 0.5, "target": "tokens", "tokenizer": "a:b"}, "progressive_start: must be 1 with"),
    ({"progressive_start": 0.0}, "progressive_start: input should be greater than 0"),
    ({"teacher_budget": 0.2, "mask": "random"}, "teacher_budget: no teacher is asked with mask 'random'"),
    ({"masks_per_image": 3}, "masks_per_image: must divide batch_size 256"),
    ({"steps_per_batch": 3, "keep_steps": 4}, "keep_steps: must be divisible by steps_per_batch"),
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


# The measured overhead


@pytest.fixture
def prepared(tmp_path):
    """Puts a run together."""
    from hardpatch.runs.folder import RunFolder
    from hardpatch.training.loop import prepare

    folder = RunFolder(tmp_path / "run")
    yield lambda **fields: prepare(tiny_config(**fields), folder, device=torch.device("cpu"), resume="auto")
    folder.release()


def test_overhead_is_the_time_of_the_step_over_that_of_mae(prepared, monkeypatch):
    from hardpatch.training import overhead

    seconds = iter([99.0, 99.0, 99.0] + [1.0, 4.0, 2.0] * 3)  # the first turn does not count

    def timed(act, device):
        act()
        return next(seconds)

    monkeypatch.setattr(overhead, "_seconds", timed)
    run = prepared(steps_per_batch=2)
    before = {name: tensor.clone() for name, tensor in run.state.model.student.state_dict().items()}
    measured = overhead.measure_overhead(run)
    assert measured == (pytest.approx((1 / 2 + 4) / 2), 0.0, pytest.approx(0.5 / 4.5))
    assert all(torch.equal(before[name], tensor) for name, tensor in run.state.model.student.state_dict().items())
    assert all(parameter.grad is None for parameter in run.state.model.student.parameters())


def test_overhead_is_over_mae_that_decodes_all_that_is_hidden(prepared, monkeypatch):
    """What decoding a part saves counts for the step, not for what it is held against."""
    from hardpatch.training.overhead import TURNS, measure_overhead

    from hardpatch.method.method import Method

    decoded = []
    choose = Method.choose_decoded

    def spy(method, *arguments):
        chosen = choose(method, *arguments)
        decoded.append(chosen.shape[1])
        return chosen

    monkeypatch.setattr(Method, "choose_decoded", spy)
    run = prepared(decoded_share=1 / 3)
    assert run.method.num_hidden == 12
    measure_overhead(run)
    assert decoded == [4, 12] * (TURNS + 1)


def test_overhead_that_does_not_fit_into_memory_stops_no_run(prepared, monkeypatch, capsys):
    from hardpatch.training import overhead

    def full(act, device):
        act()
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(overhead, "_seconds", full)
    run = prepared()
    run.state.model.student.zero_grad()
    assert overhead.measure_overhead(run) is None
    assert all(parameter.grad is None for parameter in run.state.model.student.parameters())
    assert "was not measured" in capsys.readouterr().err


def test_mae_has_no_overhead(prepared):
    from hardpatch.training.overhead import measure_overhead

    assert measure_overhead(prepared(mask="random", predicted_loss="none")) is None


def test_measured_overhead_of_a_run_is_recorded_and_changes_nothing(tmp_path, monkeypatch):
    from hardpatch.runtime.log import read_metrics

    fields = {name: value for name, value in TINY.items() if name != "data"}
    pretrain("shapes:48", tmp_path / "quiet", **fields)
    monkeypatch.setattr("hardpatch.training.reporting.MIN_STEPS", 12)
    result = pretrain("shapes:48", tmp_path / "measured", **fields)
    costs = [record for record in read_metrics(tmp_path / "measured") if "overhead_over_mae" in record]
    assert [record["step"] for record in costs] == [0]
    assert result["overhead_over_mae"] == costs[0]["overhead_over_mae"] > 1
    assert 0 < costs[0]["teacher_share"] < 1
    assert_same_state(final_state(tmp_path / "quiet"), final_state(tmp_path / "measured"))
