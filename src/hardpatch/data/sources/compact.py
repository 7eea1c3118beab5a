"""Lists of a million names or labels, stored so that they cost little and data workers share them.

A Python list of a million strings takes 100 MB, and every data process ends up with a copy of its own, since reading an
object changes its reference count. Here the strings lie in one Arrow array and labels are numbers in another, which
forked processes share untouched and spawned ones receive in milliseconds.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, SupportsIndex, overload

import numpy as np
import pyarrow
from pyarrow import compute

from hardpatch.runtime.text import as_bytes, as_text

_CHUNK = 65_536


class _Compact(Sequence[str]):
    """An immutable list that makes its strings when they are asked for."""

    @abstractmethod
    def _one(self, number: int) -> str:
        """The string of this number; negative ones count from the end.

        Raises:
            IndexError: There is none.
        """

    @abstractmethod
    def _some(self, part: slice) -> list[str]:
        """The strings of a slice."""

    @overload
    def __getitem__(self, index: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> str | list[str]:
        return self._some(index) if isinstance(index, slice) else self._one(int(index))

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _CHUNK):
            yield from self._some(slice(first, first + _CHUNK))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def __repr__(self) -> str:
        return f"<{len(self):,} {type(self).__name__.lower()}: {', '.join(map(repr, self[:3]))}, ...>"


class Strings(_Compact):
    """Strings in an Arrow array, as bytes: Arrow's own strings hold no file names of other encodings.

    Args:
        strings: What it holds.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        encoded = map(as_bytes, strings)
        parts = [pyarrow.array([], pyarrow.large_binary())]
        while part := list(islice(encoded, _CHUNK)):
            parts.append(pyarrow.array(part, pyarrow.large_binary()))
        self.array: Any = pyarrow.concat_arrays(parts)

    @classmethod
    def from_arrays(cls, content: np.ndarray, ends: np.ndarray) -> Strings:
        """What :meth:`arrays` of another one gave."""
        strings = cls()
        buffers = [None, *map(pyarrow.py_buffer, (np.concatenate([np.zeros(1, np.int64), ends]), content))]
        strings.array = pyarrow.Array.from_buffers(pyarrow.large_binary(), len(ends), buffers)
        return strings

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """All bytes, and where each string ends in them."""
        ends = compute.cumulative_sum(compute.binary_length(self.array)).to_numpy()
        return np.frombuffer(b"".join(self.array.to_pylist()), np.uint8), ends

    def __len__(self) -> int:
        return len(self.array)

    def _one(self, number: int) -> str:
        content: bytes = self.array[number].as_py()
        return as_text(content)

    def _some(self, part: slice) -> list[str]:
        return list(map(as_text, self.array[part].to_pylist()))


class Labels(_Compact):
    """The class of every image: one number each, and the names of the classes.

    Args:
        codes: Positions in ``classes``; -1 where there is no label, which reads as an empty one.
        classes: Their names.
    """

    def __init__(self, codes: np.ndarray, classes: Iterable[str]) -> None:
        self.codes = codes.astype(np.int32)
        self.classes = tuple(classes)
        self._names = (*self.classes, "")

    @classmethod
    def of(cls, labels: Iterable[str | None]) -> Labels:
        """From one label after the other; None where an image has none."""
        classes: dict[str, int] = {}
        codes = array("i", (-1 if name is None else classes.setdefault(name, len(classes)) for name in labels))
        return cls(np.array(codes, np.int32), classes)

    def __len__(self) -> int:
        return len(self.codes)

    def _one(self, number: int) -> str:
        return self._names[int(self.codes[number])]

    def _some(self, part: slice) -> list[str]:
        return [self._names[code] for code in self.codes[part].tolist()]

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
        return cls(np.concatenate(codes), classes)
