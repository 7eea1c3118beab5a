"""Timing training steps in turns.

In every round each stepper runs for about as long as the others, so that a machine that gets slower or busier does so
for all of them, and ratios are taken within a round. The order rotates from round to round.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from hardpatch.config.benchmark import VARIANTS, BenchmarkConfig
from hardpatch.data.loader.loading import Position, TrainingImages, TrainingOrder, default_workers, training_batches
from hardpatch.data.sources import Source
from hardpatch.runs.folder import versions
from hardpatch.runtime.distributed import has_bf16, release_memory, synchronise
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.files import write_text_atomically
from hardpatch.runtime.log import warn
from hardpatch.runtime.signals import StopSignal

WARMUP_STEPS = 3
SECONDS_AFTER_A_STOP = 1.0
"""That each has its turn for, once a signal has come."""
PEAK_PRODUCTS = 10
"""Matrix products timed together on CUDA: one takes little longer than the host's wait for it."""
PEAK_WARMUP_SECONDS = 0.5
PROFILED = 20
"""Operations in a profile."""
OUT_OF_MEMORY = r"out of memory|ALLOC_FAILED|can't allocate memory"
"""What torch's errors say that are not its OutOfMemoryError: MPS, cuBLAS, the CPU."""


@runtime_checkable
class Stepper(Protocol):
    """Something whose training step can be measured."""

    images_per_step: int
    """Different images in a step."""

    def step(self, fetch: Callable[[], torch.Tensor]) -> None:
        """One training step on the uint8 images that ``fetch`` gives, if it needs any."""
        ...

    def flops_per_view(self, images: torch.Tensor) -> float:
        """Floating-point operations of a step per student view; a multiply-add counts as two."""
        ...


def measure(
    builders: Mapping[str, Callable[[], Stepper]],
    config: BenchmarkConfig,
    *,
    batch_size: int,
    device: torch.device,
    source: Source | None = None,
) -> dict[str, Any]:
    """Build, warm up and time every stepper, in turns, and count what it needs.

    Args:
        builders: What makes each, by name.
        config: Sizes and conditions.
        batch_size: Student views a step.
        device: Where.
        source: Where images come from; None: random bytes on the device.

    Returns:
        Figures by name; images/s are student views per second. A signal to stop ends it early, with what was measured
        by then (at least one round).

    Raises:
        InputError: Nothing fits into memory.
        Exception: Whatever it was, if nothing can be measured for another reason. One that fails beside others that do
            not is left out, with the reason: measured is measured.
    """
    images = torch.randint(
        0, 256, (batch_size, 3, config.image_size, config.image_size), dtype=torch.uint8, device=device
    )
    ready: dict[str, Prepared] = {}
    left_out: dict[str, str] = {}
    failed: dict[str, Exception] = {}
    counts: dict[str, int] = {}
    with StopSignal() as stop:
        peak_flops = {precision: matmul_peak(device, dtype) for precision, dtype in _dtypes(device).items()}
        for number, (name, build) in enumerate(builders.items(), 1):
            _say(f"preparing {name} ({number} of {len(builders)})")
            try:
                ready[name] = _prepare(build, images, device, enough=lambda: bool(stop.name and ready))
            except _Enough:
                left_out[name] = f"{stop.name} came first"
            except InputError:
                raise
            except Exception as error:
                left_out[name] = _why(name, error, failed)
            if name in left_out:  # not above, where the exception still holds what did not fit
                release_memory(device)
        turns = {name: Turn(prepared.stepper, images, device, source) for name, prepared in ready.items()}
        for name in list(turns):  # what was alone when it was prepared may not fit beside the others
            try:
                seconds = config.seconds / config.rounds
                seconds = min(seconds, SECONDS_AFTER_A_STOP) if stop.name else seconds
                counts[name] = steps_of_a_turn(turns[name], seconds)
            except Exception as error:
                left_out[name] = _why(name, error, failed)
            if name in left_out:
                del turns[name], ready[name]
                release_memory(device)
        if not ready and failed:
            raise next(iter(failed.values()))
        if not ready:
            raise InputError(f"batch_size: must fit into the device's memory, got {batch_size}, which nothing does")
        for name, why in left_out.items():
            warn(f"{name} is left out: {why}")
        rates = take_turns(turns, counts, batch_size=batch_size, rounds=config.rounds, stop=stop)
        means = {name: statistics.fmean(values) for name, values in rates.items()}
        profiles = {}
        for name, prepared in ready.items() if config.profile and not stop.name else ():
            try:
                profiles[name] = profile(prepared.stepper, images, device)
            except Exception as error:  # a profiler that fails is no reason to lose what was timed
                warn(f"no profile of {name}: {_in_a_line(error)}")
    peak = next(iter(peak_flops.values()))
    return {
        "device": device_name(device),
        "images_per_second": means,
        "images_per_second_std": {name: _spread(values) for name, values in rates.items()},
        "images_per_second_rounds": rates,
        "peak_memory_bytes": {name: prepared.peak_memory for name, prepared in ready.items()},
        "preparation_seconds": {name: prepared.seconds for name, prepared in ready.items()},
        "gflops_per_image": {name: prepared.flops / 1e9 for name, prepared in ready.items()},
        "matmul_peak_tflops": {name: value / 1e12 for name, value in peak_flops.items()},
        "share_of_matmul_peak": {name: ready[name].flops * means[name] / peak for name in rates},
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "left_out": left_out,
        "failed": list(failed),
        "stopped_by": stop.name,
        **({"profile": profiles} if config.profile else {}),
    }


class Prepared(NamedTuple):
    """A stepper that is warm, and what was seen on the way."""

    stepper: Stepper
    flops: float
    """Of a step per student view."""
    peak_memory: int | None
    """Bytes of the device's memory that it takes at most, model included; None: not told on this device."""
    seconds: float
    """To build and warm it up, compilation included."""


class _Enough(Exception):  # noqa: N818  (no error)
    """A signal came while something was being prepared that can be done without."""


def _prepare(
    build: Callable[[], Stepper], images: torch.Tensor, device: torch.device, enough: Callable[[], bool]
) -> Prepared:
    """Build a stepper and warm it up.

    Args:
        build: Makes it.
        images: Random images on the device.
        device: Where.
        enough: Asked between any two parts of the work, which may compile for long: is it no longer wanted?

    Raises:
        _Enough: It was not.
    """
    start = time.perf_counter()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    if enough():
        raise _Enough
    stepper = build()
    flops = stepper.flops_per_view(images)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARMUP_STEPS):
        if enough():
            raise _Enough
        warm_up(stepper, images, device, steps=1)
    peak_memory = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    return Prepared(stepper, flops, peak_memory, time.perf_counter() - start)


def _why(name: str, error: Exception, failed: dict[str, Exception]) -> str:
    """Why something is left out; what is not for want of memory is told whole, and noted in ``failed``."""
    if isinstance(error, torch.OutOfMemoryError) or re.search(OUT_OF_MEMORY, str(error)):
        return "it does not fit into memory beside the others (a smaller --batch-size, or fewer at once)"
    traceback.print_exception(error)
    failed[name] = error.with_traceback(None)  # or its frames would hold the model
    return f"it failed: {_in_a_line(error)}"


def _in_a_line(error: Exception) -> str:
    """Type of an error and how its message begins."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def warm_up(stepper: Stepper, images: torch.Tensor, device: torch.device, *, steps: int = WARMUP_STEPS) -> None:
    """Some steps before the clock runs: kernels are chosen and compiled, memory is taken."""
    for _ in range(steps):
        stepper.step(partial(_first, images, stepper.images_per_step))
    synchronise(device)


def steps_of_a_turn(turn: Turn, seconds: float) -> int:
    """Steps that take about so long."""
    return max(1, math.ceil(seconds / turn.seconds(1)))


def take_turns(
    turns: Mapping[str, Turn],
    counts: Mapping[str, int],
    *,
    batch_size: int,
    rounds: int,
    stop: StopSignal | None = None,
) -> dict[str, list[float]]:
    """Time steppers that are warm: each once in every round.

    Args:
        turns: By name.
        counts: Steps of each in a turn, by :func:`steps_of_a_turn`.
        batch_size: Student views a step.
        rounds: How often each has its turn.
        stop: Once it has arrived, the rounds that are whole are enough; the first is always made.

    Returns:
        Student views per second of each in every round.
    """
    rates: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            if number and stop is not None and stop.name:
                return {name: values[:number] for name, values in rates.items()}
            rates[name].append(counts[name] * batch_size / turns[name].seconds(counts[name]))
        _say(f"round {number + 1} of {rounds}")
    return rates


def profile(stepper: Stepper, images: torch.Tensor, device: torch.device) -> dict[str, float]:
    """Share of each operation, on CUDA of each kernel, in the time of a step: the largest."""
    on_cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_cuda else []
    with torch.profiler.profile(activities=activities, acc_events=True) as found:
        stepper.step(partial(_first, images, stepper.images_per_step))
        synchronise(device)
    times: dict[str, float] = {}
    for event in found.key_averages():
        # A kernel's time stands with the kernel, with the operation that launched it, and with regions around both.
        if on_cuda and (event.device_type.name != "CUDA" or event.is_user_annotation):
            continue
        spent = float(event.self_device_time_total if on_cuda else event.self_cpu_time_total)
        times[event.key] = times.get(event.key, 0.0) + spent
    largest = sorted(times, key=lambda name: -times[name])[:PROFILED]
    return {name: times[name] / sum(times.values()) for name in largest}


class Turn:
    """Runs a stepper for some steps and says how long they took.

    Args:
        stepper: What is measured.
        images: Random images on the device, of the size that it takes.
        device: Where.
        source: Where images come from instead; every turn has data processes of its own, which start before the clock.
    """

    def __init__(
        self, stepper: Stepper, images: torch.Tensor, device: torch.device, source: Source | None = None
    ) -> None:
        self.stepper, self.device = stepper, device
        self.images = images[: stepper.images_per_step]
        self.training = None
        if source is not None:
            size = (images.shape[2], images.shape[3])
            self.training = TrainingImages(source, size=size, crop_scale=(0.2, 1.0), flip=True, seed=0)

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
        fetch = partial(next, batches)
        self.stepper.step(fetch)
        synchronise(self.device)
        start = time.perf_counter()
        for _ in range(num_steps):
            self.stepper.step(fetch)
        synchronise(self.device)
        return time.perf_counter() - start


def _first(images: torch.Tensor, count: int) -> torch.Tensor:
    return images[:count]


def device_name(device: torch.device) -> str:
    """What the device is, in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else versions(device)["device"]


def _dtypes(device: torch.device) -> dict[str, torch.dtype]:
    """The precisions that the hardware computes in, fastest first: one product in emulated bf16 takes 20 seconds."""
    return {"bf16": torch.bfloat16, "float32": torch.float32} if has_bf16(device) else {"float32": torch.float32}


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of large square matrix products, the best of ten times.

    Warm first: a GPU that was idle takes a while to reach its clock.
    """
    size, products = (8192, PEAK_PRODUCTS) if device.type == "cuda" else (2048, 1)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def seconds() -> float:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(products):
            a @ b
        synchronise(device)
        return (time.perf_counter() - start) / products

    warm_until = time.perf_counter() + (PEAK_WARMUP_SECONDS if device.type == "cuda" else 0)
    for _ in range(3):
        seconds()
    while time.perf_counter() < warm_until:
        seconds()
    return 2 * size**3 / min(seconds() for _ in range(10))


def _spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def ratios_to(figures: Mapping[str, Any], base: str) -> dict[str, dict[str, float | None] | None]:
    """How many times faster than ``base``: mean and standard deviation of the ratios of each round, by variant.

    Returns:
        Under ``ratio_to_BASE`` and ``ratio_to_BASE_std``; None where ``base`` was not measured.
    """
    rounds, key = figures["images_per_second_rounds"], f"ratio_to_{base}"
    if base not in rounds:
        return {key: None, f"{key}_std": None}
    ratios = {name: [a / b for a, b in zip(values, rounds[base])] for name, values in rounds.items()}
    return {
        key: {name: statistics.fmean(values) for name, values in ratios.items()},
        f"{key}_std": {name: _spread(values) for name, values in ratios.items()},
    }


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def save(result: Mapping[str, Any], out: Path) -> None:
    """The figures as JSON, and their picture beside it."""
    from hardpatch.tools.benchmark.figure import draw

    out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out, json.dumps(result, indent=2) + "\n")
    draw(result, out.with_suffix(".png"))


def table(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table that people read, header first."""

    def ratio(base: str, name: str) -> str:
        if not result.get(f"ratio_to_{base}"):
            return "-"
        mean, spread = result[f"ratio_to_{base}"][name], result[f"ratio_to_{base}_std"][name]
        return f"{mean:.2f}" + (f" +- {spread:.2f}" if spread is not None else "")

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
