"""How long a step takes here, and a run beside its steps."""

from __future__ import annotations

import time
from functools import partial
from typing import NamedTuple

import torch

from hardpatch.config.config import Config
from hardpatch.config.values import with_fields
from hardpatch.data.loader.loading import default_workers
from hardpatch.runtime import distributed
from hardpatch.runtime.machine import usable_cores
from hardpatch.tools.ablate.step_times import TimedStep
from hardpatch.tools.benchmark.step import OurStep
from hardpatch.tools.benchmark.timing import warm_up
from hardpatch.tools.plan.candidates import Candidate, Machine
from hardpatch.tools.plan.images_found import ImagesFound, Loading

FLOPS_OF_A_TIMED_STEP = 3e11
"""On a CPU a step is timed with as many views as come to this."""
LOOKS = 12
"""Looks at kNN accuracy in a run."""
SPARE = 0.05
"""Share of a run for figures and checkpoints."""
LOOK_COST = 0.5
"""Features of an image, of a training view: all patches, but neither decoder nor backward pass."""
START_SECONDS = 30.0
"""Imports, first images, the report at the end."""
COMPILE_SECONDS = 60.0


class StepSeconds(NamedTuple):
    """Of one process."""

    learn: float
    """Forward and backward, for each view."""
    finish: float
    """Clipping, optimizer and EMA, once a step."""


def reckoned(candidate: Candidate, other: Candidate, seconds: StepSeconds) -> StepSeconds:
    """The step of a candidate from that of another, by FLOPs and parameters."""
    return StepSeconds(
        seconds.learn * candidate.work / other.work, seconds.finish * candidate.parameters / other.parameters
    )


def step_seconds(candidate: Candidate, machine: Machine, seconds: float) -> StepSeconds | None:
    """Time the step of one process, on random images on the device; None where it does not fit after all."""
    try:
        return _step_seconds(candidate, machine, seconds)
    except torch.OutOfMemoryError:
        return None
    finally:
        distributed.release_memory(machine.device)  # or the model would lie beside the next one's


def _step_seconds(candidate: Candidate, machine: Machine, seconds: float) -> StepSeconds:
    config, device = candidate.config, machine.device
    together = config.method.masks_per_image * config.data.crops_per_image
    views = config.run.micro_batch_size or config.optimisation.batch_size // machine.processes
    if device.type == "cpu":
        views = min(views, max(2, int(FLOPS_OF_A_TIMED_STEP / candidate.flops)))
    views = max(together, views // together * together)
    timed = TimedStep.of(with_fields(config, {"batch_size": views, "micro_batch_size": views}), device)
    if timed.compiled:
        torch._dynamo.reset()  # nothing that was compiled for another encoder is needed
    stepper = OurStep(timed.config, device=device, bf16=timed.bf16, compiled=timed.compiled)
    pixels = (stepper.images_per_step, config.data.channels, *config.data.size)
    images = torch.randint(0, 256, pixels, dtype=torch.uint8, device=device)
    warm_up(stepper, images, device)
    fetch = partial(_same, images)
    learning = finishing = 0.0
    steps = 0
    while steps == 0 or learning + finishing < seconds:
        start = time.perf_counter()
        stepper.learn(fetch)
        distributed.synchronise(device)
        between = time.perf_counter()
        stepper.finish()
        distributed.synchronise(device)
        learning += between - start
        finishing += time.perf_counter() - between
        steps += 1
    return StepSeconds(learning / steps / views, finishing / steps)


def _same(images: torch.Tensor) -> torch.Tensor:
    return images


def with_loading(rate: float, config: Config, loading: Loading, machine: Machine) -> float:
    """Views per second of the whole. On a CPU steps and loading share the cores, elsewhere they overlap."""
    limit = loading_limit(config, loading, machine)
    return 1 / (1 / rate + 1 / limit) if machine.device.type == "cpu" else min(rate, limit)


def loading_limit(config: Config, loading: Loading, machine: Machine) -> float:
    """Views per second that could be loaded: a crop serves all masks, and all the steps for which a batch is kept."""
    workers = config.run.workers
    if machine.device.type == "cpu":
        cores = min(torch.get_num_threads(), max(1, default_workers() if workers is None else workers))
    else:  # the data processes of every training process, as default_workers shares the cores among them
        all_cores = usable_cores()
        each = max(1, min(8, all_cores // machine.processes - 1)) if workers is None else max(1, workers)
        cores = each * machine.processes
    views_per_crop = config.method.masks_per_image
    return cores * loading.crops_per_second * views_per_crop


def seconds_beside(candidate: Candidate, found: ImagesFound, machine: Machine) -> float:
    """Seconds of a run that do not grow with its length: start, compilation, looks at kNN accuracy."""
    run_config = candidate.config.run
    looks = LOOKS * min(found.number, run_config.knn_images) if run_config.knn and found.classes else 0
    compiled = machine.device.type == "cuda" and run_config.compile != "off"
    fixed = START_SECONDS + (COMPILE_SECONDS if compiled else 0)
    return fixed + LOOK_COST * looks / candidate.views_per_second


def seconds_of_run(training: float, candidate: Candidate, found: ImagesFound, machine: Machine) -> float:
    """A whole run, from the seconds of its training."""
    return training / (1 - SPARE) + seconds_beside(candidate, found, machine)


def seconds_for_training(budget: float, candidate: Candidate, found: ImagesFound, machine: Machine) -> float:
    """What is left for training; the inverse of :func:`seconds_of_run`."""
    return (budget - seconds_beside(candidate, found, machine)) * (1 - SPARE)
