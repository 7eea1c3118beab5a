"""What can be hidden and what can be reconstructed: one row for each, by its name in the config.

Config choices, the rules between fields, gates, figures and pages derive from these two tables, so that a new mask or
target is its own file and a row here. Rows name what builds them as ``module:function``; nothing here imports torch,
so that the command line can show and check the choices at once. A row may also be added from outside, with a function
in place of the name:

    TARGETS["edges"] = TargetKind(build=lambda context: EdgeTarget(context.geometry), about="how strong edges are")
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from hardpatch.runtime.errors import InputError, suggest

Row = TypeVar("Row")

Guide = Literal["predicted_loss", "attention", "scout", "variance"]
"""What the scores of a mask policy are: the loss that the teacher predicts or its attention, the scores of a scout, or
the variance of the pixels of each patch, which learns nothing (a control)."""


class MaskKind(NamedTuple):
    """A kind of mask."""

    policy: str | Callable[..., Any]
    """The :data:`~hardpatch.method.masks.MaskPolicy`."""
    guide: Guide | None
    """What guides it; None: nothing, and then the hard share has no meaning."""
    about: str
    """What it is, for help and docs."""


class TargetKind(NamedTuple):
    """A kind of reconstruction target."""

    build: str | Callable[..., Any]
    """Builds the :class:`~hardpatch.method.targets.target.Target` from a ``TargetContext``."""
    about: str
    """What it is, for help and docs."""
    of_pixels: bool = False
    """Is it made of each patch's pixels, in their order?"""
    normalised: bool = False
    """Are the mean and the contrast of each patch removed?"""
    needs_teacher: bool = False
    """Is it made of the teacher's features of every patch?"""
    options: tuple[str, ...] = ()
    """Fields of the config that belong to it alone."""
    required: tuple[str, ...] = ()
    """Those of them without which it cannot be built."""


_MASKS = "hardpatch.method.masks:"

MASKS: dict[str, MaskKind] = {
    "hard": MaskKind(_MASKS + "hard", "predicted_loss", "the highest predicted loss (HPM)"),
    "easy": MaskKind(_MASKS + "easy", "predicted_loss", "the lowest predicted loss (argmin)"),
    "proportional": MaskKind(_MASKS + "proportional", "predicted_loss", "sampled by predicted loss"),
    "attention": MaskKind(_MASKS + "hard", "attention", "the most attended by the teacher (AttMask)"),
    "random": MaskKind(_MASKS + "random", None, "uniformly random (MAE)"),
    "block": MaskKind(_MASKS + "block", None, "rectangles (BEiT)"),
    "inverse_block": MaskKind(_MASKS + "inverse_block", None, "all but rectangles (data2vec 2.0)"),
    "uniform_grid": MaskKind(_MASKS + "uniform_grid", None, "the same share of every 2x2 cell (UM-MAE)"),
    "red_noise": MaskKind(_MASKS + "red_noise", None, "low-passed noise (ColorMAE)"),
    "blue_noise": MaskKind(_MASKS + "blue_noise", None, "high-passed noise (ColorMAE)"),
    "green_noise": MaskKind(_MASKS + "green_noise", None, "band-passed noise (ColorMAE)"),
    "purple_noise": MaskKind(_MASKS + "purple_noise", None, "band-stopped noise (ColorMAE)"),
}
"""Every kind of mask by its name in the config."""

_TARGETS = "hardpatch.method.targets."

TARGETS: dict[str, TargetKind] = {
    "pixels": TargetKind(_TARGETS + "pixels:build_pixels", "pixels", of_pixels=True),
    "norm_pix": TargetKind(
        _TARGETS + "pixels:build_norm_pix",
        "pixels normalised within each patch (MAE's best)",
        of_pixels=True,
        normalised=True,
    ),
    "hog": TargetKind(_TARGETS + "hog:build", "histograms of oriented gradients (MaskFeat)"),
    "ema_features": TargetKind(_TARGETS + "teacher:build", "the teacher's own features", needs_teacher=True),
    "timm_features": TargetKind(
        _TARGETS + "timm_features:build",
        "features of a frozen timm model (target_model)",
        options=("target_model",),
        required=("target_model",),
    ),
    "tokens": TargetKind(
        _TARGETS + "tokens:build",
        "discrete tokens (BEiT), by default of a k-means codebook fitted on the images",
        options=("tokenizer",),
    ),
}
"""Every kind of target by its name in the config."""


def resolve(named: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function of a row, imported only now."""
    found: Callable[..., Any] = pkgutil.resolve_name(named) if isinstance(named, str) else named
    return found


def row_of(table: Mapping[str, Row], name: str, *, field: str) -> Row:
    """The row of this name.

    Raises:
        InputError: There is none; ``field`` is what gave the name.
    """
    if name not in table:
        known = ", ".join(map(repr, table))
        raise InputError(f"{field}: must be one of {known}, got {name!r}{suggest(name, table)}")
    return table[name]


def guide_of(mask: str, guide: Guide | None = None) -> Guide | None:
    """What guides a mask: ``guide``, or what the table says of the mask; None: nothing.

    Raises:
        InputError: There is no such mask, or it cannot be guided by this.
    """
    own = row_of(MASKS, mask, field="mask").guide
    if guide is None or guide == own:
        return own
    if own != "predicted_loss":
        could = ", ".join(repr(name) for name, kind in MASKS.items() if kind.guide == "predicted_loss")
        raise InputError(f"guide: {guide!r} goes with a mask that scores guide ({could}), got mask {mask!r}")
    return guide


def listed(table: dict[str, MaskKind] | dict[str, TargetKind]) -> str:
    """Every row with what it is, for help: ``hard: the highest predicted loss (HPM); easy: ...``."""
    return "; ".join(f"{name}: {kind.about}" for name, kind in table.items())
