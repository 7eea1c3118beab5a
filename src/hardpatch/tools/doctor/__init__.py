"""``hardpatch doctor``: will hardpatch run well here, before a day of training is lost on finding out?

What may break Python (a broken torch, a driver that hangs, a missing compiler) is tried in a process of its own; what
this module, ``surroundings`` and ``examine`` import works without torch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """One thing that was looked at."""

    about: str
    """What: a word or two."""
    state: Literal["ok", "note", "warning", "problem"]
    """All is well; worth knowing; will cost time or memory, or may fail later; hardpatch will not run."""
    found: str
    """What was seen, with numbers."""
    advice: str = ""
    """What to do about it; empty where nothing has to be done."""
