"""Timing training steps in turns.

In every round each stepper runs for about as long as the others, so that a machine that gets slower or busier does so
for all of them, and ratios are taken within a round. The order rotates from round to round.
"""

from __future__ import annotations

import math
import re
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from hardpatch.config.benchmark import BenchmarkConfig
from hardpatch.runs.folder import versions
from hardpatch.runtime.distributed import choose_device, has_bf16, is_bf16, is_compiled, release_memory, synchronise
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import say, warn
from hardpatch.runtime.signals import StopSignal
from hardpatch.tools.benchmark.presentation import ratios_to, spread

WARMUP_STEPS = 3
SECONDS_AFTER_A_STOP = 1.0
"""Once a signal has come, each still has its turn, of so many seconds at most."""
PEAK_PRODUCTS = 10
"""Matrix products timed together on CUDA: one takes little longer than the host's wait for it."""
PEAK_WARMUP_SECONDS = 0.5
OUT_OF_MEMORY = r"out of memory|ALLOC_FAILED|can't allocate memory"
"""What torch's errors say that are not its OutOfMemoryError: MPS, cuBLAS, the CPU."""


@runtime_checkable
class Stepper(Protocol):
    """Something whose training step can be measured."""

    images_per_step: int
    """Different images in a step."""

    def step(self, fetch: Callable[[], torch.Tensor]) -> None:
        """One training step on the uint8 images that ``fetch`` gives."""
        ...

    def flops_per_view(self, images: torch.Tensor) -> float:
        """Floating-point operations of a step per student view; a multiply-add counts as two."""
        ...


class Prepared(NamedTuple):
    """A stepper that is warm, and what was seen on the way."""

    stepper: Stepper
    flops: float
    """Floating-point operations of a step per student view."""
    peak_memory: int | None
    """Bytes of the device's memory that it takes at most, model included; None: not told on this device."""
    seconds: float
    """To build and warm it up, compilation included."""


class _StoppedEarly(Exception):  # noqa: N818  (no error)
    """A signal came while something was being prepared that can be done without."""


class Conditions(NamedTuple):
    """Where and how steps are measured."""

    device: torch.device
    batch_size: int
    """Student views a step."""
    bf16: bool
    """Do steps (but the reference's) autocast?"""
    compiled: bool
    """Are the blocks (of our steps) compiled?"""

    @classmethod
    def of(cls, config: BenchmarkConfig) -> Conditions:
        """What follows from the settings on this machine."""
        device = choose_device(config.device)
        batch_size = config.batch_size or (256 if device.type == "cuda" else 16)
        return cls(device, batch_size, is_bf16(config.precision, device), is_compiled(config.compile, device))

    def as_json(self, config: BenchmarkConfig) -> dict[str, Any]:
        """For the record, with what all steps had in common."""
        common = ("image_size", "patch_size", "decoder_width", "decoder_depth", "seconds", "rounds")
        on_cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if on_cuda else versions(self.device)["device"],
            "model": config.encoder,
            "precision": "bf16" if self.bf16 else "float32",
            "compiled": self.compiled,
            "cudnn": torch.backends.cudnn.version() if on_cuda else None,
            "measured": "step alone",
            "settings": {"batch_size": self.batch_size, **{name: getattr(config, name) for name in common}},
            "versions": versions(self.device),
        }


class Trials:
    """Tries what may fail for each stepper, and remembers why one is left out; the others go on without it."""

    def __init__(self) -> None:
        self.left_out: dict[str, str] = {}
        """Why, by name."""
        self.failed: dict[str, Exception] = {}
        """Failures for another reason than want of memory."""

    def attempt(self, name: str, work: Callable[[], Any]) -> Any:
        """What ``work`` gives; None where it fails."""
        try:
            return work()
        except InputError:
            raise
        except _StoppedEarly as stopped:
            self.left_out[name] = f"{stopped} came first"
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) or re.search(OUT_OF_MEMORY, str(error)):
                self.left_out[name] = (
                    "it does not fit into memory beside the others (a smaller --batch-size, or fewer at once)"
                )
            else:
                traceback.print_exception(error)
                self.failed[name] = error.with_traceback(None)  # or its frames would hold the model
                self.left_out[name] = f"it failed: {_in_a_line(error)}"
        return None


def measure(
    builders: Mapping[str, Callable[[], Stepper]],
    config: BenchmarkConfig,
    conditions: Conditions,
) -> dict[str, Any]:
    """Build, warm up and time every stepper, in turns, and count what it needs.

    Args:
        builders: What makes each, by name.
        config: Sizes, seconds, rounds.
        conditions: What followed from them here.

    Returns:
        Figures by name; images/s are student views per second. A signal to stop ends it early, with what was measured
        by then (at least one round).

    Raises:
        InputError: Nothing fits into memory.
        Exception: Whatever it was, if nothing can be measured for another reason. One that fails beside others that do
            not is left out, with the reason: measured is measured.
    """
    device, batch_size = conditions.device, conditions.batch_size
    shape = batch_size, 3, config.image_size, config.image_size
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    trials = Trials()
    with StopSignal() as stop:
        # Of the precisions that the hardware computes in, fastest first: one product in emulated bf16 takes 20 seconds.
        precisions = {"bf16": torch.bfloat16, "float32": torch.float32}
        if not has_bf16(device):
            del precisions["bf16"]
        peaks = {precision: matmul_peak(device, dtype) for precision, dtype in precisions.items()}
        ready = _prepare_all(builders, images, device, trials, stop)
        turns = {name: Turn(prepared.stepper, images, device) for name, prepared in ready.items()}
        counts = _count_steps(turns, config.seconds / config.rounds, device, trials, stop)
        if not counts and trials.failed:
            raise next(iter(trials.failed.values()))
        if not counts:
            raise InputError(f"batch_size: must fit into the device's memory, got {batch_size}, which nothing does")
        for name, why in trials.left_out.items():
            ready.pop(name, None)
            warn(f"{name} is left out: {why}")
        rates = take_turns(turns, counts, batch_size=batch_size, rounds=config.rounds, stop=stop)
    return {
        **_figures(ready, rates, peaks),
        "left_out": trials.left_out,
        "failed": list(trials.failed),
        "stopped_by": stop.name,
        **conditions.as_json(config),
    }


def _prepare_all(
    builders: Mapping[str, Callable[[], Stepper]],
    images: torch.Tensor,
    device: torch.device,
    trials: Trials,
    stop: StopSignal,
) -> dict[str, Prepared]:
    """The steppers that can be built, warm."""
    ready: dict[str, Prepared] = {}
    for number, (name, build) in enumerate(builders.items(), 1):
        say(f"preparing {name} ({number} of {len(builders)})")
        enough = stop if ready else None  # one is always measured
        prepared: Prepared | None = trials.attempt(name, partial(_prepare, build, images, device, enough))
        if prepared is None:
            release_memory(device)  # not where the exception still holds what did not fit
        else:
            ready[name] = prepared
    return ready


def _count_steps(
    turns: dict[str, Turn], seconds: float, device: torch.device, trials: Trials, stop: StopSignal
) -> dict[str, int]:
    """Steps of each in a turn. What fitted alone may not fit beside the others: that is taken out of ``turns``."""
    counts: dict[str, int] = {}
    for name in list(turns):
        each = min(seconds, SECONDS_AFTER_A_STOP) if stop.name else seconds
        count: int | None = trials.attempt(name, partial(steps_of_a_turn, turns[name], each))
        if count is None:
            del turns[name]
            release_memory(device)
        else:
            counts[name] = count
    return counts


def _figures(
    ready: Mapping[str, Prepared], rates: Mapping[str, list[float]], peaks: Mapping[str, float]
) -> dict[str, Any]:
    """What was measured, by name."""
    means = {name: statistics.fmean(values) for name, values in rates.items()}
    return {
        "images_per_second": means,
        "images_per_second_std": {name: spread(values) for name, values in rates.items()},
        "images_per_second_rounds": rates,
        **ratios_to("reference", rates),
        **ratios_to("mae", rates),
        "peak_memory_bytes": {name: prepared.peak_memory for name, prepared in ready.items()},
        "preparation_seconds": {name: prepared.seconds for name, prepared in ready.items()},
        "gflops_per_image": {name: prepared.flops / 1e9 for name, prepared in ready.items()},
        "matmul_peak_tflops": {name: value / 1e12 for name, value in peaks.items()},
        "share_of_matmul_peak": {name: ready[name].flops * means[name] / next(iter(peaks.values())) for name in rates},
    }


def _prepare(
    build: Callable[[], Stepper], images: torch.Tensor, device: torch.device, stop: StopSignal | None
) -> Prepared:
    """Build a stepper and warm it up.

    Raises:
        _StoppedEarly: A signal came between two parts of the work, which may compile for long.
    """

    def look_for_a_signal() -> None:
        if stop is not None and stop.name:
            raise _StoppedEarly(stop.name)

    start = time.perf_counter()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    look_for_a_signal()
    stepper = build()
    flops = stepper.flops_per_view(images)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARMUP_STEPS):
        look_for_a_signal()
        warm_up(stepper, images, device, steps=1)
    peak_memory = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    return Prepared(stepper, flops, peak_memory, time.perf_counter() - start)


def _in_a_line(error: Exception) -> str:
    """Type of an error and how its message begins."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def warm_up(stepper: Stepper, images: torch.Tensor, device: torch.device, *, steps: int = WARMUP_STEPS) -> None:
    """Some steps before the clock runs: kernels are chosen and compiled, memory is taken."""
    for _ in range(steps):
        stepper.step(lambda: images[: stepper.images_per_step])
    synchronise(device)


class Turn:
    """Runs a stepper for some steps and says how long they took.

    Args:
        stepper: What is measured.
        images: Random images on the device, of the size that it takes.
        device: Where.
    """

    def __init__(self, stepper: Stepper, images: torch.Tensor, device: torch.device) -> None:
        self.stepper, self.device = stepper, device
        self.images = images[: stepper.images_per_step]

    def seconds(self, num_steps: int) -> float:
        """Time of ``num_steps`` steps, after one that is not counted."""
        self.stepper.step(lambda: self.images)
        synchronise(self.device)
        start = time.perf_counter()
        for _ in range(num_steps):
            self.stepper.step(lambda: self.images)
        synchronise(self.device)
        return time.perf_counter() - start


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
        say(f"round {number + 1} of {rounds}")
    return rates


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
