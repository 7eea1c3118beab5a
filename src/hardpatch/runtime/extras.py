"""Packages that only some commands need: how a user gets them."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import requires


def install(extra: str) -> str:
    """The command that installs what an extra needs, package by package: right for an install from a checkout, too."""
    wanted = []
    for line in requires("hardpatch") or ():
        package, _, condition = line.partition(";")
        if re.fullmatch(rf"""\s*extra == ["']{re.escape(extra)}["']\s*""", condition):
            wanted.append(package.strip())
    assert wanted, f"hardpatch has no extra {extra!r}"
    return "pip install " + shlex.join(wanted)
