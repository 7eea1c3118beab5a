"""``hpm plan``: a step of every encoder that comes into question is timed here, and the rules choose."""

from __future__ import annotations

import gc
import math
import shlex
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from hpm import distributed
from hpm.ablation.clock import TimedStep
from hpm.benchmark.step import OurStep
from hpm.benchmark.timing import Turn, warm_up
from hpm.build import build_decoder, build_student, open_images
from hpm.checkpoint import write_text_atomically
from hpm.config import Config, resolve_schedule, to_yaml, with_fields
from hpm.data.cache import free_memory
from hpm.data.describing import find_channels
from hpm.data.loading import default_workers
from hpm.data.sources import Source, open_source
from hpm.errors import InputError
from hpm.flops import training_flops
from hpm.log import say
from hpm.memory import step_memory
from hpm.planning.config import PlanConfig, parse_budget
from hpm.planning.images import ImagesFound, Loading, look_at, time_loading
from hpm.planning.sizes import (
    MIN_EPOCHS,
    SIZES,
    Size,
    choose_batch,
    choose_image_size,
    choose_patch,
    epochs_within,
    preferred,
)
from hpm.recipes import METHODS, TARGETS, recipe
from hpm.run_folder import versions

FREE_SHARE = 0.9
"""Of the memory that is free now, a run may take so much."""
UNCOUNTED = 1.25
"""Memory of a step over what :mod:`hpm.memory` counts: temporary results, gaps, images, what CUDA takes for itself."""
LOOKS = 0.05
"""Share of the budget that is kept for checkpoints, kNN and figures."""
FLOPS_OF_A_TIMED_STEP = 1e11
"""On a CPU a step is timed with as many views as come to this: larger ones take longer and tell no more."""
HOPELESS = 0.25
"""An encoder that gets less than this share of the passes that it should is the last that is measured; the times of
larger ones follow from their FLOPs."""


@dataclass(frozen=True)
class Candidate:
    """A run that may be proposed."""

    size: Size
    config: Config
    """Of a single epoch."""
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


def run(config: PlanConfig) -> dict[str, Any]:
    """Look at the images, time the steps, choose.

    Returns:
        What is proposed, and beside it what was seen and what every other encoder would do.

    Raises:
        InputError: A value that is wrong, images that cannot be read, or nothing that fits memory or budget.
    """
    budget = parse_budget(config.budget)
    base = _base(config)
    if config.out and Path(config.out).suffix not in (".yaml", ".yml"):
        raise InputError(f"out: must end in .yaml, got {config.out!r}")
    device = distributed.choose_device(config.device)
    processes = config.processes or (torch.cuda.device_count() if device.type == "cuda" else 1)
    if device.type == "cuda" and processes > torch.cuda.device_count():
        say(f"{processes} processes: their speed is {processes} times that of one here, exchange not included")
    base, source, found = _open(base, config)
    say(f"{_describe(found)}; looking at how fast they load")
    loading = time_loading(base, source, seconds=config.seconds)
    memory = config.memory_gigabytes * 1e9 if config.memory_gigabytes else FREE_SHARE * _free(device)
    sizes = _sizes(config)
    candidates = [_candidate(size, base, found.number, processes, memory, device) for size in sizes]
    candidates = _measured(candidates, config, budget, loading, processes, device, found.number)
    name = preferred({c.size.name: c.epochs for c in candidates if c.fits}, sizes, found.number)
    if name is None:
        raise InputError(_nothing(candidates, config, memory, found.number))
    chosen = next(c for c in candidates if c.size.name == name)
    found_again = {"value_range": (), "mean": (), "std": ()}  # by the run itself, in the same images
    final = with_fields(chosen.config, {"epochs": chosen.epochs, **found_again})
    schedule = resolve_schedule(final.optimisation, found.number)
    hours = schedule.total_steps * final.optimisation.batch_size / chosen.views_per_second / 3600 / (1 - LOOKS)
    if config.out:
        about = {"proposed_by": f"hpm plan --data {shlex.quote(config.data)} --budget {config.budget}"}
        write_text_atomically(Path(config.out).expanduser(), to_yaml(final, {**about, **versions(device)}))
    return {
        "command": command_for(final, recipe(config.method), config, processes),
        "method": config.method,
        "encoder": name,
        "epochs": chosen.epochs,
        "steps": schedule.total_steps,
        "hours": hours,
        "images_per_second": chosen.views_per_second,
        "memory_bytes": chosen.memory_bytes,
        "loading_images_per_second_per_core": loading.images_per_second,
        "cached": loading.cached,
        "advice": _advice(chosen, loading, processes, device),
        "images": found._asdict(),
        "candidates": [_row(candidate) for candidate in candidates],
        "config": {key: value for part in asdict(final).values() for key, value in part.items()},
        "budget_seconds": budget,
        "processes": processes,
        "versions": versions(device),
    }


def _base(config: PlanConfig) -> Config:
    """The method's recipe.

    Raises:
        InputError: It has a scale, which is what a plan chooses.
    """
    chosen = recipe(config.method)
    if config.method not in {"-".join(filter(None, (m, t))) for m in METHODS for t in ("", *TARGETS)}:
        raise InputError(
            f"method: must be METHOD[-TARGET] without a scale, which the plan chooses, got {config.method!r}"
        )
    return chosen


def _open(base: Config, config: PlanConfig) -> tuple[Config, Source, ImagesFound]:
    """The images, and the config with all that follows from them."""
    source = open_source(config.data, field="data")
    channels = config.channels or find_channels(source)
    base = with_fields(base, {"data": config.data, "channels": channels})
    found = look_at(open_source(config.data, decoder=build_decoder(base.data), field="data"))
    side = config.image_size or choose_image_size(found.height, found.width, config.patch_size)
    patch = config.patch_size or choose_patch(side)
    base = with_fields(base, {"image_size": side, "patch_size": patch})
    base, source = open_images(base)
    return base, source, found


def _sizes(config: PlanConfig) -> tuple[Size, ...]:
    return (Size(config.encoder, config.encoder, {}, 0),) if config.encoder else SIZES


def _candidate(
    size: Size, base: Config, num_images: int, processes: int, memory: float, device: torch.device
) -> Candidate:
    """A run with an encoder, with micro-batches, recomputation and shards as memory asks for."""
    masks = base.method.masks_per_image
    chosen = dict(size.fields)
    if "decoder_depth" in chosen and base.model.predictor_depth == Config().model.predictor_depth:
        chosen["predictor_depth"] = chosen["decoder_depth"]  # not chosen by the method itself
    batch = choose_batch(num_images, processes, masks)
    config = with_fields(base, {"encoder": size.encoder, "batch_size": batch, "epochs": 1, **chosen})
    bf16 = distributed.has_bf16(device)
    share, needed = batch // processes, 0
    for shards in ("none", "full") if processes > 1 else ("none",):
        for recompute in (False, True):
            config = with_fields(
                config, {"sharding": shards, "activation_checkpointing": recompute, "micro_batch_size": None}
            )
            whole = step_memory(config, processes=processes, bf16=bf16)
            views = share
            while views >= masks:
                kept = whole.gradients * (processes - 1) if shards == "full" and views < share else 0  # until exchanged
                needed = round(UNCOUNTED * (whole.of(views) + kept))
                if needed <= memory:
                    config = with_fields(config, {"micro_batch_size": None if views == share else views})
                    return _with_costs(size, config, needed, fits=True)
                views //= 2
    return _with_costs(size, config, needed, fits=False)


def _with_costs(size: Size, config: Config, memory: int, *, fits: bool) -> Candidate:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_student(config).parameters())
    return Candidate(size, config, parameters, memory, fits, training_flops(config))


def _measured(
    candidates: list[Candidate], config: PlanConfig, budget: float, loading: Loading, processes: int,
    device: torch.device, num_images: int,
) -> list[Candidate]:  # fmt: skip
    """With images per second and epochs; smallest first, until one is far too slow."""
    done: list[Candidate] = []
    last: Candidate | None = None
    step_rate = math.nan
    for candidate in candidates:
        hopeless = last is not None and last.epochs < HOPELESS * MIN_EPOCHS
        measured = candidate.fits and not hopeless and candidate.config.run.sharding == "none"
        if measured:
            say(f"{candidate.size.name}: timing its step")
            step_rate = processes * _step_rate(candidate, device, config.seconds)
        elif last is not None:
            step_rate *= last.flops / candidate.flops
        together = _with_loading(step_rate, loading, processes, device)
        timed = replace(
            candidate,
            views_per_second=together,
            measured=measured,
            epochs=epochs_within(budget * (1 - LOOKS), together, num_images) if math.isfinite(together) else 0,
        )
        done.append(timed)
        last = timed
    return done


def _step_rate(candidate: Candidate, device: torch.device, seconds: float) -> float:
    """Views per second of one process, on random images on the device."""
    config = candidate.config
    timed = TimedStep.of(config, device)
    views, masks = timed.config.optimisation.batch_size, config.method.masks_per_image
    if device.type == "cpu":
        enough = int(FLOPS_OF_A_TIMED_STEP / candidate.flops) // masks * masks
        views = min(views, max(masks, 2, enough))
    one = with_fields(timed.config, {"batch_size": views, "micro_batch_size": None, "sharding": "none"})
    stepper = OurStep(one, device=device, bf16=timed.bf16, compiled=timed.compiled)
    pixels = (stepper.images_per_step, config.data.channels, *config.data.size)
    images = torch.randint(0, 256, pixels, dtype=torch.uint8, device=device)
    try:
        warm_up(stepper, images, device)
        turn = Turn(stepper, images, device)
        steps = stepper.cycle * max(1, math.ceil(seconds / turn.seconds(stepper.cycle)))
        return steps * views / turn.seconds(steps)
    finally:
        del stepper, images
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _with_loading(step_rate: float, loading: Loading, processes: int, device: torch.device) -> float:
    """Views per second of the whole. On a CPU steps and loading share the cores, elsewhere they overlap."""
    cores = _loading_cores(processes, device)
    if device.type == "cpu":
        return 1 / (1 / step_rate + 1 / (cores * loading.images_per_second))
    return min(step_rate, cores * loading.images_per_second)


def _loading_cores(processes: int, device: torch.device) -> int:
    """Cores that load: all, where they compute as well; otherwise the data processes of this machine."""
    if device.type == "cpu":
        return torch.get_num_threads()
    return max(1, default_workers()) * min(processes, max(1, torch.cuda.device_count()))


def _free(device: torch.device) -> float:
    """Bytes that a run could take on a device."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else float(free_memory())


def _describe(found: ImagesFound) -> str:
    labels = f", {found.classes} classes" if found.classes else ", no labels"
    return f"{found.number:,} images, about {found.width}x{found.height} px{labels}"


def _advice(chosen: Candidate, loading: Loading, processes: int, device: torch.device) -> list[str]:
    """What a user should know before starting."""
    lines = []
    if chosen.epochs < MIN_EPOCHS:
        lines.append(
            f"{chosen.epochs} epochs are few: below {MIN_EPOCHS} masks have little time to grow hard; a longer "
            "--budget or a smaller --image-size would help"
        )
    limit = _loading_cores(processes, device) * loading.images_per_second
    if device.type != "cpu" and limit <= chosen.views_per_second:
        lines.append("loading limits this run: hpm data pack makes images quick to read, hpm benchmark data says more")
    return lines


def _row(candidate: Candidate) -> dict[str, Any]:
    """A candidate for the table and the JSON line."""
    optimisation, run_config = candidate.config.optimisation, candidate.config.run
    return {
        "name": candidate.size.name,
        "parameters": candidate.parameters,
        "memory_bytes": candidate.memory_bytes,
        "fits": candidate.fits,
        "batch_size": optimisation.batch_size,
        "micro_batch_size": run_config.micro_batch_size,
        "activation_checkpointing": run_config.activation_checkpointing,
        "sharding": run_config.sharding,
        "images_per_second": candidate.views_per_second,
        "measured": candidate.measured,
        "epochs": candidate.epochs,
        "min_images": candidate.size.min_images,
    }


def _nothing(candidates: list[Candidate], config: PlanConfig, memory: float, num_images: int) -> str:
    """Why there is no plan."""
    fitting = [c for c in candidates if c.fits]
    if not fitting:
        least = min(c.memory_bytes for c in candidates) / 1e9
        return (
            f"memory_gigabytes: the smallest step needs about {least:.1f} GB of a device, and {memory / 1e9:.1f} may "
            "be taken; give a smaller --image-size or --encoder"
        )
    hours = num_images / max(c.views_per_second for c in fitting) / 3600 / (1 - LOOKS)
    return (
        f"budget: must allow for one pass over the {num_images:,} images, which takes {hours:.2g} h here, got "
        f"{config.budget}; or give fewer or smaller images"
    )


def command_for(config: Config, base: Config, plan: PlanConfig, processes: int) -> str:
    """The command that runs a config: its recipe, and every field that differs from it, as flags."""
    words = ["hpm", "pretrain"]
    if processes > 1:
        words = ["torchrun", "--nproc-per-node", str(processes), "-m", "hpm", "pretrain"]
    words += ["--recipe", plan.method]
    for section in fields(Config):
        ours, theirs = getattr(config, section.name), getattr(base, section.name)
        for item in fields(ours):
            value = getattr(ours, item.name)
            if value != getattr(theirs, item.name):
                words += flag(item.name, value)
    return " ".join([*words, "--out", "RUN"])


def flag(name: str, value: Any) -> list[str]:
    """A field as the words that set it, quoted for a shell."""
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{dashed}" if value else f"--no-{dashed}"]
    if name == "image_size" and value[0] == value[-1]:
        value = value[0]
    parts = value if isinstance(value, tuple) else (value,)
    return [f"--{dashed}", *(shlex.quote(f"{part:g}" if isinstance(part, float) else str(part)) for part in parts)]
