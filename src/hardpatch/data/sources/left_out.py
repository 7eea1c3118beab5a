"""Files of a folder that are not read for their endings, though people may mean them as images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePath

from hardpatch.data.images.formats import describe
from hardpatch.data.images.stored import DecodeError
from hardpatch.data.sources.files import FileSource

_PICTURES = frozenset(
    [
        ".heic",
        ".heif",
        ".jp2",
        ".j2k",
        ".jpx",
        ".jxl",
        ".psd",
        ".exr",
        ".hdr",
        ".fits",
        ".fit",
        ".nii",
        ".svg",
        ".ico",
        ".pgm",
        ".ppm",
        ".pbm",
        ".pnm",
        ".tga",
        ".cr2",
        ".cr3",
        ".nef",
        ".arw",
        ".dng",
        ".raw",
        ".orf",
        ".rw2",
        ".czi",
        ".nd2",
        ".lif",
        ".svs",
        ".ndpi",
        ".mrxs",
        ".mrc",
        ".ima",
        ".mp4",
        ".mov",
        ".avi",
        ".mkv",
        ".h5",
        ".hdf5",
        ".mat",
    ]
)
"""Endings of files that people mean as images and that are not read."""

_TRIED, _TOLD = 3, 4
"""Files without an ending that are looked into; endings that are named."""


def told_of_others(source: FileSource) -> str:
    """What is left out of a folder by the endings of its files, if people may mean it as images; else nothing.

    Args:
        source: Of a folder.
    """
    others, folder = source.others, source.folder
    counts = Counter(PurePath(name).suffix.lower() for name in others)
    nameless = [name for name in others if not PurePath(name).suffix][:_TRIED]
    found = [name for name in nameless if _is_image(Path(folder, name))]
    meant = {ending: count for ending, count in counts.most_common() if ending in _PICTURES or (not ending and found)}
    if not meant:
        return ""
    listed = ", ".join(f"{count:,} {ending or 'without an ending'}" for ending, count in list(meant.items())[:_TOLD])
    what = []
    if found:
        about = describe(Path(folder, found[0]).read_bytes())
        what.append(f"a list of those without an ending, one path a line, is read by their content ({about.format})")
    if set(meant) - {""}:
        what.append("other kinds must be converted, to .png or .tif")
    return f"{sum(meant.values()):,} files are left out by their endings: {listed}; {'; '.join(what)}"


def _is_image(file: Path) -> bool:
    try:
        describe(file.read_bytes())
    except (DecodeError, OSError):
        return False
    return True
