"""What was looked at, and what was seen."""

from __future__ import annotations

from typing import Literal, NamedTuple

State = Literal["ok", "note", "warning", "problem"]
"""All is well; worth knowing; will cost time or memory, or may fail later; hardpatch will not run."""


class Finding(NamedTuple):
    """One thing that was looked at."""

    about: str
    """What: a word or two."""
    state: State
    found: str
    """What was seen, with numbers."""
    advice: str = ""
    """What to do about it; empty where nothing has to be done."""
