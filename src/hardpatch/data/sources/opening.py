"""From what the user writes after ``--data`` to a source."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from hardpatch.data.images.decode import EXTENSIONS, RGB, Decoder
from hardpatch.data.sources import hugging_face, in_memory, parquet, remote
from hardpatch.data.sources.base import Source
from hardpatch.data.sources.cached_shards import open_shards
from hardpatch.data.sources.compact import Labels
from hardpatch.data.sources.downloads import Downloads
from hardpatch.data.sources.files import FileSource, open_folder
from hardpatch.data.sources.left_out import told_of_others
from hardpatch.data.sources.patterns import existing, expand, is_parts
from hardpatch.data.sources.remote import UnreachableError
from hardpatch.data.sources.shapes import ShapeLabel, ShapesSource
from hardpatch.data.sources.shard_index import ARCHIVES
from hardpatch.data.sources.shards import LocalShard, ShardSource
from hardpatch.data.sources.tables import TABLES, read_table
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import say

FORMS = "a folder, list.txt, table.csv, table.parquet, tar shards, a URL of one of these, hf:NAME or shapes:N"


_INSTEAD = {
    "DataFrame": "call its to_csv('table.csv') with a column 'path', and give 'table.csv'",
    "Table": "write it with pyarrow.parquet.write_table, and give the file",
    "list": "a list must hold arrays, tensors, PIL images, or paths",
    "tuple": "a pair must be of images and their labels",
}
"""What to do with what is no path, by the name of its type or of one that it derives from."""


def as_spec(data: object, *, field: str = "data") -> str:
    """What a caller in Python names or hands over as data, as the command line would have it.

    Raises:
        InputError: It is no path or name, and no images (:mod:`hardpatch.data.sources.in_memory`).
    """
    if isinstance(data, str | os.PathLike):
        return os.fsdecode(data)
    if (name := in_memory.hold(data, field)) is not None:
        return name
    kinds = [kind.__name__ for kind in type(data).__mro__]
    hint = next((_INSTEAD[kind] for kind in kinds if kind in _INSTEAD), "save its images as files, and give the folder")
    about = f"{type(data).__module__}.{type(data).__qualname__}".removeprefix("builtins.")
    if (shape := getattr(data, "shape", None)) is not None:
        about += f" of shape {tuple(shape)}"
    raise InputError(f"{field}: must name {FORMS}, or be arrays, PIL images or a data set; got a {about}; {hint}")


def open_source(
    spec: str | os.PathLike[str],
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
    spec = as_spec(spec, field=field)
    if not spec:
        raise InputError(f"{field}: needs {FORMS}, got nothing")
    source = _open(spec, decoder, image_size, field, downloads or Downloads())
    if len(source) == 0:
        endings = ", ".join(sorted(EXTENSIONS))
        folder = Path(spec).expanduser()
        kinds = ("*.tar", "*.tar.gz", "*.parquet")
        shards = next((kind for kind in kinds if folder.is_dir() and any(folder.glob(kind))), None)
        hint = f"; it holds shards: give {str(folder / shards)!r}" if shards else ""
        if isinstance(source, FileSource) and (told := told_of_others(source)):
            hint += f". {told}"
        raise InputError(f"{field}: no images in {spec!r} (looked for {endings}){hint}")
    _tell(source, spec, field)
    return source


def _tell(source: Source, spec: str, field: str) -> None:
    """Say what of a source is not used, or looks like a slip."""
    if told := source.without_labels():
        say(f"{field}: the labels of {spec!r} are not used{told}")
    if isinstance(source, ShardSource) and (left_out := source.left_out()):
        say(f"{field}: {left_out}")
    if isinstance(source.labels, Labels):
        alike: dict[str, list[str]] = {}
        for name in source.labels.classes:
            alike.setdefault(name.casefold(), []).append(name)
        if twins := next((names for names in alike.values() if len(names) > 1), None):
            say(f"{field}: {twins} are different classes in {spec!r}, though they differ only in upper and lower case")


def _open(spec: str, decoder: Decoder, image_size: tuple[int, int], field: str, downloads: Downloads) -> Source:
    if spec.startswith("shapes:"):
        return _open_shapes(spec, decoder, image_size, field)
    if spec.startswith(in_memory.PREFIX):
        return in_memory.open_held(spec, decoder=decoder, field=field)
    if spec.startswith("hf:"):
        return hugging_face.open_hub(spec.removeprefix("hf:"), decoder=decoder, field=field)
    if spec.startswith("hf-stream:"):
        urls = hugging_face.shard_urls(spec.removeprefix("hf-stream:"), field=field)
        return open_shards(urls, decoder=decoder, downloads=downloads, field=field)
    ending = remote.ending(spec).lower() if remote.is_url(spec) else spec
    path = None if remote.is_url(spec) else existing(spec, field)
    is_folder = path is not None and path.is_dir() and not is_parts(path)
    if ending.endswith(ARCHIVES) and not is_folder:
        files = expand(spec, field)
        if remote.is_url(files[0]):
            return open_shards(files, decoder=decoder, downloads=downloads, field=field)
        return ShardSource([LocalShard(Path(file), field=field) for file in files], decoder=decoder)
    if ending.rstrip("/").endswith(".parquet") and not is_folder:
        return _open_parquet(spec, decoder, field, downloads)
    if remote.is_url(spec):
        return _open_remote_table(spec, decoder, field)
    if path is None:
        raise InputError(f"{field}: {spec!r} does not exist")
    if path.is_dir():
        if hugging_face.is_saved(path):
            return hugging_face.open_saved(path, decoder=decoder, field=field)
        return open_folder(path, decoder=decoder, field=field)
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
    files = expand(spec, field)
    if remote.is_url(files[0]):
        holds_images = _holds_images(files[0], field)
    else:
        holds_images = any(parquet.holds_images(Path(file), field=field) for file in files)
    if holds_images:
        return open_shards(files, decoder=decoder, downloads=downloads, field=field)
    if remote.is_url(files[0]):
        if len(files) > 1:
            raise InputError(f"{field}: {files[0]} holds no images; give one table of paths at a time")
        return _open_remote_table(files[0], decoder, field)
    path = existing(spec, field)
    beside = Path(files[0]) if path is None else path  # of a folder of parts: the folder, which stands for the table
    return read_table(*map(Path, files), folder=_folder(beside), shown=spec, decoder=decoder, field=field)


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
    folder = f"{remote.folder(url)}/"
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


def _folder(file: Path) -> str:
    return "" if str(file.parent) == "." else f"{str(file.parent).rstrip('/')}/"
