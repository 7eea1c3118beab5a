"""Files from far away, kept on the disk: bounded, the least recently used go first, safe with many processes.

A folder like this::

    ~/.cache/hardpatch/
      3f2a90c1e7d4b6a8.data     a file, whole, named for its URL, size and version
      3f2a90c1e7d4b6a8.index    what is in it; stays when the file goes
      3f2a90c1e7d4b6a8.lock     held by the process that fetches it, as long as it lives
      3f2a90c1e7d4b6a8.part     what it has of it so far
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hardpatch.runtime.errors import InputError

_TOUCH_SECONDS = 20
"""A file that is read is marked as used again after so long."""


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/hardpatch``, usually ``~/.cache/hardpatch``.

    Raises:
        InputError: There is no home folder, as for a user id without a name in a batch system.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hardpatch"
    except RuntimeError as error:
        raise InputError(
            "download_dir: must be given here, because this user has no home folder (HOME is not set, and the user id "
            "has no name); or set XDG_CACHE_HOME to a folder for what is fetched"
        ) from error


class Downloads:
    """The folder.

    Args:
        folder: Where; None: :func:`default_folder`.
        gigabytes: At most so much is kept; 10^9 bytes each.
    """

    def __init__(self, folder: Path | None = None, *, gigabytes: float = 100.0) -> None:
        self._folder = folder
        self.max_bytes = int(gigabytes * 1e9)
        self._touched: dict[str, float] = {}

    @property
    def folder(self) -> Path:
        """Where; looked for when something is kept, as most sources keep nothing.

        Raises:
            InputError: None was given, and there is no home folder.
        """
        if self._folder is None:
            self._folder = default_folder()
        return self._folder

    def key(self, *identity: str) -> str:
        """File name for what has this URL, size and version."""
        return hashlib.sha256("\0".join(identity).encode()).hexdigest()[:24]

    def path(self, key: str) -> Path:
        """Where a file lies, if it is there."""
        return self.folder / f"{key}.data"

    def index_path(self, key: str) -> Path:
        """Where what is known of a file lies, if it is there.

        Raises:
            InputError: The folder may not be looked into.
        """
        file = self.folder / f"{key}.index"
        with self._writing():
            file.exists()
        return file

    def open(self, key: str, fill: Callable[[Path], None], *, size: int) -> int:
        """A file descriptor of a file, which is fetched first where it is not there. Close it.

        Args:
            key: Of the file.
            fill: Fetches it to a path.
            size: Bytes for which room is made before.

        Raises:
            InputError: The disk is full or cannot be written.
        """
        while True:  # another process may remove it right after it was fetched
            try:
                descriptor = os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self.ensure(key, fill, size=size)
            else:
                self._touch(key)
                return descriptor

    def ensure(self, key: str, fill: Callable[[Path], None], *, size: int) -> None:
        """Fetch a file unless it is there; of several processes one fetches it and the others wait."""
        with self._writing():
            there = self.path(key).exists()
        if there:
            self._touch(key)
            return
        with self._writing(), self._locked(key):
            if self.path(key).exists():  # the other process was quicker
                return
            self._make_room(size)
            part = self.folder / f"{key}.part"
            try:
                fill(part)
                part.replace(self.path(key))
            finally:
                part.unlink(missing_ok=True)
            self._make_room(0, keep=key)  # where its size was not known before

    def save_index(self, key: str, write: Callable[[Path], None]) -> None:
        """Keep what is known of a file."""
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self.folder / f"{key}.index.{os.getpid()}.npz"
            try:
                write(part)
                part.replace(self.index_path(key))
            finally:
                part.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Errors of the disk as the user's."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            raise InputError(
                f"download_dir: cannot write in {str(self.folder)!r}: {error.strerror}; free some space, lower "
                "download_gigabytes or name another folder"
            ) from error

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Held by one process and thread at a time; a process that dies lets go of it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _touch(self, key: str) -> None:
        now = time.monotonic()
        if now - self._touched.get(key, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
            self._touched[key] = now
            with suppress(OSError):
                os.utime(self.path(key))

    def _remove_left_over(self, name: str) -> None:
        """Remove a part of a file unless a process is at work on it."""
        with suppress(OSError), (self.folder / f"{name.partition('.')[0]}.lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error where it is held
            (self.folder / name).unlink(missing_ok=True)

    def _make_room(self, size: int, *, keep: str = "") -> None:
        """Remove the least recently used files until ``size`` bytes more may lie here."""
        files = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith((".data", ".part")):
                    with suppress(FileNotFoundError):  # gone meanwhile
                        status = entry.stat()
                        files.append((status.st_mtime_ns, status.st_size, entry.name))
        for _, _, name in files:
            if name.endswith(".part") and name.partition(".")[0] != keep:
                self._remove_left_over(name)
        total = sum(bytes_ for _, bytes_, _ in files) + size
        for _, bytes_, name in sorted(files):
            if total <= self.max_bytes:
                return
            if name.endswith(".data") and name != f"{keep}.data":
                (self.folder / name).unlink(missing_ok=True)
                total -= bytes_
