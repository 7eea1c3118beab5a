"""Masks as the tests ask for them: a policy by name or function, and what it hides."""

from hardpatch.method.choices import MASKS, resolve
from hardpatch.method.masks import MaskInput, hide_top


def hide(policy, scores, noise, *, num_hidden, num_hard=0, valid=None, grid=None):
    """What a policy hides; the grid is one row where it does not matter."""
    policy = resolve(MASKS[policy].policy) if isinstance(policy, str) else policy
    given = MaskInput(scores, noise, grid or (1, noise.shape[1]), num_hidden, num_hard, valid)
    return hide_top(policy(given), num_hidden)
