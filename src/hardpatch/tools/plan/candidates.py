"""Runs that may be proposed: with each encoder, cut so that it fits into memory, and what its step takes here."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from hardpatch.config.config import Config
from hardpatch.config.plan import PlanConfig
from hardpatch.config.rules import split_batch
from hardpatch.config.values import with_fields
from hardpatch.cost.flops import training_flops
from hardpatch.cost.memory import step_memory
from hardpatch.data.loader.loading import default_workers
from hardpatch.method.vit import create_encoder
from hardpatch.runs.build import build_student
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.machine import free_memory, usable_cores
from hardpatch.tools.ablate.step_times import TimedStep
from hardpatch.tools.benchmark.step import OurStep
from hardpatch.tools.benchmark.timing import warm_up
from hardpatch.tools.plan.images_found import Loading
from hardpatch.tools.plan.sizes import LIGHT, LIGHT_WIDTH, MAX_EPOCHS, MIN_MICRO_BATCH, SIZES, Size, choose_batch
from hardpatch.training.sharding import check_sharding

FREE_SHARE = 0.9
"""A run may take so much of the memory that is free now."""
UNCOUNTED = 1.25
"""Memory of a step over what :mod:`hardpatch.cost.memory` counts: temporary results, images, CUDA's own."""
RECOMPUTED = 4 / 3
"""Work of a step whose activations are computed again."""
FLOPS_OF_A_TIMED_STEP = 3e11
"""On a CPU a step is timed with as many views as come to this."""


@dataclass(frozen=True)
class Machine:
    """Where the run will be."""

    device: torch.device
    processes: int
    memory: float
    """Bytes of one device that a step may take."""


@dataclass(frozen=True)
class Candidate:
    """A run that may be proposed."""

    size: Size
    config: Config
    """The config of the longest run."""
    parameters: int
    """Parameters of the student: encoder, decoder and predictor."""
    memory_bytes: int
    """Memory of a step on one device, counted, with room for what is not counted."""
    fits: bool
    flops: float
    """FLOPs of a step per view."""
    views_per_second: float = math.nan
    """Views of all processes together, loading included."""
    measured: bool = False
    epochs: int = 0
    """Within the budget."""

    @classmethod
    def of(cls, size: Size, config: Config, memory: float, *, fits: bool) -> Candidate:
        """A candidate with its parameters and FLOPs counted."""
        with torch.device("meta"):
            parameters = sum(p.numel() for p in build_student(config).parameters())
        return cls(size, config, parameters, round(memory), fits, training_flops(config))

    @property
    def work(self) -> float:
        """FLOPs of a view, recomputed ones included."""
        return self.flops * (RECOMPUTED if self.config.run.activation_checkpointing else 1)


def find_machine(base: Config, config: PlanConfig) -> Machine:
    """The device, and how many.

    Raises:
        InputError: More processes than it has devices.
    """
    device = distributed.choose_device(base.run.device)
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    processes = config.processes or there
    if processes > there:
        raise InputError(f"processes: must be at most {there}, the number of GPUs here (1 without), got {processes}")
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    memory = FREE_SHARE * free if config.memory_gigabytes is None else 1e9 * config.memory_gigabytes
    return Machine(device, processes, memory)


def sizes_for(given: Mapping[str, Any]) -> tuple[Size, ...]:
    """The encoders that come into question."""
    if "encoder" not in given:
        if given.get("init_from"):
            raise InputError(
                f"init_from: also name the --encoder that these weights are of, got {given['init_from']!r}"
            )
        return SIZES
    with torch.device("meta"):
        width = create_encoder(given["encoder"], image_size=(224, 224)).embed_dim
    return (Size(given["encoder"], {"encoder": given["encoder"], **(LIGHT if width <= LIGHT_WIDTH else {})}),)


def with_size(size: Size, base: Config, given: Mapping[str, Any], num_images: int, machine: Machine) -> Config:
    """A run with an encoder, all micro-batches at once.

    Raises:
        InputError: The batch fits neither the images nor the processes.
    """
    processes, together = machine.processes, views_per_image(base)
    if processes * together > num_images:
        raise InputError(
            f"data: needs an image or more for each of {processes} processes with {together} views of each image, "
            f"got {num_images} images; give fewer --processes, --masks-per-image or --crops-per-image"
        )
    chosen = dict(size.fields)
    if "decoder_depth" in chosen and base.model.predictor_depth == Config().model.predictor_depth:
        chosen["predictor_depth"] = chosen["decoder_depth"]  # not chosen by the method itself
    chosen["batch_size"] = choose_batch(num_images, processes, together)
    chosen["epochs"] = MAX_EPOCHS  # stands for those that the budget allows
    config = with_fields(base, {**chosen, **given})
    batch = config.optimisation.batch_size
    if batch > num_images:
        raise InputError(f"batch_size: must be at most the number of images ({num_images}), got {batch}")
    if config.run.sharding == "full":
        check_sharding(processes=processes)
    split_batch(config, processes=processes)
    return config


def views_per_image(config: Config) -> int:
    """Views that come from one image and stay together in a micro-batch."""
    return config.method.masks_per_image * config.data.crops_per_image


def make_candidate(size: Size, base: Config, given: Mapping[str, Any], num_images: int, machine: Machine) -> Candidate:
    """A run with an encoder, with micro-batches, recomputation and shards as memory asks for."""
    config = with_size(size, base, given, num_images, machine)
    share, together = config.optimisation.batch_size // machine.processes, views_per_image(config)
    bf16 = distributed.is_bf16(config.run.precision, machine.device)
    shardings, again = ("none", "full") if machine.processes > 1 else ("none",), (False, True)
    choices = [{"sharding": one, "activation_checkpointing": two} for one in shardings for two in again]
    ways = [
        with_fields(config, {**choice, "micro_batch_size": None})
        for choice in choices
        if all(given.get(name, value) == value for name, value in choice.items())
    ]
    counted = cache(lambda way: step_memory(way, processes=machine.processes, bf16=bf16, device=machine.device))
    cuts = [n for n in range(share, 0, -1) if share % n == 0 and n % together == 0]
    if "micro_batch_size" in given:
        cuts = [given["micro_batch_size"] or share]
    least = math.inf
    for smallest in (MIN_MICRO_BATCH, 1):
        for way in ways:
            memory = counted(way)
            for views in (n for n in cuts if n >= smallest or n == cuts[0]):
                kept = memory.gradients * (machine.processes - 1) if way.run.sharding == "full" and views < share else 0
                needed = UNCOUNTED * (memory.of(views) + kept)  # whole gradients are kept until they are exchanged
                if needed <= machine.memory:
                    cut = with_fields(way, {"micro_batch_size": None if views == share else views})
                    return Candidate.of(size, cut, needed, fits=True)
                least = min(least, needed)
    return Candidate.of(size, ways[-1] if ways else config, least, fits=False)


class StepSeconds(NamedTuple):
    """How long the step of one process takes."""

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
    config, device, together = candidate.config, machine.device, views_per_image(candidate.config)
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
    learning = finishing = 0.0
    steps = 0
    while steps == 0 or learning + finishing < seconds:
        start = time.perf_counter()
        stepper.learn(lambda: images)
        distributed.synchronise(device)
        between = time.perf_counter()
        stepper.finish()
        distributed.synchronise(device)
        learning += between - start
        finishing += time.perf_counter() - between
        steps += 1
    return StepSeconds(learning / steps / views, finishing / steps)


def with_loading(rate: float, config: Config, loading: Loading, machine: Machine) -> float:
    """Views per second of the whole. On a CPU steps and loading share the cores, elsewhere they overlap."""
    limit = loading_limit(config, loading, machine)
    return 1 / (1 / rate + 1 / limit) if machine.device.type == "cpu" else min(rate, limit)


def loading_limit(config: Config, loading: Loading, machine: Machine) -> float:
    """Views per second that could be loaded: a crop serves all masks."""
    workers = config.run.workers
    if machine.device.type == "cpu":
        cores = min(torch.get_num_threads(), max(1, default_workers() if workers is None else workers))
    else:  # the data processes of every training process, as default_workers shares the cores among them
        all_cores = usable_cores()
        each = max(1, min(8, all_cores // machine.processes - 1)) if workers is None else max(1, workers)
        cores = each * machine.processes
    return cores * loading.crops_per_second * config.method.masks_per_image
