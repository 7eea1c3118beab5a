"""What the commands can be told that have no config of their own elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hardpatch.config.fields import Positive, Settings


@dataclass(frozen=True)
class PretrainCommand(Settings):
    """Pre-train a ViT with Hard Patches Mining, or go on with a run that was stopped.

    The fields below are the config; a recipe or a YAML file gives them other defaults, flags override both.
    """

    out: str
    """Run folder."""
    recipe: str = "hpm"
    """Named starting point, see hardpatch recipes."""
    config: str | None = None
    """YAML file instead of a recipe."""
    branch_from: str | None = None
    """Run instead of a recipe, with a constant learning rate: go on in --out from where it had not yet fallen, with
    other --epochs (longer or shorter); the run stays as it is."""
    resume: Literal["auto", "never", "restart"] = "auto"
    """auto: go on with an unfinished run in the folder; never: refuse to; restart: start over."""


@dataclass(frozen=True)
class DemoCommand(Settings):
    """Pre-train on the embedded shapes, evaluate, draw, write a report: a few minutes on two CPU cores."""

    out: str = "runs/demo"
    """Run folder."""
    epochs: Positive | None = None
    """Passes over the 4,000 images; none: as in the recipe shapes-demo."""


@dataclass(frozen=True)
class VisualizeCommand(Settings):
    """Draw images, their loss under ten masks, the predicted loss, the mask it leads to, and the reconstruction."""

    checkpoint: str
    """Run folder or checkpoint file."""
    images: str
    """Images, any source."""
    out: str
    """Figure to write, .png."""
    count: Positive = 8
    """How many images, spread over the source."""
