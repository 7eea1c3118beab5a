"""The picture of a benchmark: a bar for each variant, with its spread."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hardpatch.figures.hardness import save_figure


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Images per second of each variant, and how many times faster than the plain reference step it is."""
    rates = result["images_per_second"]
    names = list(rates)
    spread = [result["images_per_second_std"][name] or 0 for name in names]
    figure = Figure(figsize=(8, 0.6 + 0.45 * len(names)), layout="constrained")
    axes = figure.subplots()
    colours = ["#9aa0a6" if name in ("reference", "transformers", "lightly") else "#1f77b4" for name in names]
    axes.barh(names, [rates[name] for name in names], xerr=spread, color=colours, ecolor="#333333")
    axes.invert_yaxis()
    ratios = result.get("ratio_to_reference") or result.get("ratio_to_mae")
    base = "reference" if result.get("ratio_to_reference") else "MAE mode"
    for place, name in enumerate(names):
        told = f" {rates[name]:,.1f}" + (f"  ({ratios[name]:.2f} x {base})" if ratios else "")
        axes.text(rates[name] + spread[place], place, told, va="center", fontsize=9)
    axes.set_xlim(0, 1.35 * max(rates.values()))
    axes.set_xlabel("images/s (student views)")
    size = result["settings"]["image_size"]
    axes.set_title(
        f"{result['model']}, {size} px, {result['precision']}, {result['device']}: {result['measured']}", fontsize=9
    )
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def draw_loaders(result: Mapping[str, Any], path: Path) -> None:
    """Images per second and core of each loader, how many times the plain one that is, and what the step needs."""
    rates = result["images_per_second_per_core"]
    names = list(rates)
    spread = [result["images_per_second_per_core_std"][name] or 0 for name in names]
    figure = Figure(figsize=(8, 0.9 + 0.45 * len(names)), layout="constrained")
    axes = figure.subplots()
    colours = ["#9aa0a6" if name in ("plain", "torchvision") else "#1f77b4" for name in names]
    axes.barh(names, [rates[name] for name in names], xerr=spread, color=colours, ecolor="#333333")
    axes.invert_yaxis()
    for place, name in enumerate(names):
        told = f" {rates[name]:,.0f}  ({result['ratio_to_plain'][name]:.1f} x plain)"
        axes.text(rates[name] + spread[place], place, told, va="center", fontsize=9)
    axes.set_xlim(0, 1.3 * max(rates.values()))
    if step := result["step"]:
        needed = step["images_per_second"]
        if needed < axes.get_xlim()[1]:
            axes.axvline(needed, color="#d62728", linewidth=1)
        axes.set_title(
            f"red: the step, {step['name']}: {needed:,.0f} images/s", fontsize=9, color="#d62728", loc="right"
        )
    about = textwrap.fill(result["images"], 90)
    size = result["settings"]["image_size"]
    axes.set_xlabel(f"images/s per core, crops of {size} px\n{about}", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
