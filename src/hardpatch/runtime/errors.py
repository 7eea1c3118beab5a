"""The two ways a run may end early: the user's input was wrong, or a signal asked it to stop."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """The user's input breaks a rule; the message names the field, the rule and the value (exit code 2)."""


class DivergedError(InputError):
    """The loss is not finite any more: nothing is wrong with the call, but this run cannot go on."""


class Interrupted(Exception):  # noqa: N818  (not an error: the run is saved and can go on)
    """A signal stopped the run after it was saved (exit code 3)."""


def suggest(name: str, known: Iterable[str]) -> str:
    """``; did you mean X?`` where something known is close to what was given, else nothing."""
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
