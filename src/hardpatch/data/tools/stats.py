"""``hardpatch data stats``."""

from __future__ import annotations

import shlex
from typing import NamedTuple

from hardpatch.config.commands import StatsConfig
from hardpatch.data.images.decode import Decoder
from hardpatch.data.images.value_range import find_value_range
from hardpatch.data.loader.statistics import measure
from hardpatch.data.sources import open_source
from hardpatch.data.tools.describe import find_channels
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.machine import usable_cores


class StatsResult(NamedTuple):
    """Of all valid pixels of all images that can be read; values in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int
    images: int
    value_range: tuple[float, float] | None
    """What is 0 and what is 1; None: all images are 8-bit."""
    damaged: list[tuple[str, str]]
    """Left out, and why."""


def run(config: StatsConfig) -> StatsResult:
    """Measure.

    Raises:
        InputError: The source cannot be opened, or nothing of it can be read.
    """
    if len(config.value_range) not in (0, 2):
        raise InputError(f"value_range: needs the lowest and the highest value, got {config.value_range}")
    source = open_source(config.data, decoder=Decoder(config.channels or 3, no_data=config.no_data))
    channels = config.channels or find_channels(source)
    given = (config.value_range[0], config.value_range[1]) if config.value_range else None
    found = given or (None if source.decoder is None else find_value_range(source, no_data=config.no_data))
    source = open_source(config.data, decoder=Decoder(channels, found, config.no_data))
    cores = usable_cores()
    workers = (cores if cores > 1 else 0) if config.workers is None else config.workers
    measured = measure(source, workers=workers)
    return StatsResult(measured.mean, measured.std, channels, measured.images, found, measured.damaged)


def flags(config: StatsConfig, result: StatsResult) -> str:
    """Flags of ``hardpatch pretrain`` that say what was found."""
    words = ["--data", shlex.quote(config.data)]
    if result.channels != 3:
        words += ["--channels", str(result.channels)]
    if result.value_range:
        words += ["--value-range", *(f"{value:g}" for value in result.value_range)]
    if config.no_data is not None:
        words += ["--no-data", f"{config.no_data:g}"]
    words += ["--mean", *(f"{value:.6f}" for value in result.mean)]
    return " ".join([*words, "--std", *(f"{value:.6f}" for value in result.std)])
