"""How long a training step of every row takes on this machine: what equal time is reckoned by."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hardpatch.config.config import Config
from hardpatch.config.values import with_fields
from hardpatch.runs.folder import versions
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.files import write_text_atomically
from hardpatch.runtime.log import say
from hardpatch.tools.benchmark.step import OurStep
from hardpatch.tools.benchmark.timing import Turn, steps_of_a_turn, take_turns, warm_up

SECONDS = 12.0
"""For each row, over all rounds; more where a step takes long."""
ROUNDS = 6

StepTimes = dict[str, float]
"""Seconds of a training step per student view, by row."""


class TimedStep(NamedTuple):
    """The step of a row as one process takes it."""

    config: Config
    """With the views of one forward pass as its batch."""
    bf16: bool
    compiled: bool

    @classmethod
    def of(cls, config: Config, device: torch.device) -> TimedStep:
        """The step of a run with this config on this device, under as many processes as there are."""
        run = config.run
        views = run.micro_batch_size or config.optimisation.batch_size // distributed.world_size()
        return cls(
            with_fields(config, {"batch_size": views}),
            distributed.is_bf16(run.precision, device),
            distributed.is_compiled(run.compile, device),
        )


def step_times(steps: Mapping[str, TimedStep], reference: str, file: Path, device: torch.device) -> StepTimes:
    """What was measured before, or the step of every row timed in turns, on random images that lie on the device.

    Of a forward and backward pass with teacher, optimizer and EMA; loading, evaluation and the exchange between
    processes are not in it. It is measured once and kept, so that an ablation that goes on has the same epochs.

    Args:
        steps: By row.
        reference: The row to which the ratios of the others are taken, within each round.
        file: Where the times are kept.
        device: Where the runs will train; under several processes the first one times its share of a batch.

    Raises:
        InputError: The file was measured on another device, or the rows do not fit into memory together.
    """
    here = versions(device)
    known = json.loads(file.read_text()) if file.is_file() else None
    if known is None:
        say(f"{len(steps)} rows: timing their steps in turns, at least {SECONDS:g} s each")
        try:
            rates = _rates(steps, device)
        except torch.OutOfMemoryError:
            raise InputError(
                f"equal_time: the device's memory is too small for the {len(steps)} rows side by side, which are timed "
                "in turns; name fewer --rows, or give a smaller --micro-batch-size"
            ) from None
        finally:
            distributed.release_memory(device)  # or the models would lie beside the first run's
        known = {
            "images_per_second": {row: statistics.fmean(values) for row, values in rates.items()},
            "images_per_second_rounds": rates,
            "versions": here,
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, json.dumps(known, indent=2) + "\n")
    elif known["versions"]["device"] != here["device"]:
        raise InputError(
            f"equal_time: the steps were timed on {known['versions']['device']}, and this is {here['device']}; go on "
            f"there, or remove {str(file)!r} to time them here"
        )
    return seconds_of(known["images_per_second_rounds"], reference)


def seconds_of(rates: Mapping[str, list[float]], reference: str) -> StepTimes:
    """Seconds per view whose ratios to the reference are the median ratios within rounds.

    A machine that was slower in one round was so for all rows; so every round is brought to the reference's median.
    Medians, because other work that begins between two turns of a round spoils that round alone.
    """
    base = rates[reference]
    of_reference = statistics.median(1 / rate for rate in base)
    return {
        row: of_reference * statistics.median(there / rate for there, rate in zip(base, values, strict=True))
        for row, values in rates.items()
    }


def known_by(steps: Mapping[str, TimedStep]) -> list[Any]:
    """What decides the times: the rows' models, methods, batches and precision."""
    return [
        [
            row, asdict(step.config.model), asdict(step.config.method), step.config.data.size,
            step.config.data.channels, step.config.optimisation.batch_size, step.config.run.activation_checkpointing,
            step.bf16, step.compiled,
        ]
        for row, step in steps.items()
    ]  # fmt: skip


def _rates(steps: Mapping[str, TimedStep], device: torch.device) -> dict[str, list[float]]:
    turns = {}
    for row, (config, bf16, compiled) in steps.items():
        step = OurStep(config, device=device, bf16=bf16, compiled=compiled)
        shape = (config.optimisation.batch_size, config.data.channels, *config.data.size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        warm_up(step, images, device)
        turns[row] = Turn(step, images, device)
    (views,) = {config.optimisation.batch_size for config, *_ in steps.values()}  # no row has a batch of its own
    counts = {row: steps_of_a_turn(turn, SECONDS / ROUNDS) for row, turn in turns.items()}
    return take_turns(turns, counts, batch_size=views, rounds=ROUNDS)
