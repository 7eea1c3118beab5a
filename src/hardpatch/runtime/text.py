"""Text from outside, above all names of files and of classes, on its way out of the program.

Inside, a name is what Python reads from the disk: bytes that are not UTF-8 stand in it as lone surrogates, which most
of what text is written to refuses, and it may hold line breaks and control characters. On its way out it is either

- shown (terminal, figures, pages): :func:`printable`; or
- kept, to be found again (lists, tables, shards, checksums): :func:`as_bytes`, the bytes that the disk has.

JSON keeps it, too: ``json.dumps`` writes whatever is not ASCII as an escape, which reads back as it was.
"""

from __future__ import annotations

import re
import shlex

_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""Control characters, those that turn the direction of what follows, and what is no character at all."""


def printable(text: str, *, lines: bool = False) -> str:
    """Text that moves no cursor and that everything can show.

    Args:
        text: Any.
        lines: Line breaks and tabs may stay: it is a whole message rather than a name.

    Returns:
        The text, with ``\\xe9`` for the byte of a name that is not UTF-8, and the like for control characters.
    """

    def escaped(found: re.Match[str]) -> str:
        code = ord(found[0])
        if lines and found[0] in "\n\t":
            return found[0]
        if 0xDC80 <= code <= 0xDCFF:
            return f"\\x{code - 0xDC00:02x}"
        return f"\\u{code:04x}" if code > 0xFF else repr(found[0])[1:-1]

    return _UNSHOWN.sub(escaped, text)


def quoted(word: str) -> str:
    """A word of a command line that runs as printed, in bash and zsh even with what cannot be shown."""
    if printable(word) == word:
        return shlex.quote(word)
    return "$'" + printable(word.replace("\\", r"\\").replace("'", r"\'")) + "'"


def as_bytes(text: str) -> bytes:
    """Text as UTF-8, in which the bytes of a name that is none are as the disk has them."""
    return text.encode("utf-8", "surrogateescape")


def as_text(content: bytes) -> str:
    """What :func:`as_bytes` gave, as it was."""
    return content.decode("utf-8", "surrogateescape")
