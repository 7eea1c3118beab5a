"""How a benchmark is shown: ratios within rounds, tables, JSON with a picture beside it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hardpatch.config.benchmark import LOADERS, VARIANTS
from hardpatch.figures.hardness import save_figure
from hardpatch.runtime.files import write_text_atomically

OTHERS = ("reference", "transformers", "lightly", "plain")
"""What is not ours is drawn in grey."""


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation; None of one value."""
    return statistics.stdev(values) if len(values) > 1 else None


def ratios_to(base: str, rounds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float | None] | None]:
    """How many times faster than ``base``: mean and standard deviation of the ratios of each round, by name.

    Args:
        base: The name of what the others are held against.
        rounds: The rates of each in every round.

    Returns:
        Under ``ratio_to_BASE`` and ``ratio_to_BASE_std``; None where ``base`` was not measured.
    """
    key = f"ratio_to_{base}"
    if base not in rounds:
        return {key: None, f"{key}_std": None}
    ratios = {name: [a / b for a, b in zip(values, rounds[base])] for name, values in rounds.items()}
    return {
        key: {name: statistics.fmean(values) for name, values in ratios.items()},
        f"{key}_std": {name: spread(values) for name, values in ratios.items()},
    }


def with_spread(result: Mapping[str, Any], key: str, name: str, digits: int) -> str:
    """A figure of ``result`` as ``mean +- standard deviation``; ``-`` where it was not measured."""
    if not result.get(key):
        return "-"
    deviation = result[f"{key}_std"][name]
    return f"{result[key][name]:,.{digits}f}" + ("" if deviation is None else f" +- {deviation:,.{digits}f}")


def step_table(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table of steps, header first."""
    rows: list[tuple[str, ...]] = [
        ("", "images/s", "of reference", "of MAE", "GFLOP/image", "of peak", "memory GB", "what")
    ]
    for name, memory in result["peak_memory_bytes"].items():
        rows.append((
            name,
            with_spread(result, "images_per_second", name, 1),
            with_spread(result, "ratio_to_reference", name, 2),
            with_spread(result, "ratio_to_mae", name, 2),
            f"{result['gflops_per_image'][name]:.1f}",
            f"{result['share_of_matmul_peak'][name]:.0%}",
            "-" if memory is None else f"{memory / 1e9:.2f}",
            VARIANTS[name].about if name in VARIANTS else "",
        ))  # fmt: skip
    return rows


def loader_table(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table of loaders, header first."""
    step = result["step"]
    rows: list[tuple[str, ...]] = [
        ("", "images/s per core", "of plain", *(["cores for the step"] if step else []), "what")
    ]
    for name, rate in result["images_per_second_per_core"].items():
        rows.append((
            name,
            with_spread(result, "images_per_second_per_core", name, 0),
            with_spread(result, "ratio_to_plain", name, 2),
            *([f"{step['images_per_second'] / rate:.1f}"] if step else []),
            LOADERS[name],
        ))  # fmt: skip
    return rows


def save(result: Mapping[str, Any], out: Path, key: str, base: str, title: str) -> None:
    """The figures as JSON, and beside it a picture: a bar for each name, with its spread and its ratio to another's.

    Args:
        result: Of the benchmark.
        out: The JSON file.
        key: Which figures are drawn.
        base: The name that ratios are taken to, where it was measured.
        title: What was measured, where.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out, json.dumps(result, indent=2) + "\n")
    rates, ratios = result[key], result[f"ratio_to_{base}"]
    deviations = [result[f"{key}_std"][name] or 0 for name in rates]
    figure = Figure(figsize=(8, 1 + 0.45 * len(rates)), layout="constrained")
    axes = figure.subplots()
    colours = ["#9aa0a6" if name in OTHERS else "#1f77b4" for name in rates]
    axes.barh(list(rates), list(rates.values()), xerr=deviations, color=colours, ecolor="#333333")
    for place, (name, deviation) in enumerate(zip(rates, deviations, strict=True)):
        told = f" {rates[name]:,.1f}" + (f"  ({ratios[name]:.2f} x {base})" if ratios else "")
        axes.text(rates[name] + deviation, place, told, va="center", fontsize=9)
    axes.set_xlim(0, 1.35 * max(rates.values()))
    axes.set_xlabel(key.replace("_", " "))
    axes.set_title(title, fontsize=9, wrap=True, parse_math=False)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, out.with_suffix(".png"))
