"""Files that the user names at once: by braces, by stars, or by the folder that holds them as the parts of a table.

What exists is taken as it is written. Braces and stars mean something only in what is left of a name behind the last
folder that exists, so that a folder may be called ``[1] {a,b} (copy)``.
"""

from __future__ import annotations

import os
import re
from glob import glob
from pathlib import Path

from braceexpand import braceexpand

from hardpatch.data.sources import remote
from hardpatch.data.sources.remote import UnreachableError
from hardpatch.data.sources.shard_index import ARCHIVES
from hardpatch.runtime.errors import InputError

_STARS = re.compile(r"[*?\[]")


def existing(spec: str, field: str) -> Path | None:
    """The file or folder that is called exactly so; None where there is none.

    Raises:
        InputError: It lies in the home folder of an unknown user, or where nobody may look.
    """
    try:
        path = Path(spec).expanduser()
        os.stat(path)  # noqa: PTH116  (Path.exists takes some errors for an answer)
    except RuntimeError as error:
        raise InputError(f"{field}: {spec!r} does not exist: {error}") from error
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        if any(mark in spec for mark in "*?[{"):  # a pattern may be longer than a name
            return None
        raise InputError(f"{field}: cannot read {spec!r}: {getattr(error, 'strerror', None) or error}") from error
    return path


def expand(spec: str, field: str) -> list[str]:
    """Files that a path or a URL with braces and stars stands for, in sorted order for each way to fill the braces.

    Raises:
        InputError: One of them does not exist.
    """
    if remote.is_url(spec):
        return [url for pattern in _filled(spec, spec, field) for url in _expand_url(pattern, field)]
    if (path := existing(spec, field)) is not None:
        return _parts(path, spec, field)
    folder, rest = _written_out(os.path.expanduser(spec))  # noqa: PTH111  (an unknown user was refused above)
    files: list[str] = []
    for pattern in _filled(rest, spec, field):
        shown = os.path.join(folder, pattern)  # noqa: PTH118  (keeps the pattern as it is)
        if (path := existing(shown, field)) is not None:
            found = [path]
        else:
            names = glob(pattern, root_dir=folder or None, recursive=True) if _STARS.search(pattern) else []  # noqa: PTH207
            found = sorted(Path(folder, name) for name in names)
        if not found:
            missing = f"no shard {shown!r}" if pattern.endswith(ARCHIVES) else f"{shown!r} does not exist"
            raise InputError(f"{field}: {missing}")
        files += [file for each in found for file in _parts(each, shown, field)]
    return files


def is_parts(folder: Path) -> bool:
    """Is this a table that was written as a folder of parts, as Spark and pandas do?"""
    return folder.name.lower().endswith(".parquet") and bool(_part_names(folder))


def _parts(path: Path, shown: str, field: str) -> list[str]:
    """The file, or the parts of the table where it is a folder of them.

    Raises:
        InputError: A folder of something else, or one whose names hold the labels or paths.
    """
    if not path.is_dir():
        return [str(path)]
    names = _part_names(path) if path.name.lower().endswith(".parquet") else []
    if not names:
        raise InputError(f"{field}: {shown!r} is a folder, and not one with parts of a table (*.parquet)")
    for column in re.findall(r"(?:^|/)([^/=]+)=", "\n".join(name.rpartition("/")[0] + "/" for name in names)):
        if column in ("path", "label", "labels", "class", "cls", "fine_label"):
            raise InputError(
                f"{field}: {shown!r} is split by {column!r} into folders ({names[0]}), which are not read; write it "
                f"with {column!r} as a column of its files"
            )
    return [str(path / name) for name in names]


def _part_names(folder: Path) -> list[str]:
    """Parts below a folder, relative to it; what begins with a dot or an underscore is not one of them."""
    names = (file.relative_to(folder) for file in folder.rglob("*") if file.suffix.lower() == ".parquet")
    return [
        str(name)
        for name in sorted(names)
        if not any(part.startswith((".", "_")) for part in name.parts) and (folder / name).is_file()
    ]


def _written_out(spec: str) -> tuple[str, str]:
    """The longest folder at the beginning of a pattern that exists as it is written, and what follows it."""
    parts = spec.split("/")
    for number in range(len(parts) - 1, 0, -1):
        folder = "/".join(parts[:number]) or "/"
        if os.path.isdir(folder):  # noqa: PTH112  (beside strings)
            return folder, "/".join(parts[number:]).lstrip("/")
    return "", spec


def _filled(pattern: str, spec: str, field: str) -> list[str]:
    """A pattern with its braces filled in every way."""
    if "{" not in pattern and "}" not in pattern:  # a backslash is one as long as there is nothing that it could guard
        return [pattern]
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise InputError(f"{field}: unbalanced braces in {spec!r}") from error


def _expand_url(pattern: str, field: str) -> list[str]:
    if pattern.startswith(("http://", "https://")):
        if "*" in pattern:
            raise InputError(
                f"{field}: a web server cannot be asked which files match {pattern!r}; use braces: "
                "shards-{000000..000099}.tar"
            )
        return [pattern]
    if not _STARS.search(pattern):
        return [pattern]
    try:
        found = remote.find(pattern)
    except UnreachableError as error:
        raise InputError(f"{field}: cannot list {error}") from error
    if not found:
        raise InputError(f"{field}: no shard {pattern!r}")
    return found
