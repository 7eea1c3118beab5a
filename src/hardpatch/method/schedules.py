"""Schedules: pure functions of the step, so that resuming needs nothing but the step.

The published constants (EMA decay 0.999 -> 0.9999 over 100 epochs, 40 warm-up epochs) belong to the published command:
ImageNet-1K at 8 x 32 x 8 = 2,048 images a step, so 625 steps an epoch and 125,000 in 200 epochs. Kept as they are on a
run of 1,000 steps, the teacher would still be its own initialisation at the end, and mining would be noise. So
constants that are not given scale with the length of the run: see :func:`adapted_ema` and
:func:`adapted_warmup_steps`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

PUBLISHED_STEPS = 125_000
"""Optimizer steps of the published 200-epoch run on ImageNet-1K (625 steps an epoch)."""


class EmaSchedule(NamedTuple):
    """EMA decay from ``start`` to ``end``, linear over ``ramp_steps``, then constant."""

    start: float
    end: float
    ramp_steps: int


def adapted_ema(total_steps: int) -> EmaSchedule:
    """EMA constants with the same share of the run as in the published 200-epoch run, never slower than published.

    The teacher averages over about 1 / (1 - decay) steps: in the published run 0.8 % of the run at first (0.999), 8 %
    in the end (0.9999), with the ramp over half of it. Shorter runs keep these shares; longer runs keep the
    published constants, so that 125,000 steps and more give exactly the published schedule.
    """
    shorter = max(1.0, PUBLISHED_STEPS / total_steps)
    return EmaSchedule(
        start=1 - min(0.5, 1e-3 * shorter),
        end=1 - min(0.5, 1e-4 * shorter),
        ramp_steps=min(PUBLISHED_STEPS // 2, total_steps // 2),
    )


def adapted_warmup_steps(total_steps: int) -> int:
    """A tenth of the run, at most the published 40 epochs of 625 steps.

    A tenth rather than the fifth that 40 of 200 epochs are (of 800 they are a twentieth): a short run has no steps to
    lose. The published recipe gives its 40 epochs explicitly.
    """
    return min(40 * 625, total_steps // 10)


def ema_decay(step: int, schedule: EmaSchedule) -> float:
    """Decay of the teacher's update after optimizer step ``step`` (counted from 0)."""
    progress = min(1.0, step / schedule.ramp_steps) if schedule.ramp_steps > 0 else 1.0
    return schedule.start + progress * (schedule.end - schedule.start)


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int, floor: float = 0.0) -> float:
    """Linear warm-up from 0 to ``peak``, then half a cosine to ``floor``."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def constant_learning_rate(
    step: int, *, peak: float, warmup_steps: int, total_steps: int, cooldown_steps: int
) -> float:
    """Linear warm-up from 0 to ``peak``, constant, then down to 0 in the last steps: 1 - sqrt of the way through them.

    Source: Haegele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", NeurIPS 2024,
    arXiv 2405.18392, section 3 (the cool-down named 1-sqrt).
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    way = (step - (total_steps - cooldown_steps)) / cooldown_steps
    return peak * (1 - math.sqrt(min(1.0, max(0.0, way))))


def hard_share(step: int, *, start: float, end: float, total_steps: int) -> float:
    """a_t, the share of the hidden patches chosen by predicted loss: a_0 + t / T (a_T - a_0), as in the paper.

    After T it stays at a_T.
    """
    return start + (end - start) * min(step, total_steps) / total_steps


def hard_share_by_epoch(step: int, *, start: float, end: float, total_steps: int, steps_per_epoch: int) -> float:
    """a_t as the published code sets it: constant within an epoch, already one epoch ahead in the first.

    After the last epoch it stays at a_T.
    """
    epochs = total_steps // steps_per_epoch
    return start + (end - start) * min(step // steps_per_epoch + 1, epochs) / epochs


def untouched_share(schedule: EmaSchedule, total_steps: int) -> float:
    """How much of the teacher after the run is still its initialisation: the product of all decays.

    Near 0 the teacher follows the student; near 1 it never left its start, and mining would be noise.
    """
    ramp = min(schedule.ramp_steps, total_steps)
    mean_ramp_decay = (schedule.start + ema_decay(ramp, schedule)) / 2
    return float(mean_ramp_decay**ramp * schedule.end ** (total_steps - ramp))
