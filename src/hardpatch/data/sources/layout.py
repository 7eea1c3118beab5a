"""Folders that hold training and validation images side by side, as ``train/`` and ``val/``."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

_DECORATED = r"([-_ ]?(images?|set|data|20\d\d))?"
_TRAIN = re.compile(rf"train(ing)?{_DECORATED}", re.IGNORECASE)
_VALIDATION = tuple(
    re.compile(rf"{word}{_DECORATED}", re.IGNORECASE) for word in ("val(id(ation)?)?", "dev", "test(ing)?")
)
"""Sorted by what is taken first."""


class Layout(NamedTuple):
    """Names of the folders of the parts."""

    train: str
    val: str
    """What is validated on: val/ before test/."""
    unused: list[str]
    """Further ones, such as test/ beside val/."""


def find_layout(names: Collection[str]) -> Layout | None:
    """Are these folders the parts of one set of images, rather than its classes?

    Only where all of them are: one for training, and at least one for validation or test.

    Args:
        names: Of all folders in a folder that hold images.
    """
    train = [name for name in names if _TRAIN.fullmatch(name)]
    others = [name for kind in _VALIDATION for name in sorted(names) if kind.fullmatch(name)]
    if len(train) != 1 or not others or len(names) != 1 + len(others):
        return None
    return Layout(train[0], others[0], others[1:])


def looks_like_parts(names: Collection[str]) -> bool:
    """Is one of these folders named for training and another for validation, whatever lies beside them?"""
    return any(map(_TRAIN.fullmatch, names)) and any(kind.fullmatch(n) for kind in _VALIDATION for n in names)
