"""Did the run work, and what next: written rules over what was measured.

The first rule that holds decides; advice is given by all that hold:

- fewer than :data:`FEW_STEPS` steps: ``unproven``;
- with labels: accuracy of the 20 nearest neighbours, trained against untrained (or against the weights that the run
  started from), on the same images. The 95 % interval of the paired difference above 0: ``better``. Its upper end below
  :data:`SMALL_LEAD` points: ``no_better``. Else ``unproven``: the images are too few to tell, or the run was too short;
- without labels: the reconstruction loss against that of flat patches and of a linear interpolation, image by image
  (:mod:`hardpatch.evaluate.reconstruction`). Intervals of both leads above 0: ``better``. The upper end of one below
  :data:`SMALL_GAIN` of the rival's loss: ``no_better``. Else ``unproven``;
- where the target is no pixels: ``no_better`` where the loss hardly fell, else ``unproven``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from hardpatch.evaluate.classify.accuracy import paired_difference
from hardpatch.evaluate.reconstruction import Reconstruction

FEW_STEPS = 200
"""With fewer, AdamW has hardly left its warm-up."""
FEW_IMAGES = 1000
LAGGING = 0.1
"""A teacher of which more is still its random start lags behind."""
BLIND = 0.1
"""Mining by a rank correlation below this is hardly better than chance."""

SMALL_LEAD = 3.0
"""Points of accuracy: where the interval ends below, the encoder is not better by what people would care for."""
SMALL_GAIN = 0.02
"""Share of a rival's loss: where the interval ends below, the reconstruction is no better by what anybody would see."""

Outcome = Literal["better", "no_better", "unproven"]


class Measured(NamedTuple):
    """What the rules look at."""

    steps: int
    images: int
    losses: tuple[float, float] | None
    """Reconstruction loss of the first and the last record."""
    right: tuple[Sequence[bool], Sequence[bool]] | None
    """Images classified rightly before the first step and after the last, in one order; None without labels."""
    reconstruction: Reconstruction | None
    """None with labels, and where the target is no pixels."""
    rank_correlation: float | None
    """Between predicted and true hardness; None where nothing is predicted."""
    random_start: float | None
    """Share of the teacher that is still its random start; None where none guides."""
    mining_opened: bool | None
    """Did masks ever follow the prediction? None: they were not to."""
    from_weights: bool = False
    """Did the run start from weights?"""


class Verdict(NamedTuple):
    """What the run came to."""

    outcome: Outcome
    sentence: str
    advice: list[str]


ONLY_LABELS = "what the features are worth for a task only labelled images can say"


def judge(found: Measured) -> Verdict:
    """Apply the rules."""
    return Verdict(*_outcome(found), _advice(found))


def _outcome(found: Measured) -> tuple[Outcome, str]:
    if found.steps < FEW_STEPS:
        return "unproven", f"{found.steps:,} steps are no run: nothing can be said of what was learnt"
    if found.right is not None:
        return _by_labels(found.right, "the weights it started from" if found.from_weights else "the untrained encoder")
    if found.reconstruction is not None:
        return _by_reconstruction(found.reconstruction)
    if found.losses is None:
        return "unproven", "nothing was recorded that could be judged"
    first, last = found.losses
    fell = f"reconstruction loss {first:.3f} to {last:.3f}"
    if last > 0.9 * first:
        return "no_better", f"it hardly learnt to reconstruct ({fell})"
    return "unproven", f"it learnt to reconstruct ({fell}); {ONLY_LABELS}"


def _by_labels(right: tuple[Sequence[bool], Sequence[bool]], rival: str) -> tuple[Outcome, str]:
    before, after = right
    lead, (low, high) = paired_difference(after, before)
    trained, untrained = (100 * sum(some) / len(some) for some in (after, before))
    measured = (
        f"20-NN accuracy {trained:.1f} %, before {untrained:.1f} %; {lead:+.1f} points, 95 % interval "
        f"{low:+.1f} to {high:+.1f}, {len(after):,} images"
    )
    if low > 0:
        return "better", f"it worked: better than {rival} ({measured})"
    if high < SMALL_LEAD:
        return "no_better", f"it did not work: no better than {rival} ({measured})"
    return "unproven", f"not told apart from {rival} ({measured})"


def _by_reconstruction(found: Reconstruction) -> tuple[Outcome, str]:
    there = np.isfinite(found.student) & np.isfinite(found.interpolated)
    own, flat, between = (np.asarray(losses)[there] for losses in found)
    measured = (
        f"loss {own.mean():.3f}; flat patches {flat.mean():.3f}, linear interpolation {between.mean():.3f}; "
        f"{len(own):,} images"
    )
    leads = [(rival - own, rival.mean()) for rival in (flat, between)]
    ends = [(d.mean(), 1.96 * d.std() / max(1, len(d)) ** 0.5, most) for d, most in leads]
    if len(own) > 1 and all(lead - half > 0 for lead, half, _ in ends):
        told = "it worked: hidden patches are reconstructed better than without learning"
        return "better", f"{told} ({measured}); {ONLY_LABELS}"
    if any(lead + half < SMALL_GAIN * most for lead, half, most in ends):
        return "no_better", f"it did not learn to reconstruct better than what needs no learning ({measured})"
    return "unproven", f"reconstruction is not told apart from what needs no learning ({measured})"


def _advice(found: Measured) -> list[str]:
    lines = []
    if found.steps < FEW_STEPS:
        lines.append("train longer: more --epochs, or --budget 1h")
    if found.images < FEW_IMAGES:
        lines.append(f"{found.images:,} images are few: start from weights (--init-from), or add images without labels")
    if found.mining_opened is False:
        lines.append(
            "masks stayed random, as predictions did not agree with losses: train longer, or lower --mining-threshold"
        )
    elif found.rank_correlation is not None and found.rank_correlation < BLIND:
        lines.append("the predictor hardly knows what is hard: train longer, or take a recipe without mining")
    if found.random_start is not None and found.random_start > LAGGING:
        lines.append(f"the teacher is still {found.random_start:.0%} its random start: train longer")
    if found.steps >= FEW_STEPS and _outcome(found)[0] != "better":
        lines.append("train longer (--budget 2h, or more --epochs); masked models learn slowly at first")
    return lines
