"""Lists of a million names or labels, stored so that they cost little and data workers share them.

A Python list of a million strings takes 100 MB, and every data process ends up with a copy of its own, since reading an
object changes its reference count. Here all of them lie in two arrays, which forked processes share untouched and
spawned ones receive in milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import SupportsIndex, overload

import numpy as np

_CHUNK = 65_536


class Strings(Sequence[str]):
    """An immutable list of strings: one array of bytes, and where each string ends in it.

    Args:
        strings: What it holds; file names of any encoding too.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        blob, ends = bytearray(), _Growing(np.int64)
        for string in strings:
            blob += string.encode("utf-8", "surrogateescape")
            ends.append(len(blob))
        self.blob = np.frombuffer(bytes(blob), np.uint8)
        self.ends = ends.array()

    @classmethod
    def from_arrays(cls, blob: np.ndarray, ends: np.ndarray) -> Strings:
        """What :attr:`blob` and :attr:`ends` of another one were."""
        strings = cls()
        strings.blob, strings.ends = blob, ends
        return strings

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = int(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"{number} of {len(self)} strings")
        number %= len(self)
        start = int(self.ends[number - 1]) if number else 0
        return self.blob[start : int(self.ends[number])].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for first in range(0, len(self), _CHUNK):
            ends = self.ends[first : first + _CHUNK].tolist()
            offset, content = start, self.blob[start : ends[-1]].tobytes()
            for end in ends:
                yield content[start - offset : end - offset].decode("utf-8", "surrogateescape")
                start = end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def __repr__(self) -> str:
        return f"<{len(self):,} strings: {', '.join(map(repr, self[:3]))}, ...>"


class Labels(Sequence[str]):
    """The class of every image: one number each, and the names of the classes.

    Args:
        codes: Positions in ``classes``; -1 where there is no label, which reads as an empty one.
        classes: Their names.
    """

    def __init__(self, codes: np.ndarray, classes: Sequence[str]) -> None:
        self.codes = codes.astype(np.int32)
        self.classes = tuple(classes)
        self._names = (*self.classes, "")

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, index: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._names[code] for code in self.codes[index].tolist()]
        return self._names[int(self.codes[int(index)])]

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _CHUNK):
            yield from self[first : first + _CHUNK]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def __repr__(self) -> str:
        return f"<{len(self):,} labels: {', '.join(map(repr, self[:3]))}, ...>"

    @property
    def complete(self) -> bool:
        """Has every image a label?"""
        return bool((self.codes >= 0).all())

    @property
    def present(self) -> set[str]:
        """The classes that have an image."""
        return {self._names[code] for code in np.unique(self.codes).tolist()}

    @classmethod
    def join(cls, parts: Sequence[Labels]) -> Labels:
        """One list after another."""
        classes: dict[str, int] = {}
        codes = [np.zeros(0, np.int32)]
        for part in parts:
            new = [classes.setdefault(name, len(classes)) for name in part.classes]
            codes.append(np.array([*new, -1], np.int32)[part.codes])
        return cls(np.concatenate(codes), list(classes))


class LabelBuilder:
    """Collects labels one by one."""

    def __init__(self) -> None:
        self._codes = _Growing(np.int32)
        self._classes: dict[str, int] = {}

    def append(self, label: str | None) -> None:
        """The label of the next image; None where it has none."""
        self._codes.append(-1 if label is None else self._classes.setdefault(label, len(self._classes)))

    def labels(self) -> Labels:
        """All that were collected."""
        return Labels(self._codes.array(), list(self._classes))


class _Growing:
    """An array that is appended to; a list only of its last part."""

    def __init__(self, dtype: type[np.integer]) -> None:
        self.dtype = dtype
        self._parts: list[np.ndarray] = []
        self._last: list[int] = []

    def append(self, number: int) -> None:
        self._last.append(number)
        if len(self._last) == _CHUNK:
            self._parts.append(np.array(self._last, self.dtype))
            self._last = []

    def array(self) -> np.ndarray:
        return np.concatenate([*self._parts, np.array(self._last, self.dtype)])
