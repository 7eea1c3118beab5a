"""``RUN/report.html``: one self-contained page that shows what a run did and what it is worth."""

from __future__ import annotations

import base64
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment
from matplotlib.figure import Figure

from hardpatch.config.config import Config
from hardpatch.config.evaluations import EVALUATIONS
from hardpatch.config.values import load_config
from hardpatch.figures.sections import Picture, Section, Table, Tile
from hardpatch.runs.folder import RunFolder
from hardpatch.runtime.errors import InputError, Interrupted
from hardpatch.runtime.files import write_text_atomically
from hardpatch.runtime.log import read_metrics, read_object, warn
from hardpatch.runtime.pictures import as_png
from hardpatch.runtime.text import printable, quoted

ACCURACY = "20-NN accuracy while training"
CURVES: tuple[tuple[str, dict[str, str], str], ...] = (
    ("Losses", {"reconstruction_loss": "reconstruction", "prediction_loss": "prediction"}, ""),
    (
        "Does the predictor know what is hard?",
        {"predictor_rank_correlation": "rank correlation", "foreground_auroc": "foreground AUROC"},
        "",
    ),
    (ACCURACY, {"knn_top1": "top-1"}, "%"),
    ("Share of hidden patches chosen by predicted loss", {"hard_share": "hard share"}, ""),
    ("Learning rate", {"lr": "learning rate", "learning_rate": "learning rate"}, ""),  # the latter: older runs
    ("Speed", {"images_per_second": "images/s"}, "images/s"),
)
"""Title, metrics and unit of each plot; a plot without any record is left out."""


def write_report(folder: RunFolder) -> None:
    """Write the page from what lies in the run folder; one that cannot be made costs a warning and nothing else."""
    try:
        write_text_atomically(folder.report_file, _page(folder))
    except Interrupted:
        raise
    except Exception as error:  # whatever stands in the files of evaluations, now or of versions before
        warn(f"{folder.report_file} could not be made, the results are whole: {type(error).__name__}: {error}")


def _page(folder: RunFolder) -> str:
    """Metrics, figures, evaluations and config on one page."""
    records = read_metrics(folder.path)
    hardness = sorted(folder.figures.glob("hardness_*.png"))
    sections = describe_evaluations(folder)
    template = files("hardpatch.figures").joinpath("templates/report.html.j2").read_text()
    shown = Environment(autoescape=True, finalize=_shown)
    result = folder.result() or {}
    curves = {
        title: _image(as_png(_plot(records, title, lines, unit), dpi=130)) for title, lines, unit in CURVES
        if any(key in record for record in records for key in lines)
    }  # fmt: skip
    try:
        following = what_next(load_config(folder.config_file), str(folder.path), labelled="knn_top1" in result)
    except InputError:  # of another version, or damaged
        following = []
    return shown.from_string(template).render(
        name=folder.path.name,
        result=result,
        tiles=_tiles(result, records, [section.tile for section in sections if section.tile]),
        accuracy=curves.pop(ACCURACY, None),
        looked_at=len(folder.right(result.get("steps", 0)) or []),
        following=following,
        curves=list(curves.items()),
        figures=[(int(path.stem.split("_")[1]), _image(path.read_bytes())) for path in hardness],
        sections=[(section.title, [_block(folder, block) for block in section.blocks]) for section in sections],
        config=folder.config_file.read_text(),
    )  # fmt: skip


class Following(NamedTuple):
    """What could be done with a run now."""

    why: str
    command: str


def what_next(config: Config, out: str, *, labelled: bool) -> list[Following]:
    """Commands that run as they stand, the one that says most first.

    Args:
        config: Of the run.
        out: Its folder, as it was named.
        labelled: Are labels of its images known?
    """
    data, folder = config.data.data, out.rstrip("/") or out

    def command(*words: str) -> str:
        return " ".join(map(quoted, ["hardpatch", *words]))

    lines = [
        Following(
            "See what is hard in more images.",
            command("visualize", "--checkpoint", out, "--images", data, "--out", f"{folder}/hard.png"),
        ),
        Following(
            "A table of features, and the hardest images.",
            command("embed", "--checkpoint", out, "--data", data, "--out", f"{folder}/embedding.parquet", "--hardness",
                    "--contact-sheet", f"{folder}/hardest.png"),
        ),
        Following(
            "The backbone for timm.",
            command("export", "--checkpoint", out, "--format", "timm", "--out", f"{folder}/timm"),
        ),
    ]  # fmt: skip
    if labelled and config.run.val:
        linear = command("evaluate", "linear", "--checkpoint", out, "--train", data, "--val", config.run.val)
        lines.insert(0, Following("How good are the features for a linear classifier?", linear))
    return lines


def _shown(value: Any) -> Any:
    """Text of a run and of its files; the template escapes what is HTML in it."""
    return printable(value, lines=True) if type(value) is str else value  # Markup is the template's own


def describe_evaluations(folder: RunFolder) -> list[Section]:
    """What the evaluations say that were kept in a run folder; each describes its own figures."""
    sections = []
    for name, evaluation in EVALUATIONS.items():
        for kept in evaluation.kept_as or (name,):
            file = folder.evaluations / f"{kept}.json"
            if figures := read_object(file):  # imported only here: a run without evaluations need not wait for them
                try:
                    sections.append(import_module(evaluation.module).describe(figures))
                except (LookupError, TypeError, ValueError, AttributeError):
                    warn(f"{file} is damaged or of another version, and left out of the report")
    return sections


def _block(folder: RunFolder, block: str | Table | Picture) -> dict[str, Any]:
    """What the template needs of a block; a picture that has moved with its run folder is found there."""
    if isinstance(block, str):
        return {"text": block}
    if isinstance(block, Table):
        return {"table": block}
    places = (Path(block.path), folder.evaluations / Path(block.path).name)
    found = next((place for place in places if place.is_file()), None)
    return {"picture": found and _image(found.read_bytes()), "title": block.title}


def _tiles(result: dict[str, Any], records: list[dict[str, Any]], measured: list[Tile]) -> list[Tile]:
    """The figures at the top."""
    tiles = []
    losses = [record["reconstruction_loss"] for record in records if "reconstruction_loss" in record]
    if losses:
        tiles.append(Tile(f"{losses[-1]:.3f}", "reconstruction loss", f"from {losses[0]:.3f}"))
    correlation = result.get("predictor_rank_correlation")
    if correlation is not None:
        tiles.append(Tile(f"{correlation:+.2f}", "rank correlation", "of predicted and true hardness; 0 = blind"))
    if result.get("knn_top1") is not None:
        against = result.get("knn_top1_untrained")
        note = "" if against is None else f"before the first step {against:.1f} %"
        tiles.append(Tile(f"{result['knn_top1']:.1f} %", "20-NN while training", note, result.get("verdict", "")))
    tiles += measured
    if "images_per_second" in result:
        tiles.append(
            Tile(
                f"{result['images_per_second']:.0f}",
                "images/s",
                f"{result.get('train_seconds', result['seconds']) / 60:.1f} minutes",
            )
        )
    return tiles


def _plot(records: list[dict[str, Any]], title: str, lines: dict[str, str], unit: str) -> Figure:
    figure = Figure(figsize=(4.6, 2.6), layout="constrained")
    axis = figure.subplots()
    for key, label in lines.items():
        points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
        if points:
            marker = "o" if len(points) < 20 else None
            axis.plot(*zip(*points), label=label, linewidth=1.5, marker=marker, markersize=3)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel(unit, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if len(axis.lines) > 1:
        axis.legend(fontsize=8, frameon=False)
    return figure


def _image(png: bytes) -> str:
    """The address of a picture that stands in the page itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
