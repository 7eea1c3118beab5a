"""Did the run work, and what next: written rules over what was measured.

The first rule that holds decides; advice is given by all that hold:

- fewer than :data:`FEW_STEPS` steps: ``unproven``;
- with labels: accuracy of the 20 nearest neighbours, trained against untrained, on the same images. The 95 % interval
  of the paired difference above 0: ``better``. Its upper end below :data:`SMALL_LEAD` points: ``no_better``. Else
  ``unproven``: the images are too few to tell, or the run was too short;
- without labels features cannot be judged: ``no_better`` where the reconstruction loss hardly fell, else ``unproven``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from hardpatch.evaluate.classify.accuracy import paired_difference

FEW_STEPS = 200
"""With fewer, AdamW has hardly left its warm-up."""
FEW_IMAGES = 1000
LAGGING = 0.1
"""A teacher of which more is still its random start lags behind."""
BLIND = 0.1
"""Mining by a rank correlation below this is hardly better than chance."""

SMALL_LEAD = 3.0
"""Points of accuracy: where the interval ends below, the encoder is not better by what people would care for."""

Outcome = Literal["better", "no_better", "unproven"]


class Measured(NamedTuple):
    """What the rules look at."""

    steps: int
    images: int
    losses: tuple[float, float] | None
    """Reconstruction loss of the first and the last record."""
    right: tuple[Sequence[bool], Sequence[bool]] | None
    """Images that the untrained and the trained encoder classify rightly, in one order; None without labels."""
    rank_correlation: float | None
    """Between predicted and true hardness; None where nothing is predicted."""
    random_start: float | None
    """Share of the teacher that is still its random start; None where none guides."""
    mining_opened: bool | None
    """Did masks ever follow the prediction? None: they were not to."""


class Verdict(NamedTuple):
    """What the run came to."""

    outcome: Outcome
    sentence: str
    advice: list[str]


def judge(found: Measured) -> Verdict:
    """Apply the rules."""
    return Verdict(*_outcome(found), _advice(found))


def _outcome(found: Measured) -> tuple[Outcome, str]:
    if found.steps < FEW_STEPS:
        return "unproven", f"{found.steps:,} steps are no run: nothing can be said of what was learnt"
    if found.right is not None:
        before, after = found.right
        lead, (low, high) = paired_difference(after, before)
        trained, untrained = (100 * sum(right) / len(right) for right in (after, before))
        measured = (
            f"20-NN accuracy {trained:.1f} %, untrained {untrained:.1f} %; {lead:+.1f} points, 95 % interval "
            f"{low:+.1f} to {high:+.1f}, {len(after):,} images"
        )
        if low > 0:
            return "better", f"it worked: better than the untrained encoder ({measured})"
        if high < SMALL_LEAD:
            return "no_better", f"it did not work: no better than the untrained encoder ({measured})"
        return "unproven", f"not told apart from the untrained encoder ({measured})"
    if found.losses is None:
        return "unproven", "nothing was recorded that could be judged"
    first, last = found.losses
    fell = f"reconstruction loss {first:.3f} to {last:.3f}"
    if last > 0.9 * first:
        return "no_better", f"it hardly learnt to reconstruct ({fell})"
    return "unproven", f"it learnt to reconstruct ({fell}); how good the features are only labelled images can say"


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
    if found.steps >= FEW_STEPS and found.right is not None and _outcome(found)[0] != "better":
        lines.append("train longer (--budget 2h, or more --epochs); masked models learn slowly at first")
    return lines
