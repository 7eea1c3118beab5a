"""Parquet files: tables of paths, and files that hold the images themselves, as Hugging Face writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from pyarrow import parquet

from hardpatch.data.sources.compact import Labels, Strings
from hardpatch.data.sources.shard_index import DamagedShardError, ShardIndex
from hardpatch.runtime.errors import InputError

LABEL_NAMES = ("label", "labels", "class", "cls", "fine_label")
"""What a column of classes is called where nothing else says which it is, most likely first."""

IMAGE_NAMES = ("image", "img", "images", "jpg", "png", "webp")
"""As :data:`LABEL_NAMES`, for the images."""


class ImageColumns(NamedTuple):
    """Where a parquet file holds images and their classes."""

    image: str
    label_column: str | None
    classes: tuple[str, ...]
    """Names of the classes where labels are numbers and the file says what they mean."""

    def label(self, value: object) -> object:
        """What a cell of the column of labels stands for; None where it is no label."""
        if not self.classes or not isinstance(value, int):
            return value
        if not -1 <= value < len(self.classes):
            raise ValueError(
                f"a label {value} in the column {self.label_column!r}, which has {len(self.classes)} classes"
            )
        return None if value == -1 else self.classes[value]


def open_parquet(file: Path, *, field: str) -> Any:
    """``pyarrow.parquet.ParquetFile``.

    Raises:
        InputError: This is no parquet file.
    """
    try:
        return parquet.ParquetFile(file, memory_map=True)
    except (ValueError, OSError) as error:  # pyarrow's own errors derive from them
        raise InputError(f"{field}: cannot read {file}: {error}") from error


def holds_images(file: Path, *, field: str) -> bool:
    """Are there images inside? Not where every row only names a file, as ``datasets`` may write it.

    Raises:
        InputError: This is no parquet file.
    """
    with open_parquet(file, field=field) as table:
        columns = image_columns(table.schema_arrow)
        return columns is not None and not _only_paths(table, columns.image)


def _only_paths(table: Any, image: str) -> bool:
    """Has no row bytes of its own, though there are rows and they may name files?"""
    kind = table.schema_arrow.field(image).type
    if not pyarrow.types.is_struct(kind) or kind.get_field_index("path") < 0 or not table.metadata.num_rows:
        return False
    batches = table.iter_batches(64, columns=[f"{image}.bytes"], use_threads=False)
    return all(cell is None or cell["bytes"] is None for batch in batches for cell in batch.column(0).to_pylist())


def table_rows(file: Path, *, field: str) -> Iterator[tuple[object, object]]:
    """Path and label of every row: of the columns ``path`` and ``label``, or of images that only name their files.

    Where there is no column of labels, a label is ``...``.

    Raises:
        InputError: Damaged, or without paths.
    """
    with open_parquet(file, field=field) as table:
        names = table.schema_arrow.names
        images = image_columns(table.schema_arrow)
        if "path" in names:
            columns, wanted = ImageColumns("path", "label" if "label" in names else None, ()), ["path"]
        elif images is not None:
            columns, wanted = images, [f"{images.image}.path"]
        else:
            raise InputError(f"{field}: {file} needs a column 'path', got {names}")
        wanted += [columns.label_column] if columns.label_column else []
        try:
            for batch in table.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    cell = row[columns.image]
                    label = columns.label(row[columns.label_column]) if columns.label_column else ...
                    yield cell["path"] if isinstance(cell, dict) else cell, label
        except (ValueError, OSError) as error:
            raise InputError(f"{field}: cannot read {file}: {error}") from error


def image_columns(schema: Any) -> ImageColumns | None:
    """Which columns of a schema of pyarrow hold images and classes; None where none holds images."""
    features = _features(schema)

    def holds_images(name: str) -> bool:
        kind = schema.field(name).type
        if pyarrow.types.is_struct(kind):
            return bool(kind.get_field_index("bytes") >= 0)
        return name in IMAGE_NAMES and bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

    image = choose([name for name in schema.names if holds_images(name)], IMAGE_NAMES)
    if image is None:
        return None
    typed = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    label = choose(typed, LABEL_NAMES) or choose([name for name in schema.names if name in LABEL_NAMES], LABEL_NAMES)
    names = features.get(label, {}).get("names") if label else None
    return ImageColumns(image, label, tuple(names or ()))


def choose(names: list[str], likely: tuple[str, ...]) -> str | None:
    """The most likely of some columns, or the first; None of none."""
    return next((name for name in likely if name in names), names[0] if names else None)


def _features(schema: Any) -> dict[str, Any]:
    """What Hugging Face says of the columns."""
    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features: dict[str, Any] = about["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def index_parquet(shard: Path, images: BufferedIOBase, *, folder: Path | None = None) -> ShardIndex:
    """List the images that lie in a parquet file, and write their bytes one after another to ``images``.

    Args:
        shard: The file.
        images: Where the bytes go.
        folder: Where files lie that it names instead of holding them; None: they cannot be had.

    Raises:
        DamagedShardError: Damaged, without images, or it names a file that is not there.
    """
    sizes: list[int] = []
    keys: list[str] = []
    labels: list[object] = []
    try:
        with parquet.ParquetFile(shard) as file:
            columns = image_columns(file.schema_arrow)
            if columns is None:
                raise DamagedShardError(f"no column of images among {file.schema_arrow.names}")
            wanted = [name for name in (columns.image, columns.label_column) if name]
            for batch in file.iter_batches(batch_size=64, columns=wanted, use_threads=False):
                for row in batch.to_pylist():
                    content, path = _cell(row[columns.image], folder)
                    images.write(content)
                    sizes.append(len(content))
                    keys.append(path or f"row {len(keys)}")
                    labels.append(columns.label(row[columns.label_column]) if columns.label_column else None)
    except (ValueError, IndexError, OSError) as error:  # pyarrow's own errors derive from them
        raise DamagedShardError(str(error)) from error
    ends = np.cumsum(sizes, dtype=np.int64)
    return ShardIndex(ends - np.array(sizes, np.int64), np.array(sizes, np.int64), Strings(keys), Labels.of(labels))


def _cell(cell: Any, folder: Path | None) -> tuple[bytes, str | None]:
    """Bytes and file name of one image; no bytes where there is none, which reading reports as damage."""
    if not isinstance(cell, dict):
        return cell or b"", None
    content, path = cell["bytes"], cell.get("path")
    if content is None and path:
        if folder is None:
            raise ValueError(f"it does not hold the image {path!r}, only names it")
        content = (folder / path).read_bytes()
    return content or b"", path
