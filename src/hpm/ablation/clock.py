"""How long a training step of every row takes on this machine: what equal time is reckoned by."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hpm import distributed
from hpm.benchmark.step import OurStep
from hpm.benchmark.timing import Turn, take_turns, warm_up
from hpm.checkpoint import write_text_atomically
from hpm.config import Config, with_fields
from hpm.errors import InputError
from hpm.log import say
from hpm.run_folder import versions

SECONDS = 12.0
"""For each row, over all rounds."""
ROUNDS = 6

StepTimes = dict[str, float]
"""Seconds of a training step per student view, by row."""


def step_times(configs: Mapping[str, Config], file: Path, device: torch.device) -> StepTimes:
    """What was measured before, or the step of every row timed in turns, on random images that lie on the device.

    Loading is not in it, evaluation neither. It is measured once and kept, so that an ablation that goes on has the
    same epochs.

    Args:
        configs: By row.
        file: Where the times are kept.
        device: Where the runs will train; under several processes the first one times its share of a batch.

    Raises:
        InputError: The file was measured on another device.
    """
    here = versions(device)
    known = json.loads(file.read_text()) if file.is_file() else None
    if known is None:
        say(f"{len(configs)} rows: timing their steps in turns, {SECONDS:g} s each")
        rates = _rates(configs, device)
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
    return seconds_of(known["images_per_second_rounds"])


def seconds_of(rates: Mapping[str, list[float]]) -> StepTimes:
    """Seconds per view whose ratios are the mean ratios within rounds.

    A machine that was slower in one round was so for all rows; so every round is brought to the first row's mean.
    """
    first, *_ = rates.values()
    of_first = statistics.fmean(1 / rate for rate in first)
    return {
        row: of_first * statistics.fmean(base / rate for base, rate in zip(first, values, strict=True))
        for row, values in rates.items()
    }


def known_by(configs: Mapping[str, Config]) -> list[Any]:
    """What decides the times: the rows' models, methods and batches."""
    return [[row, asdict(c.model), asdict(c.method), c.data.size, asdict(c.optimisation)] for row, c in configs.items()]


def _rates(configs: Mapping[str, Config], device: torch.device) -> dict[str, list[float]]:
    turns = {}
    views = 0
    for row, config in configs.items():
        views = config.run.micro_batch_size or config.optimisation.batch_size // distributed.world_size()
        bf16 = config.run.precision == "bf16" or (config.run.precision == "auto" and distributed.has_bf16(device))
        compiled = config.run.compile == "on" or (config.run.compile == "auto" and device.type == "cuda")
        step = OurStep(with_fields(config, {"batch_size": views}), device=device, bf16=bf16, compiled=compiled)
        shape = (views, config.data.channels, *config.data.size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        warm_up(step, images, device)
        turns[row] = Turn(step, images, device)
    return take_turns(turns, batch_size=views, seconds=SECONDS, rounds=ROUNDS)
