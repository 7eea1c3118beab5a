"""``hardpatch demo``: the main job on embedded data, so that a person without data sees what the method does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hardpatch.config.evaluations import ForegroundConfig
from hardpatch.config.recipes import recipe
from hardpatch.config.values import with_fields
from hardpatch.evaluate import foreground
from hardpatch.evaluate.result import keep
from hardpatch.training.pretrain import train


def run_demo(out: Path, *, epochs: int | None = None) -> tuple[dict[str, Any], foreground.ForegroundResult]:
    """Pre-train on shapes, measure on held-back shapes whether the predicted loss finds the objects, report.

    Args:
        out: Run folder; an unfinished demo goes on.
        epochs: Passes over the data; None: as in the recipe.

    Returns:
        The run's figures, and the foreground evaluation on 480 held-back images.
    """
    config = recipe("shapes-demo")
    if epochs is not None:
        config = with_fields(config, {"epochs": epochs})
    result = train(config, out)
    measured = ForegroundConfig(checkpoint=str(out), images=config.run.val)
    found = foreground.run(measured)
    keep(found, measured)
    return result, found
