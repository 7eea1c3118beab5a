"""From what the user writes after ``--data`` to a source."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from braceexpand import braceexpand

from hardpatch.data.images.decode import EXTENSIONS, RGB, Decoder
from hardpatch.data.sources import hugging_face, parquet, remote
from hardpatch.data.sources.base import Source
from hardpatch.data.sources.cached_shards import open_shards
from hardpatch.data.sources.downloads import Downloads
from hardpatch.data.sources.files import FileSource, open_folder
from hardpatch.data.sources.left_out import told_of_others
from hardpatch.data.sources.remote import UnreachableError
from hardpatch.data.sources.shapes import ShapeLabel, ShapesSource
from hardpatch.data.sources.shard_index import ARCHIVES
from hardpatch.data.sources.shards import LocalShard, ShardSource
from hardpatch.data.sources.tables import TABLES, read_table
from hardpatch.runtime.errors import InputError

FORMS = "a folder, list.txt, table.csv, table.parquet, tar shards, a URL of one of these, hf:NAME or shapes:N"


def open_source(
    spec: str,
    *,
    decoder: Decoder = RGB,
    image_size: tuple[int, int] = (224, 224),
    field: str = "data",
    downloads: Downloads | None = None,
) -> Source:
    """Open what ``--data`` names.

    Args:
        spec: A folder (of images, or saved by Hugging Face ``datasets``); ``list.txt``, ``table.csv``,
            ``table.parquet``; tar shards, or parquet files with images inside (braces and stars are expanded); a URL of
            a table or of shards; ``hf:NAME[@split]``, ``hf-stream:NAME[@split]``; or ``shapes:N`` (``shapes:N@seed``
            for another set of the same kind; with ``:background`` at the end the backgrounds are the classes).
        decoder: How the files are read.
        image_size: Size at which ``shapes`` are made.
        field: What to call the argument in a message.
        downloads: Where files from far away are kept; None: the default folder.

    Raises:
        InputError: Nothing there, nothing readable, or no images in it.
    """
    if not spec:
        raise InputError(f"{field}: needs {FORMS}, got nothing")
    source = _open(spec, decoder, image_size, field, downloads or Downloads())
    if len(source) == 0:
        endings = ", ".join(sorted(EXTENSIONS))
        folder = Path(spec).expanduser()
        shards = next((kind for kind in ("*.tar", "*.tar.gz") if folder.is_dir() and any(folder.glob(kind))), None)
        hint = f"; it holds shards: give {str(folder / shards)!r}" if shards else ""
        if isinstance(source, FileSource) and (told := told_of_others(source)):
            hint += f". {told}"
        raise InputError(f"{field}: no images in {spec!r} (looked for {endings}){hint}")
    return source


def _open(spec: str, decoder: Decoder, image_size: tuple[int, int], field: str, downloads: Downloads) -> Source:
    if spec.startswith("shapes:"):
        return _open_shapes(spec, decoder, image_size, field)
    if spec.startswith("hf:"):
        return hugging_face.open_hub(spec.removeprefix("hf:"), decoder=decoder, field=field)
    if spec.startswith("hf-stream:"):
        urls = hugging_face.shard_urls(spec.removeprefix("hf-stream:"), field=field)
        return open_shards(urls, decoder=decoder, downloads=downloads, field=field)
    ending = remote.ending(spec).lower() if remote.is_url(spec) else spec
    if ending.endswith(ARCHIVES):
        files = _expand(spec, field)
        if remote.is_url(files[0]):
            return open_shards(files, decoder=decoder, downloads=downloads, field=field)
        return ShardSource([LocalShard(Path(file), field=field) for file in files], decoder=decoder)
    if ending.rstrip("/").endswith(".parquet"):
        if not remote.is_url(spec) and _local(spec, field).is_dir():  # in parts, as Spark and pandas write
            spec = f"{spec.rstrip('/')}/*.parquet"
        return _open_parquet(spec, decoder, field, downloads)
    if remote.is_url(spec):
        return _open_remote_table(spec, decoder, field)
    path = _local(spec, field)
    if path.is_dir():
        if hugging_face.is_saved(path):
            return hugging_face.open_saved(path, decoder=decoder, field=field)
        return open_folder(path, decoder=decoder, field=field)
    if not path.exists():
        raise InputError(f"{field}: {spec!r} does not exist")
    if path.suffix.lower() in TABLES:
        return read_table(path, folder=_folder(path), shown=str(path), decoder=decoder, field=field)
    raise InputError(f"{field}: must be a folder, .txt, .csv, .parquet or .tar, got the file {spec!r}")


def _open_shapes(spec: str, decoder: Decoder, image_size: tuple[int, int], field: str) -> Source:
    match = re.fullmatch(r"shapes:(\d+)(?:@(\d+))?(:background)?", spec)
    if not match:
        raise InputError(
            f"{field}: must be shapes:N or shapes:N@seed, with :background at its end where the backgrounds are to be "
            f"the classes; got {spec!r}"
        )
    if decoder.channels != 3:
        raise InputError(f"{field}: shapes have 3 channels, got channels={decoder.channels}")
    if int(match[1]) == 0:
        raise InputError(f"{field}: needs at least one image, got {spec!r}")
    label: ShapeLabel = "background" if match[3] else "silhouette"
    return ShapesSource(int(match[1]), size=image_size, seed=int(match[2] or 0), label=label)


def _open_parquet(spec: str, decoder: Decoder, field: str, downloads: Downloads) -> Source:
    """A table of paths, or files with images inside."""
    files = _expand(spec, field)
    if remote.is_url(files[0]):
        holds_images = _holds_images(files[0], field)
    else:
        with parquet.open_parquet(Path(files[0]), field=field) as table:
            holds_images = parquet.image_columns(table.schema_arrow) is not None
    if holds_images:
        return open_shards(files, decoder=decoder, downloads=downloads, field=field)
    if len(files) > 1:
        raise InputError(f"{field}: {files[0]} holds no images; give one table of paths at a time")
    if remote.is_url(files[0]):
        return _open_remote_table(files[0], decoder, field)
    path = Path(files[0])
    return read_table(path, folder=_folder(path), shown=str(path), decoder=decoder, field=field)


def _holds_images(url: str, field: str) -> bool:
    """Is this a parquet file with images inside?"""
    try:
        footer = remote.parquet_footer(url)
        if footer is not None:
            return parquet.image_columns(footer[0]) is not None
        with _fetched(url) as file, parquet.open_parquet(file, field=field) as table:
            return parquet.image_columns(table.schema_arrow) is not None
    except UnreachableError as error:
        raise InputError(f"{field}: cannot fetch the table {error}") from error


def _open_remote_table(url: str, decoder: Decoder, field: str) -> Source:
    if not remote.ending(url).lower().endswith(TABLES):
        raise InputError(f"{field}: a URL must end in .tar, .tar.gz, .txt, .csv or .parquet, got {url!r}")
    folder = f"{url.partition('?')[0].rpartition('/')[0]}/"
    try:
        with _fetched(url) as file:
            return read_table(file, folder=folder, shown=url, decoder=decoder, field=field)
    except UnreachableError as error:
        raise InputError(f"{field}: cannot fetch the table {error}") from error


@contextmanager
def _fetched(url: str) -> Iterator[Path]:
    """A file from far away, on the disk while entered."""
    with TemporaryDirectory() as folder:
        file = Path(folder, remote.ending(url))
        remote.download(url, file, size=None)
        yield file


def _local(spec: str, field: str) -> Path:
    """A path of this machine.

    Raises:
        InputError: It cannot be one.
    """
    try:
        path = Path(spec).expanduser()
        path.exists()
    except RuntimeError as error:  # an unknown user's home folder
        raise InputError(f"{field}: {spec!r} does not exist: {error}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{field}: cannot read {spec!r}: {getattr(error, 'strerror', None) or error}") from error
    return path


def _folder(file: Path) -> str:
    return "" if str(file.parent) == "." else f"{str(file.parent).rstrip('/')}/"


def _expand(spec: str, field: str) -> list[str]:
    """Files named by braces and stars, in sorted order.

    What is there as it is written is meant as it is written: a file, or the folder before the last slash.

    Raises:
        InputError: One of them does not exist.
    """
    folder, slash, name = spec.rpartition("/")
    literal = not remote.is_url(spec) and bool(slash) and _local(f"{folder}/", field).is_dir()
    if not remote.is_url(spec) and _local(spec, field).is_file():
        return [str(_local(spec, field))]
    try:
        patterns = [f"{folder}/{each}" for each in braceexpand(name)] if literal else list(braceexpand(spec))
    except ValueError as error:
        raise InputError(f"{field}: unbalanced braces in {spec!r}") from error
    files: list[str] = []
    for pattern in patterns:
        if remote.is_url(pattern):
            files += _expand_url(pattern, field)
            continue
        path = _local(pattern, field)
        found = [path] if path.exists() or not re.search(r"[*?\[]", pattern) else sorted(_matching(path, literal))
        if not found or not all(file.is_file() for file in found):
            missing = f"no shard {pattern!r}" if pattern.endswith(ARCHIVES) else f"{pattern!r} does not exist"
            raise InputError(f"{field}: {missing}")
        files += map(str, found)
    return files


def _matching(path: Path, literal: bool) -> Iterator[Path]:
    """Files that a path with stars matches; stars of its folder count unless it is there ``literal``ly."""
    folder = glob.escape(str(path.parent)) if literal else str(path.parent)
    # Path.glob takes no absolute patterns.
    return map(Path, glob.glob(f"{folder}/{path.name}", include_hidden=True))  # noqa: PTH207


def _expand_url(pattern: str, field: str) -> list[str]:
    if pattern.startswith(("http://", "https://")):
        if "*" in pattern:
            raise InputError(
                f"{field}: a web server cannot be asked which files match {pattern!r}; use braces: "
                "shards-{000000..000099}.tar"
            )
        return [pattern]
    if not re.search(r"[*?\[]", pattern):
        return [pattern]
    try:
        found = remote.find(pattern)
    except UnreachableError as error:
        raise InputError(f"{field}: cannot list {error}") from error
    if not found:
        raise InputError(f"{field}: no shard {pattern!r}")
    return found
