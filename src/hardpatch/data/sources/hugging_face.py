"""Data sets of Hugging Face: from the hub, or from a folder that ``datasets`` saved.

``hf:NAME`` downloads a data set as ``datasets`` does, into its own cache, and reads it in place. ``hf-stream:NAME``
fetches no more than is read next: the parquet files or tar shards that the data set consists of are shards from far
away like any others, so order, resuming and splitting over processes are the same as everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from hardpatch.data.images.decode import Decoder, Sample
from hardpatch.data.sources import parquet
from hardpatch.data.sources.base import Source
from hardpatch.data.sources.compact import Labels
from hardpatch.data.sources.shard_index import ARCHIVES
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.extras import install

Loaded = TypeVar("Loaded")


class HubName(NamedTuple):
    """What stands behind ``hf:``."""

    path: str
    config: str | None
    split: str | None

    @classmethod
    def parse(cls, spec: str, *, field: str) -> HubName:
        """``OWNER/NAME``, ``OWNER/NAME/CONFIG`` or a folder, each with ``@split`` if wanted.

        Raises:
            InputError: None of these.
        """
        path, at, split = (spec, "", "") if Path(spec).expanduser().is_dir() else spec.rpartition("@")
        if not at:
            path, split = spec, ""
        if not path or (at and not split):
            raise InputError(f"{field}: must be hf:NAME, hf:NAME/CONFIG or either with @split, got {spec!r}")
        if Path(path).expanduser().is_dir():
            return cls(str(Path(path).expanduser()), None, split or None)
        parts = path.split("/")
        if len(parts) > 3 or not all(re.fullmatch(r"[\w.-]+", part) for part in parts):
            raise InputError(f"{field}: {path!r} is neither a folder nor OWNER/NAME or OWNER/NAME/CONFIG on the hub")
        return cls("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split or None)


class HuggingFaceSource(Source):
    """Images of a ``datasets.Dataset``.

    Args:
        dataset: Any that can be read in any order.
        decoder: How its images are read.
        title: What to call it.
        field: What to call the argument in a message.

    Raises:
        InputError: It has no column of images, or several.
    """

    def __init__(self, dataset: Any, *, decoder: Decoder, title: str, field: str) -> None:
        from datasets import Image

        self.decoder: Decoder = decoder
        self.title = title
        self.column = _image_column(dataset.features, title, field)
        self._labels = self._only_complete(_labels(dataset, title, field))
        self.dataset = dataset.select_columns([self.column]).with_format(None)
        if isinstance(dataset.features[self.column], Image):
            self.dataset = self.dataset.cast_column(self.column, Image(decode=False))  # the bytes: decoding is ours

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> Sample:
        """Read and decode one image."""
        return self.decoder(self.content(index))

    def content(self, index: int) -> bytes:
        """The image's bytes; those of the file that it names where the data set holds paths."""
        cell = self.dataset[index][self.column]
        if isinstance(cell, dict):
            if cell["bytes"] is None and cell["path"]:
                return Path(cell["path"]).read_bytes()
            cell = cell["bytes"]
        return bytes(cell or b"")

    def name(self, index: int) -> str:
        """Data set and row."""
        return f"{self.title}/{index}"

    @property
    def labels(self) -> Sequence[str] | None:
        """Names of the classes, where every image has one."""
        return self._labels


def _image_column(features: Any, title: str, field: str) -> str:
    from datasets import Image, Value

    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    if not images:  # bytes that nobody has called images, as parquet files written by others have
        images = [
            name
            for name, feature in features.items()
            if (
                isinstance(feature, Value)
                and feature.dtype in ("binary", "large_binary")
                and name in parquet.IMAGE_NAMES
            )
            or (isinstance(feature, dict) and {"bytes", "path"} <= set(feature))
        ]
    column = parquet.choose(images, parquet.IMAGE_NAMES)
    if column is None:
        raise InputError(f"{field}: {title} has no column of images, got {dict(features)}")
    if len(images) > 1 and column not in parquet.IMAGE_NAMES:
        raise InputError(f"{field}: {title} has several columns of images: {images}; name one of them 'image'")
    return column


def _labels(dataset: Any, title: str, field: str) -> Labels | None:
    """Classes of all rows: a column of classes, or one that is called like one; None without such a column.

    Raises:
        InputError: Some are numbers that stand for no class.
    """
    from datasets import ClassLabel, Value

    features = dataset.features
    typed = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    named = [name for name in parquet.LABEL_NAMES if isinstance(features.get(name), Value)]
    column = parquet.choose(typed, parquet.LABEL_NAMES) or parquet.choose(named, parquet.LABEL_NAMES)
    if column is None:
        return None
    columns = dataset.select_columns([column]).with_format("arrow")
    if column in typed:
        parts = [batch.column(column).fill_null(-1).to_numpy() for batch in columns.iter(100_000)]
        try:
            return Labels.numbered(np.concatenate(parts or [np.zeros(0, np.int64)]), features[column].names)
        except ValueError as error:
            raise InputError(f"{field}: {title} has {error} in its column {column!r}") from error
    batches = (batch.column(column).to_pylist() for batch in columns.iter(100_000))
    return Labels.of(value for batch in batches for value in batch)


def is_saved(folder: Path) -> bool:
    """Was this folder written by ``save_to_disk``?"""
    saved = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return saved or (folder / "dataset_dict.json").is_file()


def open_saved(folder: Path, *, decoder: Decoder, field: str, split: str | None = None) -> Source:
    """A folder that ``save_to_disk`` wrote.

    Raises:
        InputError: ``datasets`` is not installed, the folder is damaged, or the split is not there.
    """
    datasets = _library(field)
    loaded = _calling(lambda: datasets.load_from_disk(str(folder)), f"cannot read {str(folder)!r}", field)
    if isinstance(loaded, datasets.DatasetDict):
        split = _choose_split(list(loaded), split, str(folder), field)
        loaded, folder = loaded[split], folder / split
    elif split not in (None, loaded.split and str(loaded.split)):
        raise InputError(f"{field}: {str(folder)!r} holds one split, {str(loaded.split)!r}, got @{split}")
    return HuggingFaceSource(loaded, decoder=decoder, title=str(folder), field=field)


def open_hub(spec: str, *, decoder: Decoder, field: str) -> Source:
    """A data set of the hub, downloaded into the cache of ``datasets``; or a folder.

    Raises:
        InputError: ``datasets`` is not installed, or the data set, its config or its split cannot be had.
    """
    datasets = _library(field)
    name = HubName.parse(spec, field=field)
    if is_saved(Path(name.path)):
        return open_saved(Path(name.path), decoder=decoder, field=field, split=name.split)
    problem = f"cannot load {spec!r} from Hugging Face"
    split = name.split
    if split is None:
        splits = _calling(lambda: datasets.get_dataset_split_names(name.path, name.config), problem, field)
        split = _choose_split(splits, None, spec, field)
    loaded = _calling(lambda: datasets.load_dataset(name.path, name.config, split=split), problem, field)
    return HuggingFaceSource(loaded, decoder=decoder, title=f"{spec.partition('@')[0]}@{split}", field=field)


def shard_urls(spec: str, *, field: str) -> list[str]:
    """The parquet files or tar shards of a split of a data set on the hub.

    Raises:
        InputError: ``datasets`` is not installed, the data set cannot be had, or does not consist of such files.
    """
    datasets = _library(field)
    name = HubName.parse(spec, field=field)
    builder = _calling(
        lambda: datasets.load_dataset_builder(name.path, name.config), f"cannot find {spec!r} on Hugging Face", field
    )
    files = builder.config.data_files or {}
    split = _choose_split([str(key) for key in files], name.split, spec, field)
    urls = [str(url) for url in files[split]]
    wrong = next((url for url in urls if not url.partition("?")[0].endswith((*ARCHIVES, ".parquet"))), None)
    if wrong is not None:
        raise InputError(
            f"{field}: {spec!r} does not consist of parquet files or tar shards ({wrong}) and cannot be streamed; use "
            f"hf:{spec}"
        )
    return urls


def _choose_split(splits: Sequence[str], wanted: str | None, title: str, field: str) -> str:
    """The wanted split; where none is, ``train`` or the only one.

    Raises:
        InputError: It is not there.
    """
    chosen = wanted or ("train" if "train" in splits else splits[0] if len(splits) == 1 else None)
    if chosen is None or chosen not in splits:
        got = "none is named" if wanted is None else f"got {wanted!r}"
        raise InputError(f"{field}: {title} has the splits {list(splits)}, name one as {title}@SPLIT; {got}")
    return chosen


def _library(field: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(f"{field}: Hugging Face datasets need {install('datasets')}") from None
    return datasets


def _calling(call: Callable[[], Loaded], problem: str, field: str) -> Loaded:
    """What a library of Hugging Face returns; whatever it raises as one line for the user."""
    try:
        return call()
    except Exception as error:  # theirs, the hub's, those of requests, pyarrow, fsspec and of the disk
        lines = str(error).strip().splitlines()
        raise InputError(f"{field}: {problem}: {type(error).__name__}: {lines[0] if lines else ''}") from error
