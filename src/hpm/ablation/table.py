"""The table of an ablation as Markdown, CSV and figure: mean and standard deviation, differences paired by seed."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure

from hpm.checkpoint import write_text_atomically
from hpm.visualize import save_figure


@dataclass(frozen=True)
class Outcome:
    """What one run came to."""

    row: str
    seed: int
    budget: Literal["epochs", "compute"]
    epochs: int
    samples: int
    gflop_per_image: float
    """Of a training step, counted."""
    pflop: float
    """Of the whole run."""
    seconds: float | None
    """Of training, without evaluation."""
    reconstruction_loss: float | None
    knn_top1: float | None
    """Percent."""
    rank_correlation: float | None
    foreground_auroc: float | None
    failed: str | None
    folder: str


class View:
    """One of the two ways to compare: every row at its epochs, or every row at the reference's compute.

    Args:
        outcomes: All runs that are done.
        budget: Which view.
        longer: Rows that are given other epochs for equal compute; the rest stand in both views.
    """

    def __init__(
        self, outcomes: Sequence[Outcome], budget: Literal["epochs", "compute"], longer: Collection[str]
    ) -> None:
        self.rows: dict[str, list[Outcome]] = {}
        for name in dict.fromkeys(outcome.row for outcome in outcomes):
            wanted = "compute" if budget == "compute" and name in longer else "epochs"
            self.rows[name] = [run for run in outcomes if run.row == name and run.budget == wanted]

    def accuracies(self, name: str) -> dict[int, float]:
        """Accuracy of a row by seed."""
        return {run.seed: run.knn_top1 for run in self.rows.get(name, []) if run.knn_top1 is not None}


def write_tables(
    out: Path,
    suite: str,
    baseline: str,
    question: str,
    outcomes: Sequence[Outcome],
    longer: Collection[str],
    untrained: Mapping[int, float],
    about: Mapping[str, str],
) -> None:
    """Write ``SUITE.md``, ``SUITE.csv`` and ``SUITE.png``.

    Args:
        out: The folder.
        suite: Name of the table.
        baseline: Row that differences are quoted against.
        question: What the table asks.
        outcomes: All runs that are done.
        longer: Rows that are given other epochs for equal compute.
        untrained: Accuracy of the untrained encoder by seed.
        about: Data, versions, hardware, command.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out / f"{suite}.csv", as_csv(outcomes))
    write_text_atomically(
        out / f"{suite}.md", as_markdown(suite, baseline, question, outcomes, longer, untrained, about)
    )
    if any(run.knn_top1 is not None for run in outcomes):
        save_figure(draw(suite, outcomes, longer, untrained), out / f"{suite}.png")


def as_csv(outcomes: Sequence[Outcome]) -> str:
    """One line per run."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Outcome)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(outcome) for outcome in outcomes)
    return text.getvalue()


def as_markdown(
    suite: str,
    baseline: str,
    question: str,
    outcomes: Sequence[Outcome],
    longer: Collection[str],
    untrained: Mapping[int, float],
    about: Mapping[str, str],
) -> str:
    """Both views, each a table, with what a number needs beside it."""
    seeds = sorted({run.seed for run in outcomes})
    lines = [f"# {suite}", "", question, ""]
    lines += [f"Mean ± standard deviation over seeds ({', '.join(map(str, seeds)) or 'none yet'}). "
              f"The difference to {baseline} is paired by seed.", ""]  # fmt: skip
    if untrained:
        lines += [f"20-NN top-1 of the untrained encoder: {mean_and_spread(list(untrained.values()), 1)} %.", ""]
    budgets: list[tuple[Literal["epochs", "compute"], str]] = [("epochs", "Equal epochs")]
    if any(run.budget == "compute" for run in outcomes):
        budgets.append(("compute", "Equal compute"))
    for budget, title in budgets:
        lines += [f"## {title}", "", *_markdown_rows(View(outcomes, budget, longer), baseline), ""]
    failed = [run for run in outcomes if run.failed]
    lines += [f"- {run.row}, seed {run.seed}: {run.failed}" for run in failed] + ([""] if failed else [])
    lines += [f"- {name}: {value}" for name, value in about.items()]
    return "\n".join(lines) + "\n"


HEADER = ("", "20-NN top-1 %", "difference", "rank correlation", "foreground AUROC", "runs", "epochs", "samples",
          "GFLOP/image", "PFLOP", "seconds")  # fmt: skip


def _markdown_rows(view: View, baseline: str) -> list[str]:
    table: list[tuple[str, ...]] = [HEADER, ("---",) * len(HEADER)]
    table += [cells(view, name, baseline) for name in view.rows if view.rows[name]]
    used = [i for i in range(len(HEADER)) if i == 0 or any(row[i] not in ("-", "") for row in table[2:])]
    return ["| " + " | ".join(row[i] for i in used) + " |" for row in table]


def cells(view: View, name: str, baseline: str) -> tuple[str, ...]:
    """One row of the table as text."""
    runs = [run for run in view.rows[name] if not run.failed]
    if not runs:
        return (name, "failed", *["-"] * (len(HEADER) - 2))
    mine, theirs = view.accuracies(name), view.accuracies(baseline)
    paired = [mine[seed] - theirs[seed] for seed in mine if seed in theirs] if name != baseline else []
    return (
        name,
        mean_and_spread(list(mine.values()), 1),
        mean_and_spread(paired, 1, sign=True),
        mean_and_spread([run.rank_correlation for run in runs if run.rank_correlation is not None], 2, sign=True),
        mean_and_spread([run.foreground_auroc for run in runs if run.foreground_auroc is not None], 3),
        str(len(runs)),
        str(runs[0].epochs),
        f"{runs[0].samples:,}",
        f"{runs[0].gflop_per_image:.3g}",
        f"{runs[0].pflop:.3g}",
        mean_and_spread([run.seconds for run in runs if run.seconds is not None], 0),
    )


def mean_and_spread(values: Sequence[float], digits: int, *, sign: bool = False) -> str:
    """``mean ± standard deviation``, the mean alone of one value, ``-`` of none."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):{'+' if sign else ''}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def draw(suite: str, outcomes: Sequence[Outcome], longer: Collection[str], untrained: Mapping[int, float]) -> Figure:
    """Every seed a dot, means as bars, both views side by side on one axis of accuracy."""
    views = {"equal epochs": View(outcomes, "epochs", longer)}
    if any(run.budget == "compute" for run in outcomes):
        views["equal compute"] = View(outcomes, "compute", longer)
    names = list(next(iter(views.values())).rows)
    figure = Figure(figsize=(1.6 + 3.4 * len(views), 0.8 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(views), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (title, view) in zip(axes, views.items(), strict=True):
        for place, name in enumerate(names):
            values = list(view.accuracies(name).values())
            if values:
                axis.plot(values, [place] * len(values), "o", color="#1f77b4", alpha=0.45, markersize=5)
                axis.plot([statistics.fmean(values)] * 2, [place - 0.28, place + 0.28], color="#0b3d66", linewidth=2.5)
        if untrained:
            axis.axvline(statistics.fmean(untrained.values()), color="grey", linestyle=":", linewidth=1)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("20-NN top-1 %" + (" (dotted: untrained)" if untrained else ""), fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(suite, fontsize=10)
    return figure
