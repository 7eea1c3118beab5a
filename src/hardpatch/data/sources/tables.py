"""Lists and tables: one image a row, by its path or URL."""

from __future__ import annotations

import csv
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from hardpatch.data.images.decode import Decoder
from hardpatch.data.sources import parquet, remote
from hardpatch.data.sources.compact import Labels, Strings
from hardpatch.data.sources.files import FileSource
from hardpatch.runtime.errors import InputError

TABLES = (".txt", ".csv", ".parquet")

_CHECK_ALL = 10_000
_CHECK_SOME = 1_000
"""Up to so many rows all files are looked for; of more, so many spread over the table. A run reports the others."""


def read_table(file: Path, *, folder: str, shown: str, decoder: Decoder, field: str) -> FileSource:
    """A list of paths, or a table with columns ``path`` and optionally ``label``.

    Args:
        file: The table, on the disk.
        folder: What relative paths start from, with its closing slash; a folder or a URL.
        shown: What to call the table in a message.
        decoder: How the images are read.
        field: What to call the argument in a message.

    Raises:
        InputError: It cannot be read, has no column ``path``, or a row lacks something or names no file.
    """
    labels: list[str] = []

    def paths() -> Iterator[str]:
        for number, (path, label) in enumerate(_rows(file, shown, field), 1):
            if not isinstance(path, str) or not path:
                raise InputError(f"{field}: {shown}: row {number} has no path, got {path!r}")
            if label is not ...:
                if label is None or label == "":
                    raise InputError(f"{field}: {shown} has a column 'label' but no label in row {number}")
                labels.append(sys.intern(str(label)))  # one string per class, however many rows
            yield _quoted(_tidy(path)) if folder.startswith(("http://", "https://")) else _tidy(path)

    found = Strings(paths())
    source = FileSource(found, decoder=decoder, folder=folder, labels=Labels.of(labels) if labels else None)
    _check_files(source, shown, field)
    return source


def _check_files(source: FileSource, shown: str, field: str) -> None:
    """Refuse a table of which a file is missing.

    Raises:
        InputError: Names the file.
    """
    step = 1 if len(source) <= _CHECK_ALL else len(source) // _CHECK_SOME
    for index in range(0, len(source), step):
        name = source.name(index)
        if not remote.is_url(name) and not os.path.isfile(name):  # noqa: PTH113  (thousands of times)
            raise InputError(f"{field}: {shown} lists a file that does not exist: {name}")


def _tidy(path: str) -> str:
    """Without ``./`` and doubled slashes, so that a list names files as a folder does."""
    if remote.is_url(path) or not ("//" in path or "./" in path or path.endswith(("/", "/."))):
        return path
    return str(PurePosixPath(path))


def _quoted(path: str) -> str:
    """A relative path as a web server is asked for it; escapes that stand in it already are kept."""
    return (
        path
        if remote.is_url(path)
        else re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", quote(path, "/%", errors="surrogateescape"))
    )


def _rows(file: Path, shown: str, field: str) -> Iterable[tuple[object, object]]:
    """Path and label of every row; ``...`` for the label where there is no such column."""
    if file.suffix.lower() == ".parquet":
        return parquet.table_rows(file, field=field)
    return _text_rows(file, shown, field)


def _text_rows(file: Path, shown: str, field: str) -> Iterator[tuple[object, object]]:
    try:
        with file.open(
            encoding="utf-8-sig", errors="surrogateescape", newline="" if file.suffix.lower() == ".csv" else None
        ) as lines:
            if file.suffix.lower() == ".csv":
                yield from _csv_rows(csv.reader(_without_zeros(lines)), shown, field)
            else:
                yield from ((line.strip(), ...) for line in _without_zeros(lines) if line.strip())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{field}: cannot read {shown}: {error}") from error


def _without_zeros(lines: Iterable[str]) -> Iterator[str]:
    """The lines of a text; file names hold any byte but zero, UTF-16 many of these."""
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise csv.Error(f"line {number} has a zero byte; it must be text in UTF-8")
        yield line


def _csv_rows(rows: Iterator[list[str]], shown: str, field: str) -> Iterator[tuple[object, object]]:
    header = next(rows, [])
    if header and "path" not in header:
        raise InputError(f"{field}: {shown} needs a column 'path', got {header}")
    path = header.index("path") if header else 0
    label = header.index("label") if "label" in header else None
    for row in rows:
        if row:
            named = row[path] if path < len(row) else None
            yield named, (... if label is None else row[label] if label < len(row) else None)
