"""What ``hardpatch plan`` can be told, beside every field of the run itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Annotated

from pydantic import Field

from hardpatch.config.fields import Positive, PositiveFloat, Settings
from hardpatch.config.recipes import without_scale
from hardpatch.runtime.errors import InputError, suggest

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class PlanConfig(Settings):
    """Propose a run for your images, your machine and your time: model, sizes, batch, epochs; hours and memory.

    The fields of the config below are those of hardpatch pretrain, with its defaults: what you give holds; encoder,
    sizes, channels, batch, memory and epochs are chosen where you do not.
    """

    budget: str = "8h"
    """How long the run may take: a number and s, m, h or d, e.g. 90m, 8h, 2d."""
    out: str = ""
    """Also write the proposal as a config, for hardpatch pretrain --config FILE.yaml."""
    method: str = "hpm-fast-in-pixels"
    """Recipe without a scale, METHOD[-TARGET], see hardpatch recipes."""
    processes: Positive | None = None
    """Training processes, one per GPU; none: as many as this machine has GPUs; 1 on a CPU."""
    memory_gigabytes: PositiveFloat | None = None
    """Memory of one device that the run may take; none: nine tenths of what is free here."""
    seconds: Annotated[float, Field(gt=0, le=600)] = 5.0
    """Time each encoder's step, and loading, for about as long."""


def parse_budget(text: str) -> float:
    """Seconds of a duration such as 90m, 8h or 2d.

    Raises:
        InputError: It is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([smhd])", text.strip().lower())
    if found is None or float(found[1]) <= 0:
        raise InputError(f"budget: must be a number above 0 and s, m, h or d (90m, 8h, 2d), got {text!r}")
    return float(found[1]) * _UNITS[found[2]]


def check_starts(starts: Mapping[str, object], budget: str | None) -> None:
    """At most one start of a run may be given, and a budget goes with a recipe alone.

    Raises:
        InputError: More than one, or a budget beside another.
    """
    given = {name: value for name, value in starts.items() if value is not None}
    if len(given) > 1:
        values = ", ".join(repr(value) if isinstance(value, str | PathLike) else "a config" for value in given.values())
        raise InputError(f"{', '.join(given)}: give one, not both, got {values}")
    if budget is None:
        return
    parse_budget(budget)
    if other := next((name for name in given if name != "recipe"), None):
        raise InputError(f"budget: chooses sizes and length, and {other} has chosen them; got {budget!r} as well")
    if (recipe := given.get("recipe")) and recipe not in without_scale():
        raise InputError(
            f"recipe: beside a budget it must be METHOD[-TARGET], without a scale, which is chosen; got {recipe!r}"
            f"{suggest(str(recipe), without_scale())}"
        )


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
