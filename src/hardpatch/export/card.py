"""The model card: what the backbone learnt from and how, its figures, and the three lines that load it."""

from __future__ import annotations

from collections.abc import Iterator
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

_TOO_FINE = ("by_group", "per_class", "confusion", "top1_by_k", "held_out_top1", "chosen", "about")
"""Parts of an evaluation that a card leaves out."""


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
        figures=[] if run is None else list(figures(run)),
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


def figures(run: RunFolder) -> Iterator[tuple[str, str, str]]:
    """Evaluation, name and value of every single number that is known of a run."""
    sources = {"pretrain": run.result_file, **{file.stem: file for file in sorted(run.evaluations.glob("*.json"))}}
    for source, file in sources.items():
        for name, value in _numbers(read_object(file) or {}):
            yield source, name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _numbers(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, int | float]]:
    for name, value in content.items():
        if name in _TOO_FINE:
            continue
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, value


def _last_part(spec: str) -> str:
    return Path(spec).name or spec
