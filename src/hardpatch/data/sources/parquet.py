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
    label: str | None
    classes: tuple[str, ...]
    """Names of the classes where labels are numbers and the file says what they mean."""

    def label_name(self, value: object) -> str | None:
        """The class that a cell stands for; None where it has none."""
        if value is None or (self.classes and value == -1):
            return None
        return self.classes[value] if self.classes and isinstance(value, int) else str(value)


def open_parquet(file: Path, *, field: str) -> Any:
    """``pyarrow.parquet.ParquetFile``.

    Raises:
        InputError: This is no parquet file.
    """
    try:
        return parquet.ParquetFile(file, memory_map=True)
    except (ValueError, OSError) as error:  # pyarrow's own errors derive from them
        raise InputError(f"{field}: cannot read {file}: {error}") from error


def table_rows(file: Path, *, field: str) -> Iterator[tuple[object, object]]:
    """Cells of the columns ``path`` and ``label`` of every row; no label column: ``...``.

    Raises:
        InputError: Damaged, or no column ``path``.
    """
    with open_parquet(file, field=field) as table:
        names = table.schema_arrow.names
        if "path" not in names:
            raise InputError(f"{field}: {file} needs a column 'path', got {names}")
        columns = [name for name in ("path", "label") if name in names]
        try:
            for batch in table.iter_batches(columns=columns):
                paths = batch.column("path").to_pylist()
                yield from zip(paths, batch.column("label").to_pylist() if "label" in names else [...] * len(paths))
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


def index_parquet(shard: Path, images: BufferedIOBase) -> ShardIndex:
    """List the images that lie in a parquet file, and write their bytes one after another to ``images``.

    Raises:
        DamagedShardError: Damaged, or without images.
    """
    sizes: list[int] = []
    keys: list[str] = []
    labels: list[str | None] = []
    try:
        with parquet.ParquetFile(shard) as file:
            columns = image_columns(file.schema_arrow)
            if columns is None:
                raise DamagedShardError(f"no column of images among {file.schema_arrow.names}")
            wanted = [name for name in (columns.image, columns.label) if name]
            for batch in file.iter_batches(batch_size=64, columns=wanted, use_threads=False):
                for row in batch.to_pylist():
                    content, path = _cell(row[columns.image])
                    images.write(content)
                    sizes.append(len(content))
                    keys.append(path or f"row {len(keys)}")
                    labels.append(columns.label_name(row[columns.label]) if columns.label else None)
    except (ValueError, IndexError, OSError) as error:  # pyarrow's own errors derive from them
        raise DamagedShardError(str(error)) from error
    ends = np.cumsum(sizes, dtype=np.int64)
    return ShardIndex(ends - np.array(sizes, np.int64), np.array(sizes, np.int64), Strings(keys), Labels.of(labels))


def _cell(cell: Any) -> tuple[bytes, str | None]:
    """Bytes and file name of one image; no bytes where there is none, which reading reports as damage."""
    if isinstance(cell, dict):
        return cell["bytes"] or b"", cell.get("path")
    return cell or b"", None
