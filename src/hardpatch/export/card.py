"""The model card: what the backbone learnt from and how, its figures, and the three lines that load it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import Environment

from hardpatch.config.values import decisions
from hardpatch.export.backbone import Backbone
from hardpatch.runs.folder import RunFolder, versions
from hardpatch.runtime.log import read_object, warn

_SHOWN = (
    "top1", "untrained_top1", "miou", "untrained_miou", "ap", "untrained_ap", "auroc", "knn_top1", "knn_top1_untrained",
    "num_val", "predictor_rank_correlation", "reconstruction_loss",
)  # fmt: skip
"""Figures that a card shows, the most telling first; ``evaluate/*.json`` has the others."""
_MOST = 10


def model_card(backbone: Backbone, *, library: str, usage: list[str], checked: str) -> str:
    """The card as Markdown, with the header that the Hugging Face hub reads.

    Paths are cut to their last part: a card is made to be shown.
    """
    config, run = backbone.config, backbone.run
    about: dict[str, Any] = {}
    if run is not None:
        about = _about(run)
    recipe = {} if config is None else {k: v for k, v in decisions(config).items() if k not in ("data.data",)}
    if init_from := recipe.get("model.init_from"):
        recipe["model.init_from"] = _last_part(init_from)
    text: str = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True).from_string(
        files("hardpatch.export").joinpath("templates/card.md.j2").read_text()
    ).render(
        name="backbone" if run is None else run.path.resolve().name,
        library=library,
        usage="\n".join(usage),
        classes=backbone.classes,
        checked=checked,
        arguments=backbone.arguments,
        input=backbone.input,
        parameters=sum(parameter.numel() for parameter in backbone.vit.parameters()),
        vit=backbone.vit,
        data=None if config is None else _last_part(config.data.data),
        config=config,
        step=backbone.step,
        recipe=recipe,
        figures=[] if run is None else figures(run),
        trained_with={key: about[key] for key in ("hardpatch", "torch", "timm", "device", "git") if key in about},
        exported_with=versions(torch.device("cpu")),
    )  # fmt: skip
    return text


def _about(run: RunFolder) -> dict[str, Any]:
    """Versions and the machine of a run; the checkpoint has its config."""
    try:
        found = yaml.safe_load(run.config_file.read_text()).get("about", {})
        return {**found}
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
        warn(f"{run.config_file} is damaged: the card leaves out what the run was trained with")
        return {}


def figures(run: RunFolder) -> list[tuple[str, str, str]]:
    """Evaluation, name and value of the figures that say most of a run, at most ten."""
    sources = {**{file.stem: file for file in sorted(run.evaluations.glob("*.json"))}, "pretrain": run.result_file}
    known = {source: read_object(file) or {} for source, file in sources.items()}
    found = [
        (source, name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
        for name in _SHOWN
        for source, content in known.items()
        if isinstance(value := content.get(name), int | float)
    ]
    order = list(known)
    return sorted(found[:_MOST], key=lambda row: order.index(row[0]))


def _last_part(spec: str) -> str:
    return Path(spec).name or spec
