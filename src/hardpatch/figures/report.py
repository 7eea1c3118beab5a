"""``RUN/report.html``: one self-contained page that shows what a run did and what it is worth."""

from __future__ import annotations

import base64
import io
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from matplotlib.figure import Figure

from hardpatch.runs.folder import RunFolder
from hardpatch.runtime.files import write_text_atomically
from hardpatch.runtime.log import read_metrics

CURVES: tuple[tuple[str, dict[str, str], str], ...] = (
    ("Losses", {"reconstruction_loss": "reconstruction", "prediction_loss": "prediction"}, ""),
    (
        "Does the predictor know what is hard?",
        {"predictor_rank_correlation": "rank correlation", "foreground_auroc": "foreground AUROC"},
        "",
    ),
    ("kNN accuracy", {"knn_top1": "top-1"}, "%"),
    ("Share of hidden patches chosen by predicted loss", {"hard_share": "hard share"}, ""),
    ("Learning rate", {"lr": "learning rate", "learning_rate": "learning rate"}, ""),  # the latter: older runs
    ("Speed", {"images_per_second": "images/s"}, "images/s"),
)
"""Title, metrics and unit of each plot; a plot without any record is left out."""

_MEANINGS = {
    "predicted_loss": "predicted loss (teacher, full image)",
    "reconstruction_error": "reconstruction error (student, 10 masks)",
    "patch_variance": "patch variance",
    "edge_density": "edge density",
    "attention": "class-token attention",
}


_LINEAR = {"linear": "Linear probe", "logistic": "Logistic regression"}
"""Evaluations of one kind: file, and title on the page."""


def write_report(folder: RunFolder) -> None:
    """Write the page from what lies in the run folder: metrics, figures, evaluations, config."""
    records = read_metrics(folder.path)
    hardness = sorted(folder.figures.glob("hardness_*.png"))
    evaluations = {file.stem: json.loads(file.read_text()) for file in sorted(folder.evaluations.glob("*.json"))}
    template = files("hardpatch.figures").joinpath("templates/report.html.j2").read_text()
    page = Environment(autoescape=True).from_string(template).render(
        name=folder.path.name,
        tiles=_tiles(folder.result() or {}, records, evaluations),
        curves=[(title, _image(_plot(records, title, lines, unit))) for title, lines, unit in CURVES
                if any(key in record for record in records for key in lines)],
        first_figure=_file_image(hardness[0]) if hardness else None,
        last_figure=_file_image(hardness[-1]) if hardness else None,
        figures=[(int(path.stem.split("_")[1]), _file_image(path)) for path in hardness],
        foreground=evaluations.get("foreground"),
        meanings=_MEANINGS,
        knn=evaluations.get("knn"),
        linear=[(title, evaluations[name], _folder_image(folder, name)) for name, title in _LINEAR.items()
                if name in evaluations],
        segment=(segment := evaluations.get("segment")),
        segment_figure=_picture(segment),
        detect=(detect := evaluations.get("detect")),
        detect_figure=_picture(detect),
        finetune=evaluations.get("finetune"),
        finetune_confusion=_picture_of(evaluations.get("finetune"), "confusion.png"),
        config=folder.config_file.read_text(),
    )  # fmt: skip
    write_text_atomically(folder.report_file, page)


def _tiles(
    result: dict[str, Any], records: list[dict[str, Any]], evaluations: dict[str, Any]
) -> list[tuple[str, str, str]]:
    """The figures at the top: value, name, what to hold it against."""
    tiles = []
    losses = [record["reconstruction_loss"] for record in records if "reconstruction_loss" in record]
    if losses:
        tiles.append((f"{losses[-1]:.3f}", "reconstruction loss", f"from {losses[0]:.3f}"))
    correlation = result.get("predictor_rank_correlation")
    if correlation is not None:
        tiles.append((f"{correlation:+.2f}", "rank correlation", "of predicted and true hardness; 0 = blind"))
    if foreground := evaluations.get("foreground"):
        found, plain = foreground["predicted_loss"], foreground["patch_variance"]
        if found:
            tiles.append((f"{found['auroc']:.3f}", "foreground AUROC", f"of the predicted loss; "
                          f"patch variance {plain['auroc']:.3f}, chance 0.5"))  # fmt: skip
    if "knn_top1" in result:
        against = result["knn_top1_untrained"]
        note = "" if against is None else f"untrained {against:.1f} %"
        tiles.append((f"{result['knn_top1']:.1f} %", "kNN top-1", note))
    if tuned := evaluations.get("finetune"):
        against = tuned["untrained_top1"]
        note = f"{tuned['num_val']:,} images" if against is None else f"untrained {against:.1f} %"
        tiles.append((f"{tuned['top1']:.1f} %", "fine-tuned top-1", note))
    if result:
        tiles.append((f"{result['images_per_second']:.0f}", "images/s", f"{result['seconds'] / 60:.1f} minutes"))
    return tiles


def _plot(records: list[dict[str, Any]], title: str, lines: dict[str, str], unit: str) -> Figure:
    figure = Figure(figsize=(4.6, 2.6), layout="constrained")
    axis = figure.subplots()
    for key, label in lines.items():
        points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
        if points:
            axis.plot(
                *zip(*points),
                label=label,
                linewidth=1.5,
                marker="o" if len(points) < 20 else None,
                markersize=3,
            )
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel(unit, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if len(axis.lines) > 1:
        axis.legend(fontsize=8, frameon=False)
    return figure


def _image(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return _data_uri(buffer.getvalue())


def _file_image(path: Any) -> str:
    return _data_uri(path.read_bytes())


def _folder_image(folder: RunFolder, evaluation: str) -> str | None:
    """The confusion picture of an evaluation, where there is one."""
    path = folder.evaluations / f"{evaluation}_confusion.png"
    return _file_image(path) if path.is_file() else None


def _picture(evaluation: dict[str, Any] | None) -> str | None:
    """The figure that an evaluation names, if it is still there."""
    if evaluation is None or not evaluation["figure"] or not Path(evaluation["figure"]).is_file():
        return None
    return _file_image(Path(evaluation["figure"]))


def _picture_of(evaluation: dict[str, Any] | None, name: str) -> str | None:
    """A picture in an evaluation's own folder, where both are still there."""
    path = Path(evaluation["folder"]) / name if evaluation else None
    return _file_image(path) if path is not None and path.is_file() else None


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
