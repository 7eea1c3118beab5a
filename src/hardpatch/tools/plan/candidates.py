"""A run that may be proposed, cut so that it fits into a device's memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hardpatch.config.config import Config
from hardpatch.config.plan import PlanConfig
from hardpatch.config.rules import split_batch
from hardpatch.config.values import with_fields
from hardpatch.cost.flops import training_flops
from hardpatch.cost.memory import StepMemory, step_memory
from hardpatch.method.vit import create_encoder
from hardpatch.runs.build import build_student
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.machine import free_memory
from hardpatch.tools.plan.sizes import LIGHT, LIGHT_WIDTH, MAX_EPOCHS, MIN_MICRO_BATCH, SIZES, Size, choose_batch
from hardpatch.training.sharding import check_sharding

FREE_SHARE = 0.9
"""Of the memory that is free now, a run may take so much."""
UNCOUNTED = 1.25
"""Memory of a step over what :mod:`hardpatch.cost.memory` counts: temporary results, images, CUDA's own."""
RECOMPUTED = 4 / 3
"""Work of a step whose activations are computed again."""


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
    """Of the longest run."""
    parameters: int
    """Of the student: encoder, decoder and predictor."""
    memory_bytes: int
    """Of a step on one device, counted, with room for what is not counted."""
    fits: bool
    flops: float
    """Of a step per view."""
    views_per_second: float = math.nan
    """Of all processes together, loading included."""
    measured: bool = False
    epochs: int = 0
    """Within the budget."""

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
    """A run with an encoder, all micro-batches at once."""
    chosen = dict(size.fields)
    if "decoder_depth" in chosen and base.model.predictor_depth == Config().model.predictor_depth:
        chosen["predictor_depth"] = chosen["decoder_depth"]  # not chosen by the method itself
    views_per_image = base.method.masks_per_image * base.data.crops_per_image
    chosen["batch_size"] = choose_batch(num_images, machine.processes, views_per_image)
    chosen["epochs"] = MAX_EPOCHS  # stands for those that the budget allows
    config = with_fields(base, {**chosen, **given})
    batch = config.optimisation.batch_size
    if batch > num_images:
        raise InputError(f"batch_size: must be at most the number of images ({num_images}), got {batch}")
    if config.run.sharding == "full":
        check_sharding(processes=machine.processes)
    split_batch(config, processes=machine.processes)
    return config


def make_candidate(size: Size, base: Config, given: Mapping[str, Any], num_images: int, machine: Machine) -> Candidate:
    """A run with an encoder, with micro-batches, recomputation and shards as memory asks for."""
    config = with_size(size, base, given, num_images, machine)
    share = config.optimisation.batch_size // machine.processes
    bf16 = distributed.is_bf16(config.run.precision, machine.device)
    ways = [(sharding, again) for sharding in ("none", "full") for again in (False, True)]
    ways = [
        (sharding, again) for sharding, again in ways
        if (sharding == "none" or machine.processes > 1)
        and sharding == given.get("sharding", sharding)
        and again == given.get("activation_checkpointing", again)
    ]  # fmt: skip
    together = config.method.masks_per_image * config.data.crops_per_image
    cuts = [n for n in range(share, 0, -1) if share % n == 0 and n % together == 0]
    if "micro_batch_size" in given:
        cuts = [given["micro_batch_size"] or share]
    counted: dict[tuple[str, bool], StepMemory] = {}
    least = math.inf
    for smallest in (MIN_MICRO_BATCH, 1):
        for sharding, again in ways:
            config = with_fields(
                config, {"sharding": sharding, "activation_checkpointing": again, "micro_batch_size": None}
            )
            if (sharding, again) not in counted:
                counted[sharding, again] = step_memory(
                    config, processes=machine.processes, bf16=bf16, device=machine.device
                )
            whole = counted[sharding, again]
            for views in (n for n in cuts if n >= smallest or n == cuts[0]):
                kept = whole.gradients * (machine.processes - 1) if sharding == "full" and views < share else 0
                needed = UNCOUNTED * (whole.of(views) + kept)  # whole gradients are kept until they are exchanged
                least = min(least, needed)
                if needed <= machine.memory:
                    config = with_fields(config, {"micro_batch_size": None if views == share else views})
                    return with_costs(size, config, needed, fits=True)
    return with_costs(size, config, least, fits=False)


def with_costs(size: Size, config: Config, memory: float, *, fits: bool) -> Candidate:
    """A candidate with its parameters and FLOPs counted."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_student(config).parameters())
    return Candidate(size, config, parameters, round(memory), fits, training_flops(config))
