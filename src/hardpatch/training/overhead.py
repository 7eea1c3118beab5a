"""What mining costs: the time of a run's step over that of plain MAE, measured on the run's own model and device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from hardpatch.method.masks import hide_random
from hardpatch.method.method import Answers
from hardpatch.method.vit import patch_size
from hardpatch.runs.build import build_normalise
from hardpatch.runtime.distributed import synchronise
from hardpatch.runtime.log import warn
from hardpatch.training.state import Run

MIN_STEPS = 1000
"""Shorter runs are not measured: it takes about as long as a dozen steps."""
TURNS = 3


class Overhead(NamedTuple):
    """Of one step, forward and backward, without data, optimizer and EMA."""

    over_mae: float
    """Time of the step over that of plain MAE with the same encoder, decoder and batch, which decodes all that is
    hidden."""
    spread: float
    """Standard deviation of that over the turns."""
    teacher_share: float
    """Share of the teacher's pass in the time of the step."""


def measure_overhead(run: Run) -> Overhead | None:
    """Time the step and plain MAE's in turns, on random images; None where there is nothing but MAE, or no room for it.

    Nothing of the run changes: no image is fetched, no weight is moved, and random numbers are functions of the step.
    Under several processes all have to call it.
    """
    method, student, teacher = run.method, run.state.student, run.state.teacher
    if not method.needs_teacher and student.predictor is None:
        return None
    config, device = run.config, run.device
    (rows, columns), patch = run.stages[-1].grid, patch_size(student.encoder)
    part = run.position.slices(config.optimisation.batch_size)[0]
    views = part.stop - part.start
    pixels = (views // config.method.masks_per_image, config.data.channels, rows * patch[0], columns * patch[1])
    images = build_normalise(config).to(device)(torch.randint(256, pixels, dtype=torch.uint8, device=device))
    noise = torch.rand(views, rows * columns, device=device)
    plain = replace(method, predicted_loss=None, guide=None, mask_policy=hide_random, num_decoded=None, hardness=None)
    answers: Answers | None = None

    def ask() -> None:
        nonlocal answers
        answers = method.ask(teacher, images) if method.needs_teacher else None

    def solve() -> None:
        method.step(student, None, images, noise, num_hard=0, answers=answers).total.backward()

    def mae() -> None:
        features = None if answers is None else answers._replace(scores=None, guide=None)
        plain.step(student, None, images, noise, num_hard=0, answers=features).total.backward()

    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=run.bf16):
            rounds = [tuple(_seconds(act, device) for act in (ask, solve, mae)) for _ in range(TURNS + 1)][1:]
    except torch.OutOfMemoryError:  # plain MAE may need more memory than a run that decodes a part
        warn("the cost of mining over plain MAE was not measured: plain MAE does not fit into the device's memory")
        return None
    finally:
        student.zero_grad(set_to_none=True)
    kept = config.method.steps_per_batch
    ratios = [(asked / kept + solved) / alone for asked, solved, alone in rounds]
    shares = [asked / kept / (asked / kept + solved) for asked, solved, _ in rounds]
    return Overhead(statistics.fmean(ratios), statistics.stdev(ratios), statistics.fmean(shares))


def _seconds(act: Callable[[], None], device: torch.device) -> float:
    """Of one call, with the device done before and after."""
    synchronise(device)
    start = time.perf_counter()
    act()
    synchronise(device)
    return time.perf_counter() - start
