"""The schedules of one run: a config's epochs and shares resolved to steps, for the images at hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hardpatch.config.config import OptimisationConfig
from hardpatch.method.schedules import (
    EmaSchedule,
    adapted_ema,
    adapted_warmup_steps,
    constant_learning_rate,
    learning_rate,
)
from hardpatch.runtime.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """The schedule of a run, resolved to steps."""

    steps_per_epoch: int
    total_steps: int
    ramp_steps: int
    """Length that the hard share is spread over: that of the run, or of the one that it branched off."""
    warmup_steps: int
    cooldown_steps: int
    """Last steps of a constant learning rate, in which it falls to 0; 0 with a cosine, which falls all the time."""
    peak_learning_rate: float
    ema: EmaSchedule

    @property
    def branching_step(self) -> int | None:
        """The last step from which a run of another length can branch off; None with a cosine."""
        return self.total_steps - self.cooldown_steps if self.cooldown_steps else None

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        lengths = {"warmup_steps": self.warmup_steps, "total_steps": self.total_steps}
        if self.cooldown_steps:
            return constant_learning_rate(
                step, peak=self.peak_learning_rate, cooldown_steps=self.cooldown_steps, **lengths
            )
        return learning_rate(step, peak=self.peak_learning_rate, **lengths)


def resolve_schedule(config: OptimisationConfig, num_images: int) -> Schedule:
    """Turn epochs into steps and fill in the constants that adapt to the run's length.

    Raises:
        InputError: The batch is larger than the data, or the run too short for its schedules.
    """
    if config.batch_size > num_images:
        raise InputError(f"batch_size: must be at most the number of images ({num_images}), got {config.batch_size}")
    steps_per_epoch = num_images // config.batch_size
    total_steps = config.epochs * steps_per_epoch
    ramp_steps = (config.schedule_epochs or config.epochs) * steps_per_epoch
    ema = adapted_ema(ramp_steps)
    if config.ema_start is not None:
        ema = ema._replace(start=config.ema_start)
    if config.ema_end is not None:
        ema = ema._replace(end=config.ema_end)
    if config.ema_ramp_epochs is not None:
        ema = ema._replace(ramp_steps=math.ceil(config.ema_ramp_epochs * steps_per_epoch))
    if ema.start > ema.end:
        raise InputError(
            f"ema_start: must be at most ema_end, got {ema.start:g} and {ema.end:g} (one that is not given "
            "adapts to the length of the run: give both)"
        )
    warmup = config.warmup_epochs
    warmup_steps = adapted_warmup_steps(ramp_steps) if warmup is None else math.ceil(warmup * steps_per_epoch)
    if warmup_steps >= total_steps and warmup_steps:
        raise InputError(
            f"epochs: must be longer than the warm-up of {warmup_steps} steps, got {config.epochs}, which are "
            f"{total_steps}"
        )
    return Schedule(
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        ramp_steps=ramp_steps,
        warmup_steps=warmup_steps,
        cooldown_steps=_cooldown_steps(config, total_steps, warmup_steps),
        peak_learning_rate=config.base_learning_rate * config.batch_size / 256,
        ema=ema,
    )


def _cooldown_steps(config: OptimisationConfig, total_steps: int, warmup_steps: int) -> int:
    """Length of the cool-down: 0 with a cosine, at least one step with a constant learning rate.

    Raises:
        InputError: It would begin before the warm-up has ended.
    """
    if config.learning_rate_schedule != "constant":
        return 0
    given = config.cooldown_epochs
    steps = math.ceil(total_steps / 5 if given is None else given * (total_steps // config.epochs))
    if steps > total_steps - warmup_steps:
        raise InputError(
            f"cooldown_epochs: must begin after the warm-up of {warmup_steps} steps and last at most "
            f"{total_steps - warmup_steps} of the run's {total_steps} steps, got {steps}"
        )
    return steps
