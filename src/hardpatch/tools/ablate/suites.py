"""The tables that ``hardpatch ablate`` fills: which recipes belong together, and what the comparison asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

from pydantic import Field

from hardpatch.config.fields import Seed, Settings
from hardpatch.config.recipes import TARGETS


class Suite(NamedTuple):
    """Recipes that belong in one table."""

    rows: tuple[str, ...]
    """Names of recipes without a scale; the first is the baseline that differences are quoted against."""
    reference: str
    """The row whose compute and time all others are given in the other views; the dearest, where it is not a row."""
    about: str
    """What the table asks."""


SUITES: dict[str, Suite] = {
    "main": Suite(
        ("mae-norm-pix", "mae", "random+lpred-norm-pix", "colormae", "hpm-norm-pix", "hpm-both-norm-pix"),
        "hpm-norm-pix",
        "Does mining pay, against an honest MAE and a free rival?",
    ),
    "speed": Suite(
        (
            "mae-norm-pix", "mae-third-norm-pix", "random+lpred-fast-norm-pix", "crossmae", "hpm-norm-pix",
            "hpm-fast-norm-pix", "hpm-fast-in-pixels", "hpm-shared-norm-pix",
        ),
        "hpm-norm-pix",
        "Does mining at MAE's price lose anything against HPM as published, what do MAE and CrossMAE make of its time, "
        "and is the teacher worth its price?",
    ),
    "speed-means": Suite(
        (
            "hpm-norm-pix", "hpm-third-norm-pix", "hpm-half-teacher-norm-pix", "hpm-shallow-norm-pix",
            "hpm-both-norm-pix", "hpm-fast-norm-pix",
        ),
        "hpm-norm-pix",
        "What does each means of hpm-fast alone do to the features of HPM as published?",
    ),
    "mask-strategy": Suite(
        (
            "mae", "random+lpred", "hpm", "hpm-hardest", "hpm-hard-to-easy", "hpm-easiest",
            "hpm-0-to-1", "hpm-constant", "hpm-proportional",
        ),
        "hpm",
        "Which patches should be hidden by predicted loss, and when? The paper: easy-to-hard > random + L_pred > "
        "random; always-hardest and argmin < random.",
    ),
    "masks": Suite(
        ("mae", "block", "green-noise", "attmask", "hpm"),
        "hpm",
        "Masks that cost nothing against masks that ask a teacher.",
    ),
    "predicted-loss": Suite(
        ("mae", "hpm-absolute", "hpm", "hpm-shallow", "hpm-both"),
        "hpm",
        "How should the loss be predicted? The paper: relative > absolute > none.",
    ),
    "target": Suite(
        tuple(
            f"{method}{target}"
            for target in ("", *(f"-{name}" for name in TARGETS if name not in ("dino", "clip")))  # which are fetched
            for method in ("mae", "random+lpred", "hpm")
        ),
        "hpm",
        "What should be reconstructed? The paper: every target gains from L_pred, and again from learnt masks.",
    ),
}  # fmt: skip
"""The tables that ship, by name."""


@dataclass(frozen=True)
class AblateConfig(Settings):
    """Compare recipes on your images: every row of a suite with several seeds, at equal epochs, compute and time."""

    suite: str
    """main, speed, speed-means, mask-strategy, masks, predicted-loss or target."""
    out: str
    """Folder of the ablation; goes on where it was stopped, and shares runs between suites."""
    scale: str = ""
    """Scale of every row, see hardpatch recipes: 64px, micro, small...; none: ViT-B/16, 224 px, 200 epochs."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    """One run of each row per seed."""
    rows: tuple[str, ...] = ()
    """Only these rows; any recipe without a scale may stand here, and the first is the baseline. None: the suite's."""
    equal_compute: bool = True
    """Also run every row for as many (whole) epochs as cost what the suite's reference costs."""
    equal_time: bool = False
    """Also run every row for as many (whole) epochs as take the time of the suite's reference on this machine: the
    steps of all rows are timed in turns before the first run. Loading is not in it."""
