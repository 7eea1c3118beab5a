"""Image files one by one: of a folder, a list or a table; on the disk or behind a URL."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from pyarrow import compute

from hardpatch.data.images.decode import EXTENSIONS, Decoder, Sample
from hardpatch.data.sources import remote
from hardpatch.data.sources.base import Source
from hardpatch.data.sources.compact import Labels, Strings
from hardpatch.data.sources.layout import Layout, find_layout, looks_like_parts
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import warn
from hardpatch.runtime.outputs import EVERYTHING, written_by_us


class FileSource(Source):
    """Image files of a folder, a list or a table.

    Args:
        paths: The files, relative to the folder, absolute, or URLs.
        decoder: How the files are read.
        folder: What relative paths start from, with its closing slash; a folder or a URL.
        labels: Class of every file, if known.
    """

    def __init__(
        self, paths: Sequence[str], *, decoder: Decoder, folder: str = "", labels: Labels | None = None
    ) -> None:
        self.paths = paths if isinstance(paths, Strings) else Strings(paths)
        self.decoder: Decoder = decoder
        self.folder = folder
        self._labels = self._only_complete(labels)
        self.others: Sequence[str] = ()
        """Files of a folder that are no images by their endings, below the folder."""
        self.layout: Layout | None = None
        """Of a folder that holds train/ and val/."""
        absolute = compute.or_(
            compute.starts_with(self.paths.array, "/"), compute.match_substring(self.paths.array, "://")
        )
        self._all_relative = not compute.any(absolute).as_py()
        if not self._all_relative and not remote.is_url(folder):  # all alike, however the folder was spelt
            self.folder = os.path.join(os.path.abspath(folder), "")  # noqa: PTH100, PTH118  (with its slash)
        self._quoted = folder.startswith(("http://", "https://"))

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Sample:
        """Read and decode one file."""
        return self.decoder(self.content(index))

    def content(self, index: int) -> bytes:
        """The file's bytes."""
        name = self.name(index)
        if remote.is_url(name):
            return remote.fetch(name)
        with open(name, "rb") as file:  # noqa: PTH123  (a Path takes longer to make than a small file to read)
            return file.read()

    def num_bytes(self, index: int) -> int | None:
        """Of the file, where it lies on a disk."""
        name = self.name(index)
        if remote.is_url(name):
            return None
        try:
            return os.stat(name).st_size  # noqa: PTH116  (a million times)
        except OSError:
            return -1

    def name(self, index: int) -> str:
        """The path."""
        return self._located(self.paths[index])

    def names(self) -> Iterator[str]:
        """All paths."""
        if self._all_relative:
            return map(self.folder.__add__, map(_quoted, self.paths) if self._quoted else self.paths)
        return map(self._located, self.paths)

    def _located(self, path: str) -> str:
        relative = self._all_relative or not (path.startswith("/") or remote.is_url(path))
        return self.folder + (_quoted(path) if self._quoted else path) if relative else path

    @property
    def labels(self) -> Sequence[str] | None:
        """Class of every file."""
        return self._labels


def _quoted(path: str) -> str:
    """A file name as a part of a URL: some characters mean something else there, or nothing."""
    return re.sub(r"[%#?\x00-\x1f\x7f\udc80-\udcff]", lambda found: quote(found[0], errors="surrogateescape"), path)


def open_folder(folder: Path, *, decoder: Decoder, field: str) -> FileSource:
    """Every image below a folder; labels are the first-level folders where all images lie in two or more of them.

    Where those are train/ and val/ (:mod:`hardpatch.data.sources.layout`), labels are the folders below them.

    Raises:
        InputError: A folder cannot be read.
    """
    others: list[str] = []
    paths = Strings(_walk(folder, field, others))
    folders = {path.partition("/")[0] for path in paths if "/" in path}
    layout = find_layout(folders)
    depth = 1 if layout is None else 2
    below = all(path.count("/") >= depth for path in paths)
    labels = Labels.of((path.split("/")[depth - 1] for path in paths), nan_is_a_name=True) if below else None
    root = "" if str(folder) == "." else f"{str(folder).rstrip('/')}/"
    several = labels is not None and len(labels.classes) > 1
    source = FileSource(paths, decoder=decoder, folder=root, labels=labels if several else None)
    source.others = Strings(others)
    source.layout = layout
    if layout is None and looks_like_parts(folders):
        warn(
            f"{field}: {str(folder)!r} holds {', '.join(sorted(folders)[:5])}: all are taken for "
            f"{'classes' if several else 'one set'}; if some are for training and some for validation, name them apart"
        )
    return source


def folder_layout(folder: Path) -> Layout | None:
    """The parts of a folder that holds ``train/`` and ``val/`` and no other images; None of any other."""
    try:
        folders, files = _list(str(folder))
    except OSError:  # named where it is opened
        return None
    images = any(Path(name).suffix.lower() in EXTENSIONS for name in files)
    if images or "dataset_dict.json" in files or not looks_like_parts(folders):
        return None
    ours = written_by_us(folder, {*folders, *files})
    theirs = [name for name in folders if name not in ours and EVERYTHING not in _written(folder / name)]
    return find_layout([name for name in theirs if next(_walk(folder / name, "data", []), None) is not None])


def _written(folder: Path) -> set[str]:
    folders, files = _list(str(folder))
    return written_by_us(folder, {*folders, *files})


def _walk(folder: Path, field: str, others: list[str]) -> Iterator[str]:
    """Every image file below a folder, relative to it, in sorted order: a folder's files, then its folders.

    Hidden files and folders that we have written ourselves are left out, linked folders are followed once.

    Args:
        folder: Where to begin.
        field: What to call the argument in a message.
        others: All other files are added to it.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        here = waiting.pop()
        try:
            status = os.stat(folder / here)  # noqa: PTH116  (beside scandir)
            if (status.st_dev, status.st_ino) in seen:  # a link to a folder that was walked already, or to one above
                continue
            seen.add((status.st_dev, status.st_ino))
            folders, files = _list(str(folder / here))
            ours = written_by_us(folder / here, {*folders, *files})
            if here and EVERYTHING in ours:
                continue
        except OSError as error:
            raise InputError(f"{field}: cannot read {error.filename}: {error.strerror}") from error
        for name in sorted(set(files) - ours):
            if os.path.splitext(name)[1].lower() in EXTENSIONS:  # noqa: PTH122  (a million times)
                yield here + name
            else:
                others.append(here + name)
        waiting += [f"{here}{name}/" for name in sorted(folders, reverse=True)]


def _list(folder: str) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder, hidden ones left out."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                folders.append(entry.name)
            else:
                files.append(entry.name)
    return folders, files


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere; reading it will say so
        return False
