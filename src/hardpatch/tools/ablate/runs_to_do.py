"""Which runs a table needs: every row with every seed, at equal epochs, compute and time; and where they live."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hardpatch.config.config import Config
from hardpatch.config.recipes import SCALES, recipe, without_scale
from hardpatch.config.values import decisions, with_fields
from hardpatch.cost.flops import training_flops
from hardpatch.data.sources import fingerprint
from hardpatch.runs.build import open_images
from hardpatch.runs.schedule import resolve_schedule
from hardpatch.runtime.errors import InputError, suggest
from hardpatch.runtime.log import warn
from hardpatch.tools.ablate.suites import SUITES, AblateConfig, Suite

Budget = Literal["epochs", "compute", "time"]
"""What is equal for all rows."""


class Job(NamedTuple):
    """One run of the table."""

    row: str
    seed: int
    budget: Budget
    config: Config
    flops: float
    """Of one training step per image."""
    folder: Path

    @property
    def epochs(self) -> int:
        """Length of the run."""
        return self.config.optimisation.epochs


class Rows(NamedTuple):
    """The rows of a table, checked, and what a step of each needs."""

    configs: dict[str, Config]
    """Of the first seed, at the epochs that all rows are given."""
    data: str
    """Fingerprint of the training images."""
    flops: dict[str, float]
    """Of a training step per image."""
    reference: str
    """Whose compute and time the others are given."""
    num_images: int


def choose_rows(config: AblateConfig, fields: Mapping[str, Any]) -> Rows:
    """The rows that were asked for, each with its config.

    Raises:
        InputError: Names the field, the rule and the value.
    """
    suite = chosen_suite(config)
    if not config.seeds or len(set(config.seeds)) < len(config.seeds) or min(config.seeds) < 0:
        raise InputError(f"seeds: must be different numbers from 0 on, at least one, got {config.seeds}")
    configs, data, num_images = _configs(config, suite, fields)
    flops = {row: training_flops(base) for row, base in configs.items()}
    reference = suite.reference if suite.reference in flops else max(flops, key=lambda row: flops[row])
    return Rows(configs, data, flops, reference, num_images)


def plan(config: AblateConfig, rows: Rows, step_seconds: Mapping[str, float] | None = None) -> list[Job]:
    """Every run of the table; seeds are the outer loop.

    Args:
        config: Seeds, folder, and which views there are.
        rows: As checked.
        step_seconds: What a step of each row takes, for the view at equal time; None: there is none.
    """
    prices: dict[Budget, Mapping[str, float]] = {}
    if config.equal_compute:
        prices["compute"] = rows.flops
    if step_seconds is not None:
        prices["time"] = step_seconds
    jobs = []
    for seed in config.seeds:
        for row, base in rows.configs.items():
            epochs = base.optimisation.epochs
            budgets: list[tuple[Budget, int]] = [("epochs", epochs)]
            for budget, price in prices.items():
                equal = max(1, round(epochs * price[rows.reference] / price[row]))
                if equal != epochs:
                    budgets.append((budget, equal))
            for budget, length in budgets:
                chosen = with_fields(base, {"seed": seed, "epochs": length})
                resolve_schedule(chosen.optimisation, rows.num_images)  # or a short one would fail after the others
                folder = _folder(Path(config.out), row, chosen, rows.data)
                jobs.append(Job(row, seed, budget, chosen, rows.flops[row], folder))
    return jobs


def _configs(config: AblateConfig, suite: Suite, fields: Mapping[str, Any]) -> tuple[dict[str, Config], str, int]:
    """The config of every row, the fingerprint of the training images, and their number.

    Raises:
        InputError: Names the field, the rule and the value.
    """
    if config.scale and config.scale not in SCALES:
        raise InputError(
            f"scale: no scale {config.scale!r}{suggest(config.scale, SCALES)}; there are {', '.join(SCALES)}"
        )
    for row in suite.rows:
        if row not in without_scale():
            recipe(row)  # says what is close to a name that is none
            raise InputError(f"rows: must be METHOD or METHOD-TARGET, the scale is set for all by --scale; got {row!r}")
    configs = {row: recipe(f"{row}-{config.scale}" if config.scale else row) for row in suite.rows}
    _check_fields(fields, configs)
    # The ablation measures at the end, the same for all: looks during training would only take time.
    same = {"figures": False, "knn": False, **fields, "val": ""}
    first = with_fields(next(iter(configs.values())), same)
    looked_at, source = open_images(first)
    same |= {name: getattr(looked_at.data, name) for name in ("value_range", "mean", "std")}
    different: dict[str, Config] = {}
    for row, base in configs.items():
        chosen = with_fields(base, same)
        resolve_schedule(chosen.optimisation, len(source))
        if twin := next((name for name, other in different.items() if other == chosen), None):
            warn(f"{row} is the same run as {twin} here; left out")
        else:
            different[row] = chosen
    return different, fingerprint(source), len(source)


def chosen_suite(config: AblateConfig) -> Suite:
    """The suite, with the rows that were asked for.

    Raises:
        InputError: There is no such suite.
    """
    if config.suite not in SUITES:
        raise InputError(
            f"suite: no suite {config.suite!r}{suggest(config.suite, SUITES)}; there are {', '.join(SUITES)}"
        )
    suite = SUITES[config.suite]
    if not config.rows:
        return suite
    if len(set(config.rows)) < len(config.rows):
        raise InputError(f"rows: must be different, got {', '.join(config.rows)}")
    return suite._replace(rows=config.rows)


def _check_fields(fields: Mapping[str, Any], configs: Mapping[str, Config]) -> None:
    """Refuse fields that would make rows alike, or that the ablation sets itself.

    Raises:
        InputError: Names the field.
    """
    for name in fields:
        if name == "seed":
            raise InputError("seed: every row runs with several; give seeds")
        values = {
            row: value
            for row, config in configs.items()
            for section in dataclasses.asdict(config).values()
            for key, value in section.items()
            if key == name
        }
        if len({repr(value) for value in values.values()}) > 1:
            told = ", ".join(f"{row}: {value!r}" for row, value in values.items())
            raise InputError(f"{name}: cannot be the same for every row, because the rows differ in it ({told})")


def _folder(out: Path, row: str, config: Config, data: str) -> Path:
    """The run folder of a config on some images: one that is there already, whatever row made it, or a new one."""
    named = dataclasses.replace(config, data=dataclasses.replace(config.data, data=data))
    name = digest(decisions(named))
    runs = out.expanduser() / "runs"
    there = sorted(runs.glob(f"*-{name}"))
    return there[0] if there else runs / f"{row}-seed{config.optimisation.seed}-{name}"


def digest(content: Any) -> str:
    """Eight characters that stand for some JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
