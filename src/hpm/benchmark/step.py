"""Images per second of a training step, each variant in turns with the others.

In every round each variant runs for about as long as the others, so that a machine that gets slower or busier does so
for all of them, and ratios are taken within a round. The order rotates from round to round.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.flop_counter import FlopCounterMode

from hpm import distributed
from hpm.benchmark.config import VARIANTS, BenchmarkConfig, StepConfig
from hpm.benchmark.plain import PlainStep
from hpm.build import build_method, build_normalise, build_optimizer, build_student, choose_attention, compile_blocks
from hpm.checkpoint import write_text_atomically
from hpm.config import Config, with_fields
from hpm.data.loading import Position, TrainingImages, TrainingOrder, default_workers, training_batches
from hpm.data.sources import Source, open_source
from hpm.distributed import synchronise
from hpm.errors import InputError
from hpm.flops import training_flops
from hpm.method import Teacher
from hpm.recipes import recipe
from hpm.run_folder import versions
from hpm.seeding import mask_noise

EMA_DECAY = 0.999
HARD_SHARE = 0.25
"""The mean of a run from 0 to 0.5; the time of a step does not depend on it."""
NUM_FLOP_IMAGES = 2
WARMUP_STEPS = 3

RECIPES = {
    "reference": "hpm-norm-pix",
    "mae": "mae-norm-pix",
    "exact": "hpm-norm-pix",
    "random+lpred": "random+lpred-norm-pix",
    "crossmae": "crossmae",
    "fast": "hpm-fast-norm-pix",
    "shared": "hpm-shared-norm-pix",
}
"""The recipe that each variant is a step of."""


@runtime_checkable
class Stepper(Protocol):
    """Something whose training step can be measured."""

    images_per_step: int
    """Different images in a step."""

    def step(self, images: torch.Tensor) -> None:
        """One training step on uint8 images."""
        ...

    def flops_per_view(self, images: torch.Tensor) -> float:
        """Floating-point operations of a step per student view; a multiply-add counts as two."""
        ...


class OurStep:
    """The step of ``hpm pretrain``.

    Args:
        config: Of the run.
        device: Where.
        bf16: Autocast.
        compiled: Compile the blocks.
    """

    def __init__(self, config: Config, *, device: torch.device, bf16: bool, compiled: bool) -> None:
        self.config = config
        self.batch_size, self.device, self.bf16 = config.optimisation.batch_size, device, bf16
        self.masks_per_image = config.method.masks_per_image
        self.images_per_step = self.batch_size // self.masks_per_image
        self.student = build_student(config).to(device)
        self.method = build_method(config, self.student)
        choose_attention(self.student, device)
        self.teacher = Teacher(self.student) if self.method.needs_teacher else None
        if compiled:
            compile_blocks(self.student, *([self.teacher] if self.teacher else []))
        self.optimizer = build_optimizer(config.optimisation, self.student)
        self.parameters = [p for p in self.student.parameters() if p.requires_grad]
        self.clip = config.optimisation.gradient_clip or math.inf
        self.normalise = build_normalise(config).to(device)
        self.num_hard = int(self.method.num_hidden * HARD_SHARE)
        self.steps_done = 0

    def step(self, images: torch.Tensor) -> None:
        """One training step on uint8 images, without a wait for the device."""
        noise = mask_noise(
            0, self.steps_done,
            batch_size=self.batch_size, num_patches=self.student.positions.shape[1], device=self.device,
        )  # fmt: skip
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            losses = self.method.step(self.student, self.teacher, self.normalise(images), noise, num_hard=self.num_hard)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.teacher is not None:
            self.teacher.update(self.student, EMA_DECAY)
        self.steps_done += 1

    def flops_per_view(self, images: torch.Tensor) -> float:
        """As :func:`hpm.flops.training_flops`."""
        return training_flops(self.config)


class ReferenceStep:
    """The plain step of :mod:`hpm.benchmark.plain`.

    Args:
        config: Of the run.
        device: Where.
    """

    def __init__(self, config: Config, *, device: torch.device) -> None:
        student = build_student(config).to(device)
        method = build_method(config, student)
        self.images_per_step = config.optimisation.batch_size
        self.plain = PlainStep(student, method.target, num_hidden=method.num_hidden, optimisation=config.optimisation)
        self.normalise = build_normalise(config).to(device)
        self.num_hard = int(method.num_hidden * HARD_SHARE)

    def step(self, images: torch.Tensor) -> None:
        """One training step on uint8 images."""
        noise = torch.rand(len(images), self.plain.student.positions.shape[1], device=images.device)
        self.plain.step(self.normalise(images), noise, num_hard=self.num_hard, ema_decay=EMA_DECAY)

    def flops_per_view(self, images: torch.Tensor) -> float:
        """Counted over a whole step of a few images."""
        with FlopCounterMode(display=False) as counter:
            self.step(images[:NUM_FLOP_IMAGES])
        return float(counter.get_total_flops() / len(images[:NUM_FLOP_IMAGES]))


def run(config: StepConfig) -> dict[str, Any]:
    """Measure the variants.

    Raises:
        InputError: A size does not fit, a variant is named twice, or the data cannot be read.
    """
    if len(set(config.variants)) < len(config.variants) or not config.variants:
        raise InputError(f"variants: must be different, at least one, got {', '.join(config.variants) or 'none'}")
    device = distributed.choose_device(config.device)
    batch_size = config.batch_size or (256 if device.type == "cuda" else 16)
    configs = {name: variant_config(name, config, batch_size) for name in config.variants}
    source = None
    if config.data:
        first = next(iter(configs.values()))
        source = open_source(config.data, channels=3, image_size=first.data.size, field="data")
        if len(source) < batch_size:
            raise InputError(f"data: needs at least batch_size ({batch_size}) images, got {len(source)}")
    bf16, compiled = is_bf16(config, device), is_compiled(config, device)
    steppers: dict[str, Callable[[], Stepper]] = {
        name: partial(ReferenceStep, chosen, device=device)
        if name == "reference"
        else partial(OurStep, chosen, device=device, bf16=bf16, compiled=compiled)
        for name, chosen in configs.items()
    }
    figures = measure(steppers, config, batch_size=batch_size, device=device, source=source)
    reference = "fp16" if device.type == "cuda" else "float32"
    return {
        **figures,
        "model": config.encoder,
        "precision": "bf16" if bf16 else "float32",
        "precision_of_reference": reference if "reference" in configs else None,
        "compiled": compiled,
        "measured": f"training from {config.data}" if config.data else "step alone",
        "ratio_to_reference": ratios_to(figures, "reference"),
        "ratio_to_mae": ratios_to(figures, "mae"),
        "settings": settings_of(config, batch_size),
        "versions": versions(device),
    }


def variant_config(name: str, config: BenchmarkConfig, batch_size: int) -> Config:
    """The config of a run of which a variant is the step.

    Raises:
        InputError: A size does not fit.
    """
    base = recipe(RECIPES[name])
    fields: dict[str, Any] = {
        "encoder": config.encoder,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "decoder_width": config.decoder_width,
        "decoder_depth": config.decoder_depth,
        "batch_size": batch_size,
    }
    if base.model.predictor_depth == Config().model.predictor_depth:  # not chosen by the variant itself
        fields["predictor_depth"] = config.decoder_depth
    return with_fields(base, fields)


def is_bf16(config: BenchmarkConfig, device: torch.device) -> bool:
    """Is it bf16?"""
    return config.precision == "bf16" or (config.precision == "auto" and distributed.has_bf16(device))


def is_compiled(config: BenchmarkConfig, device: torch.device) -> bool:
    """Are the blocks compiled?"""
    return config.compile == "on" or (config.compile == "auto" and device.type == "cuda")


def settings_of(config: BenchmarkConfig, batch_size: int) -> dict[str, Any]:
    """What all variants had in common."""
    names = ("image_size", "patch_size", "decoder_width", "decoder_depth", "seconds", "rounds")
    return {"batch_size": batch_size, **{name: getattr(config, name) for name in names}}


def measure(
    builders: Mapping[str, Callable[[], Stepper]],
    config: BenchmarkConfig,
    *,
    batch_size: int,
    device: torch.device,
    source: Source | None = None,
) -> dict[str, Any]:
    """Build, warm up and time every stepper, in turns.

    Args:
        builders: What makes each, by name.
        config: Sizes and conditions.
        batch_size: Student views a step.
        device: Where.
        source: Where images come from; None: random bytes on the device.

    Returns:
        Figures by name; images/s are student views per second.
    """
    images = torch.randint(
        0, 256, (batch_size, 3, config.image_size, config.image_size), dtype=torch.uint8, device=device
    )
    peak_flops = {precision: matmul_peak(device, dtype) for precision, dtype in _dtypes(device).items()}
    steppers: dict[str, Stepper] = {}
    flops: dict[str, float] = {}
    memory: dict[str, int | None] = {}
    for name, build in builders.items():
        _say(f"preparing {name}")
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        steppers[name] = stepper = build()
        flops[name] = stepper.flops_per_view(images)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(WARMUP_STEPS):
            stepper.step(images[: stepper.images_per_step])
        synchronise(device)
        memory[name] = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    turns = {name: Turn(stepper, images, device, config.image_size, source) for name, stepper in steppers.items()}
    counts = {name: max(1, math.ceil(config.seconds / config.rounds / turn.seconds(1))) for name, turn in turns.items()}
    rates: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for number in range(config.rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            rates[name].append(counts[name] * batch_size / turns[name].seconds(counts[name]))
        _say(f"round {number + 1} of {config.rounds}")
    means = {name: statistics.fmean(values) for name, values in rates.items()}
    return {
        "device": device_name(device),
        "images_per_second": means,
        "images_per_second_std": {name: _spread(values) for name, values in rates.items()},
        "images_per_second_rounds": rates,
        "peak_memory_bytes": memory,
        "gflops_per_image": {name: value / 1e9 for name, value in flops.items()},
        "matmul_peak_tflops": {name: value / 1e12 for name, value in peak_flops.items()},
        "share_of_matmul_peak": {name: flops[name] * means[name] / peak_flops["bf16"] for name in names},
    }


class Turn:
    """Runs a stepper for some steps and says how long they took.

    Args:
        stepper: What is measured.
        images: Random images on the device.
        device: Where.
        image_size: Side of the images, pixels.
        source: Where images come from instead; every turn has data processes of its own, which start before the clock.
    """

    def __init__(
        self, stepper: Stepper, images: torch.Tensor, device: torch.device, image_size: int, source: Source | None
    ) -> None:
        self.stepper, self.device = stepper, device
        self.images = images[: stepper.images_per_step]
        self.training = None
        if source is not None:
            self.training = TrainingImages(
                source, size=(image_size, image_size), crop_scale=(0.2, 1.0), flip=True, seed=0
            )

    def seconds(self, num_steps: int) -> float:
        """Of ``num_steps`` steps, after one that is not counted."""
        if self.training is None:
            return self._time(iter(lambda: self.images, None), num_steps)
        order = TrainingOrder(
            len(self.training.source), batch_size=self.stepper.images_per_step, first_step=0,
            total_steps=num_steps + 1, seed=0, position=Position(),
        )  # fmt: skip
        batches = training_batches(
            self.training, order, workers=default_workers(), pin_memory=self.device.type == "cuda"
        )
        with closing(batches):
            return self._time((batch.images.to(self.device, non_blocking=True) for batch in batches), num_steps)

    def _time(self, batches: Iterator[torch.Tensor], num_steps: int) -> float:
        self.stepper.step(next(batches))
        synchronise(self.device)
        start = time.perf_counter()
        for _ in range(num_steps):
            self.stepper.step(next(batches))
        synchronise(self.device)
        return time.perf_counter() - start


def device_name(device: torch.device) -> str:
    """What the device is, in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else versions(device)["device"]


def _dtypes(device: torch.device) -> dict[str, torch.dtype]:
    return {"bf16": torch.bfloat16, "float32": torch.float32}


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of large square matrix products, the best of ten."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(13):
        synchronise(device)
        start = time.perf_counter()
        a @ b
        synchronise(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times[3:])


def _spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def ratios_to(figures: Mapping[str, Any], base: str) -> dict[str, dict[str, float | None]] | None:
    """How many times faster than ``base``: mean and standard deviation of the ratios of each round."""
    rounds = figures["images_per_second_rounds"]
    if base not in rounds:
        return None
    ratios = {name: [a / b for a, b in zip(values, rounds[base])] for name, values in rounds.items()}
    return {name: {"mean": statistics.fmean(values), "std": _spread(values)} for name, values in ratios.items()}


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def save(result: Mapping[str, Any], out: Path) -> None:
    """The figures as JSON, and their picture beside it."""
    from hpm.benchmark.figure import draw

    out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out, json.dumps(result, indent=2) + "\n")
    draw(result, out.with_suffix(".png"))


def table(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table that people read, header first."""

    def ratio(base: str, name: str) -> str:
        if not result.get(f"ratio_to_{base}"):
            return "-"
        found = result[f"ratio_to_{base}"][name]
        return f"{found['mean']:.2f}" + (f" +- {found['std']:.2f}" if found["std"] is not None else "")

    rows: list[tuple[str, ...]] = [
        ("", "images/s", "of reference", "of MAE", "GFLOP/image", "of peak", "memory GB", "what")
    ]
    for name, rate in result["images_per_second"].items():
        spread, memory = result["images_per_second_std"][name], result["peak_memory_bytes"][name]
        rows.append((
            name,
            f"{rate:.1f}" + (f" +- {spread:.1f}" if spread is not None else ""),
            ratio("reference", name),
            ratio("mae", name),
            f"{result['gflops_per_image'][name]:.1f}",
            f"{result['share_of_matmul_peak'][name]:.0%}",
            "-" if memory is None else f"{memory / 1e9:.2f}",
            VARIANTS.get(name, ""),
        ))  # fmt: skip
    return rows
