"""Schedules: the published constants, their shares in shorter runs, end points."""

import math
from itertools import pairwise

import pytest

from hardpatch.method.schedules import (
    EmaSchedule,
    adapted_ema,
    adapted_warmup_steps,
    ema_decay,
    hard_share,
    hard_share_by_epoch,
    learning_rate,
    untouched_share,
)

PUBLISHED = EmaSchedule(start=0.999, end=0.9999, ramp_steps=62_500)


@pytest.mark.parametrize(
    ("step", "decay"),
    [(0, 0.999), (31_250, 0.99945), (62_500, 0.9999), (62_501, 0.9999), (124_999, 0.9999)],
)
def test_published_ema_decay(step, decay):
    assert ema_decay(step, adapted_ema(125_000)) == pytest.approx(decay, abs=1e-12)


@pytest.mark.parametrize("total_steps", [125_000, 125_001, 1_000_000])
def test_long_runs_keep_the_published_ema(total_steps):
    assert adapted_ema(total_steps) == PUBLISHED


def test_shorter_runs_keep_the_published_shares():
    ema = adapted_ema(12_500)
    assert ema == pytest.approx((0.99, 0.999, 6_250), abs=1e-12)
    for total_steps in (1_000, 10_000, 100_000):
        window = 1 / (1 - adapted_ema(total_steps).end)
        assert window / total_steps == pytest.approx(0.08)


@pytest.mark.parametrize("total_steps", [1, 2, 10, 100, 1_000])
def test_the_shortest_runs_still_average(total_steps):
    ema = adapted_ema(total_steps)
    assert 0.5 <= ema.start <= ema.end < 1
    assert 0 <= ema.ramp_steps <= total_steps


def test_ema_without_a_ramp_is_constant():
    assert ema_decay(0, EmaSchedule(0.5, 0.9, 0)) == 0.9
    assert ema_decay(7, EmaSchedule(0.5, 0.9, 0)) == 0.9


@pytest.mark.parametrize(("total_steps", "expected"), [(100, 10), (10_000, 1_000), (1_000_000, 25_000)])
def test_warmup_is_a_tenth_and_at_most_the_published_one(total_steps, expected):
    assert adapted_warmup_steps(total_steps) == expected


def test_learning_rate_end_points():
    rate = [learning_rate(s, peak=2.0, warmup_steps=40, total_steps=240) for s in range(241)]
    assert rate[0] == 0
    assert rate[20] == pytest.approx(1)
    assert rate[40] == 2
    assert rate[90] == pytest.approx(1 + math.sqrt(0.5))
    assert rate[140] == pytest.approx(1)
    assert rate[240] == pytest.approx(0, abs=1e-12)


def test_learning_rate_rises_then_falls():
    rate = [learning_rate(s, peak=2.0, warmup_steps=40, total_steps=240) for s in range(241)]
    assert all(a < b for a, b in pairwise(rate[:41]))
    assert all(a > b for a, b in pairwise(rate[40:]))
    steepest = max(abs(a - b) for a, b in pairwise(rate))
    assert steepest == pytest.approx(2 / 40)  # no jump where the two parts meet


def test_learning_rate_without_warmup_starts_at_the_peak():
    assert learning_rate(0, peak=2.0, warmup_steps=0, total_steps=10) == 2
    assert learning_rate(10, peak=2.0, warmup_steps=10, total_steps=10) == 2


def test_hard_share_is_linear_in_the_step():
    shares = [hard_share(s, start=0.1, end=0.5, total_steps=8) for s in range(9)]
    assert shares == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5])


def test_hard_share_by_epoch_is_the_published_one():
    epochs, steps_per_epoch = 200, 3
    for step in range(epochs * steps_per_epoch):
        epoch = step // steps_per_epoch
        share = hard_share_by_epoch(
            step, start=0.0, end=0.5, total_steps=epochs * steps_per_epoch, steps_per_epoch=steps_per_epoch
        )
        assert share == pytest.approx(0.5 * (epoch + 1) / epochs)
        assert int(147 * share) == int(147 * (0.5 * (epoch + 1) / epochs))


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.3, 0.1), (0.7, 0.0)])
def test_the_hard_share_may_fall(start, end):
    """Hard to easy: never beyond its ends, so that the number of hard patches is one of 0..M."""
    steps = {"start": start, "end": end, "total_steps": 600}
    for shares in (
        [hard_share(s, **steps) for s in range(601)],
        [hard_share_by_epoch(s, **steps, steps_per_epoch=3) for s in range(600)],
    ):
        assert shares == sorted(shares, reverse=True)
        assert 0 <= shares[-1] == pytest.approx(end)
        assert shares[0] == pytest.approx(start, abs=0.01)
        assert shares[0] <= 1


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_both_forms_of_the_hard_share_reach_their_end(start):
    assert hard_share(600, start=start, end=1.0, total_steps=600) == 1
    assert hard_share_by_epoch(599, start=start, end=1.0, total_steps=600, steps_per_epoch=3) == 1


@pytest.mark.parametrize(
    ("schedule", "total_steps"),
    [
        (EmaSchedule(0.999, 0.9999, 62_500), 1_000),
        (EmaSchedule(0.999, 0.9999, 500), 1_000),
        (EmaSchedule(0.999, 0.9999, 12_500), 25_000),
        (EmaSchedule(0.996, 1.0, 300), 300),
        (EmaSchedule(0.99, 0.99, 0), 300),
    ],
)
def test_untouched_share_equals_the_product_of_all_decays(schedule, total_steps):
    product = math.prod(ema_decay(step, schedule) for step in range(total_steps))
    assert untouched_share(schedule, total_steps) == pytest.approx(product, rel=0.02, abs=1e-4)


@pytest.mark.parametrize("total_steps", [100, 1_000, 10_000, 125_000])
def test_the_adapted_teacher_leaves_its_initialisation(total_steps):
    assert untouched_share(adapted_ema(total_steps), total_steps) < 1e-5


def test_the_published_constants_would_freeze_the_teacher_of_a_short_run():
    assert untouched_share(PUBLISHED, 500) > 0.5
