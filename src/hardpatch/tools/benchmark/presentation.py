"""How a benchmark is shown: ratios within rounds, tables, JSON with a picture beside it."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hardpatch.config.benchmark import LOADERS, VARIANTS
from hardpatch.figures.hardness import save_figure
from hardpatch.runtime.files import write_text_atomically

OTHERS = ("reference", "transformers", "lightly", "plain", "torchvision")
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


def save(result: Mapping[str, Any], out: Path, draw: Callable[[Mapping[str, Any], Axes], None]) -> None:
    """The figures as JSON, and their picture beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out, json.dumps(result, indent=2) + "\n")
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    draw(result, axes)
    figure.set_size_inches(8, 0.8 + 0.45 * len(axes.patches))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, out.with_suffix(".png"))


def draw_steps(result: Mapping[str, Any], axes: Axes) -> None:
    """Images per second of each variant, and how many times faster than the plain reference step it is."""
    base = "reference" if result.get("ratio_to_reference") else "mae"
    _bars(result, "images_per_second", f"ratio_to_{base}", "MAE mode" if base == "mae" else base, axes)
    size = result["settings"]["image_size"]
    axes.set_xlabel("images/s (student views)")
    axes.set_title(
        f"{result['model']}, {size} px, {result['precision']}, {result['device']}: {result['measured']}", fontsize=9
    )


def draw_loaders(result: Mapping[str, Any], axes: Axes) -> None:
    """Images per second and core of each loader, how many times the plain one that is, and what the step needs."""
    _bars(result, "images_per_second_per_core", "ratio_to_plain", "plain", axes)
    if step := result["step"]:
        needed = step["images_per_second"]
        if needed < axes.get_xlim()[1]:
            axes.axvline(needed, color="#d62728", linewidth=1)
        told = f"red: the step, {step['name']}: {needed:,.0f} images/s"
        axes.set_title(told, fontsize=9, color="#d62728", loc="right")
    about = textwrap.fill(result["images"], 90)
    axes.set_xlabel(f"images/s per core, crops of {result['settings']['image_size']} px\n{about}", fontsize=8)


def _bars(result: Mapping[str, Any], key: str, ratio: str, base: str, axes: Axes) -> None:
    """A bar for each name with its spread, and the ratio to ``base`` beside it."""
    rates, deviations = result[key], [result[f"{key}_std"][name] or 0 for name in result[key]]
    colours = ["#9aa0a6" if name in OTHERS else "#1f77b4" for name in rates]
    axes.barh(list(rates), list(rates.values()), xerr=deviations, color=colours, ecolor="#333333")
    for place, (name, deviation) in enumerate(zip(rates, deviations, strict=True)):
        told = f" {rates[name]:,.1f}" + (f"  ({result[ratio][name]:.2f} x {base})" if result.get(ratio) else "")
        axes.text(rates[name] + deviation, place, told, va="center", fontsize=9)
    axes.set_xlim(0, 1.35 * max(rates.values()))
