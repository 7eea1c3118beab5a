"""The table of an ablation as Markdown, CSV and figure: mean and standard deviation, differences paired by seed."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hardpatch.runtime.files import write_text_atomically
from hardpatch.runtime.outputs import make_output_folder
from hardpatch.runtime.pictures import try_picture
from hardpatch.tools.ablate.measure import Accuracies
from hardpatch.tools.ablate.runs_to_do import Budget

AccuracyName = Literal["knn_top1", "linear_top1"]
ACCURACIES: dict[AccuracyName, str] = {"knn_top1": "20-NN top-1 %", "linear_top1": "linear top-1 %"}
"""Accuracies of a run, and what they are called in a table."""


ONE_SEED = "One seed: no result"


@dataclass(frozen=True)
class Outcome:
    """What one run came to."""

    row: str
    seed: int
    budget: Budget
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
    linear_top1: float | None
    """Percent."""
    rank_correlation: float | None
    foreground_auroc: float | None
    failed: str | None
    folder: str


class View:
    """One of the ways to compare: every row at its epochs, at the reference's compute, or at its time.

    Args:
        outcomes: All runs that are done.
        budget: Which view.
        longer: Rows that are given other epochs for this view; the rest stand in it as they are.
    """

    def __init__(self, outcomes: Sequence[Outcome], budget: Budget, longer: Collection[str]) -> None:
        self.rows: dict[str, list[Outcome]] = {}
        for name in dict.fromkeys(outcome.row for outcome in outcomes):
            wanted = budget if name in longer else "epochs"
            self.rows[name] = [run for run in outcomes if run.row == name and run.budget == wanted]

    def accuracies(self, name: str, measure: AccuracyName = "knn_top1") -> dict[int, float]:
        """Accuracy of a row by seed."""
        found = {run.seed: getattr(run, measure) for run in self.rows.get(name, [])}
        return {seed: value for seed, value in found.items() if value is not None}


@dataclass(frozen=True)
class Table:
    """Everything that is written about a suite."""

    suite: str
    baseline: str
    """Row that differences are quoted against."""
    reference: str
    """Row whose compute and time the others are given."""
    question: str
    """What the table asks."""
    outcomes: Sequence[Outcome]
    """All runs that are done."""
    longer: Mapping[Budget, Collection[str]]
    """The views beside equal epochs, each with the rows that are given other epochs for it."""
    untrained: Mapping[int, Accuracies]
    """Accuracies of a random start by seed."""
    about: Mapping[str, str]
    """Command, versions, hardware."""
    step_seconds: Mapping[str, float] = field(default_factory=dict)
    """Of a step per image by row, where the table has a view at equal time."""

    def write(self, out: Path) -> None:
        """Write ``SUITE.md``, ``SUITE.csv`` and, where there are accuracies, ``SUITE.png``."""
        make_output_folder(out)
        write_text_atomically(out / f"{self.suite}.csv", self.as_csv())
        write_text_atomically(out / f"{self.suite}.md", self.as_markdown())
        figure = out / f"{self.suite}.png"
        if any(run.knn_top1 is not None for run in self.outcomes):
            try_picture(self.draw, figure)
        else:  # one of another call would not belong to this table
            figure.unlink(missing_ok=True)

    def views(self) -> dict[str, View]:
        """The views by title; those alone for which a run is done."""
        views = {"Equal epochs": View(self.outcomes, "epochs", ())}
        for budget, rows in self.longer.items():
            if any(run.budget == budget for run in self.outcomes):
                views[f"Equal {budget}"] = View(self.outcomes, budget, rows)
        return views

    def as_csv(self) -> str:
        """One line per run."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [item.name for item in fields(Outcome)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(outcome) for outcome in self.outcomes)
        return text.getvalue()

    def as_markdown(self) -> str:
        """The views, each a table, with what a number needs beside it."""
        seeds = sorted({run.seed for run in self.outcomes})
        lines = [f"# {self.suite}", "", self.question, ""]
        lines += [f"Mean ± standard deviation over seeds ({', '.join(map(str, seeds)) or 'none yet'}). "
                  f"The difference to {self.baseline} is paired by seed.", ""]  # fmt: skip
        if len(seeds) == 1:
            lines += [f"**{ONE_SEED}**: rows of one seed cannot be told from chance; add --seeds 0 1 2.", ""]
        if self.untrained:
            told = ", ".join(
                f"{name.removesuffix(' %')} {mean_and_spread(self._random_starts(measure), 1)} %"
                for measure, name in ACCURACIES.items()
            )
            lines += [f"The encoder at its random start: {told}.", ""]
        for title, view in self.views().items():
            lines += [f"## {title}", "", *_markdown_rows(view, self.baseline), ""]
        lines += ["Linear: the published probe on frozen features, 90 epochs at one learning rate.", ""]
        if self.longer.get("compute"):
            lines += [f"Equal compute: the FLOPs of {self.reference}, in whole epochs; PFLOP is what each came to.", ""]
        if self.longer.get("time"):
            base = self.step_seconds[self.baseline]
            rows = dict.fromkeys(run.row for run in self.outcomes)
            told = ", ".join(f"{row} {self.step_seconds[row] / base:.2f}" for row in rows)
            lines += [
                f"Equal time: that of {self.reference}, in whole epochs, by the time of a step, timed before the first "
                "run without loading and without exchange between processes; a step takes, of "
                f"{self.baseline}'s: {told}.", "",
            ]  # fmt: skip
        failed = [run for run in self.outcomes if run.failed]
        lines += [f"- {run.row}, seed {run.seed}: {run.failed}" for run in failed] + ([""] if failed else [])
        lines += [f"- {name}: {value}" for name, value in self.about.items()]
        return "\n".join(lines) + "\n"

    def _random_starts(self, measure: AccuracyName) -> list[float]:
        return [getattr(start, measure) for start in self.untrained.values()]

    def draw(self) -> Figure:
        """Every seed a dot, means as bars; a column for each view, a row for each accuracy."""
        views = self.views()
        shown = [m for m in ACCURACIES if any(getattr(run, m) is not None for run in self.outcomes)]
        names = list(next(iter(views.values())).rows)
        size = (1.6 + 3.4 * len(views), 0.4 + len(shown) * (0.6 + 0.36 * len(names)))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(shown), len(views), sharex="row", sharey=True, squeeze=False)
        for axes, measure in zip(grid, shown, strict=True):
            for axis, (title, view) in zip(axes, views.items(), strict=True):
                self._draw_view(axis, view, measure, names)
                axis.set_title(title.lower() if axis in grid[0] else "", fontsize=10, loc="left")
        grid[0, 0].invert_yaxis()  # shared: turns all
        alone = len({run.seed for run in self.outcomes}) == 1
        figure.suptitle(f"{self.suite}; {ONE_SEED.lower()}" if alone else self.suite, fontsize=10)
        return figure

    def _draw_view(self, axis: Axes, view: View, measure: AccuracyName, names: Sequence[str]) -> None:
        """One accuracy of one view."""
        for place, name in enumerate(names):
            if values := list(view.accuracies(name, measure).values()):
                axis.plot(values, [place] * len(values), "o", color="#1f77b4", alpha=0.45, markersize=5)
                mean = statistics.fmean(values)
                axis.plot([mean, mean], [place - 0.28, place + 0.28], color="#0b3d66", linewidth=2.5)
        if starts := self._random_starts(measure):
            axis.axvline(statistics.fmean(starts), color="grey", linestyle=":", linewidth=1)
        axis.set_xlabel(ACCURACIES[measure] + (" (dotted: random start)" if self.untrained else ""), fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)


HEADER = ("", *(title for name in ACCURACIES.values() for title in (name, "difference")), "rank correlation",
          "foreground AUROC", "runs", "epochs", "samples", "GFLOP/image", "PFLOP", "seconds")  # fmt: skip


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
    accuracies = []
    for measure in ACCURACIES:
        mine, theirs = view.accuracies(name, measure), view.accuracies(baseline, measure)
        paired = [mine[seed] - theirs[seed] for seed in mine if seed in theirs] if name != baseline else []
        accuracies += [mean_and_spread(list(mine.values()), 1), mean_and_spread(paired, 1, sign=True)]
    return (
        name,
        *accuracies,
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
