"""What we write is never read as images, wherever it stands: folders and files of ours are marked.

``.hardpatch`` in a folder holds ``*``, where all that lies in it is ours, or the names of single files.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from hardpatch.runtime.files import write_text_atomically
from hardpatch.runtime.text import as_text

MARK = ".hardpatch"
EVERYTHING = "*"


def make_output_folder(path: Path) -> None:
    """Make a folder for what we write, and mark it as ours where nothing of others is in it.

    Raises:
        OSError: It cannot be made.
    """
    path.mkdir(parents=True, exist_ok=True)
    if not any(entry.name == MARK or not entry.name.startswith(".") for entry in path.iterdir()):
        write_text_atomically(path / MARK, f"{EVERYTHING}\n")


def note_output(file: Path, *, source: str) -> None:
    """Mark a single file of ours where it would else be read as an image: below its source, or beside others like it.

    Args:
        file: It is there already.
        source: The images that it was made from, in any form.
    """
    folder = file.parent
    if any(EVERYTHING in written_by_us(place, _names(place)) for place in folder.absolute().parents):
        return
    names = _names(folder)
    written = written_by_us(folder, names)
    root = Path(source).expanduser()
    below = bool(source) and root.is_dir() and folder.resolve().is_relative_to(root.resolve())
    beside = any(Path(name).suffix.lower() == file.suffix.lower() for name in names - written - {file.name})
    if (below or beside) and not written & {EVERYTHING, file.name}:
        write_text_atomically(folder / MARK, "".join(f"{name}\n" for name in sorted(written | {file.name})))


def written_by_us(folder: Path, names: Collection[str]) -> set[str]:
    """Files in a folder that are ours; :data:`EVERYTHING`: all that it holds, as in a run of any version.

    Args:
        folder: The folder.
        names: Of what it holds.
    """
    if "config.yaml" in names and "checkpoints" in names:
        return {EVERYTHING}
    try:
        return set(as_text((folder / MARK).read_bytes()).splitlines())
    except OSError:
        return set()


def _names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in folder.iterdir()}
    except OSError:  # where nobody may look
        return set()
