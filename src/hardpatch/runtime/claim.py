"""One command at a time works in a folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import warn
from hardpatch.runtime.outputs import make_output_folder

CLAIM = ".claim"
"""The file by which a folder is taken."""


class Claim:
    """Take a folder for this process, until it is released or the process ends, however it ends.

    Args:
        folder: Is made where it is missing, and marked as ours.

    Raises:
        InputError: Another process has it.
        OSError: The folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        make_output_folder(folder)
        self._file: IO[str] = (folder / CLAIM).open("w")
        taken = InputError(f"out: another process works in {str(folder)!r}; wait for its end, or choose another place")
        try:
            # Not flock: data workers would inherit it, and keep the folder for a while after a kill.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.release()
            raise taken from None
        except OSError as error:  # some network file systems know no locks
            warn(f"cannot lock {str(folder)!r} ({error.strerror}): see to it that only one process works there")
        if not os.fstat(self._file.fileno()).st_nlink:  # the other one ended just now, and removed its folder
            self.release()
            raise taken

    def release(self) -> None:
        """Give the folder back."""
        self._file.close()
