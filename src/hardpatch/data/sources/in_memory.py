"""Images that a Python program has at hand: arrays, tensors, PIL images, lists of files, data sets of PyTorch and
Hugging Face.

What is handed over gets a name, ``memory:N images, CHECKSUM``, which stands in the config of a run. The name can be
opened as long as the program runs. Each image is read as a file of the same content would be: arrays as ``.npy``, PIL
images as PNG, so that one set of rules holds for depth, channels, value range and pixels without data.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hardpatch.data.images.decode import DecodeError, Decoder, Sample
from hardpatch.data.images.formats import describe
from hardpatch.data.sources.base import Source, fingerprint
from hardpatch.data.sources.compact import Labels
from hardpatch.data.sources.files import FileSource
from hardpatch.data.sources.hugging_face import HuggingFaceSource
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import tracked

PREFIX = "memory:"
Opens = Callable[[Decoder], Source]

_held: dict[str, Opens] = {}
"""What was handed over, by its name."""

_IN_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_IMAGE_KEYS = ("image", "img", "pixel_values", "pixels")


def hold(images: object, field: str) -> str | None:
    """Name images that are in memory; None: they are none of the kinds that are known.

    Args:
        images: See :func:`_opens`.
        field: What to call the argument in a message.

    Raises:
        InputError: There are none, labels do not fit them, or they are one image or no images.
    """
    opens = _opens(images, field)
    if opens is None:
        return None
    source = opens(Decoder(3))
    if len(source) == 0:
        raise InputError(f"{field}: needs at least one image, got none in a {type(images).__name__}")
    if isinstance(source, InMemorySource):
        try:
            describe(source.content(0))
        except (DecodeError, OSError) as error:
            raise InputError(f"{field}: the first item of the {type(images).__name__} is no image: {error}") from None
    name = f"{PREFIX}{fingerprint(source)}"
    _held[name] = opens
    return name


def open_held(name: str, *, decoder: Decoder, field: str) -> Source:
    """The images of a name that :func:`hold` has given.

    Raises:
        InputError: This program has handed over none of that name.
    """
    if name not in _held:
        raise InputError(
            f"{field}: {name!r} names images that were in the memory of a Python program; hand them over again there, "
            "as in hardpatch.pretrain(images, ...), or save them as files"
        )
    return _held[name](decoder)


def _opens(images: Any, field: str) -> Opens | None:
    """How to open what was handed over, once it is known how to decode.

    An array or tensor (N, H, W) or (N, H, W, C) or (N, C, H, W); a list of arrays, tensors or PIL images of any sizes,
    or of files; a pair of one of these and labels; a PyTorch data set with a length, of images or of tuples that begin
    with an image and a label; a ``datasets.Dataset``.
    """
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(images).__mro__}
    if "datasets.DatasetDict" in kinds:
        raise InputError(f"{field}: holds the splits {list(images)}; hand over one of them, as in data['train']")
    if "datasets.Dataset" in kinds:
        return lambda decoder: HuggingFaceSource(images, decoder=decoder, title="data set", field=field)
    if isinstance(images, torch.utils.data.Dataset):
        if not hasattr(images, "__len__"):
            raise InputError(f"{field}: a data set without a length cannot be numbered; one with __len__ is needed")
        labels = _labels_of(images)
        return lambda decoder: InMemorySource(images, labels, decoder=decoder)
    if isinstance(images, tuple) and len(images) == 2 and _is_many(images[0]) and _are_labels(images[1]):
        many, given = images
        if len(many) != len(given):
            raise InputError(f"{field}: must hold a label for each image, got {len(many)} and {len(given)}")
        found = Labels.of(_label(value, ()) for value in given)
        return _opens_many(many, found, field)
    return _opens_many(images, None, field) if _is_many(images) else None


def _opens_many(images: Any, labels: Labels | None, field: str) -> Opens | None:
    if isinstance(images, np.ndarray | torch.Tensor) and (
        images.ndim not in (3, 4) or (images.ndim == 3 and min(images.shape[0], images.shape[-1]) <= 4)
    ):
        raise InputError(
            f"{field}: must hold several images, (N, H, W) or (N, H, W, C), got the shape {tuple(images.shape)}; of a "
            "single image make a list"
        )
    if isinstance(images, list | tuple) and all(isinstance(one, str | os.PathLike) for one in images):
        paths = [os.path.abspath(Path(one).expanduser()) for one in images]  # noqa: PTH100  (keeps links)
        return lambda decoder: FileSource(paths, decoder=decoder, labels=labels)
    if not all(map(_is_image, images)):
        return None
    return lambda decoder: InMemorySource(images, labels, decoder=decoder)


def _is_many(images: object) -> bool:
    return isinstance(images, np.ndarray | torch.Tensor | list | tuple)


def _are_labels(many: Any) -> bool:
    if isinstance(many, np.ndarray | torch.Tensor):
        return many.ndim == 1
    return isinstance(many, list | tuple) and not any(map(_is_image, many))


def _is_image(one: object) -> bool:
    return isinstance(one, np.ndarray | torch.Tensor | Image.Image)


class InMemorySource(Source):
    """Images that are there already.

    Args:
        images: Can be asked for by number.
        labels: Class of every image, if known.
        decoder: How they are read, as files.
    """

    def __init__(self, images: Any, labels: Labels | None, *, decoder: Decoder) -> None:
        self.images = images
        self.decoder: Decoder = decoder
        self._labels = self._only_complete(labels)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Sample:
        """Decode one image."""
        return self.decoder(self.content(index))

    def content(self, index: int) -> bytes:
        """The image as a file."""
        return _as_file(self.images[index])

    def name(self, index: int) -> str:
        """Its number."""
        return f"memory/{index}"

    @property
    def labels(self) -> Sequence[str] | None:
        """Class of every image."""
        return self._labels


def _as_file(item: Any) -> bytes:
    """What an item of a data set would be as a file.

    Raises:
        OSError: It is no image.
    """
    if isinstance(item, list | tuple):
        item = item[0]
    elif isinstance(item, dict):
        item = next((item[key] for key in _IMAGE_KEYS if key in item), item)
    file = io.BytesIO()
    if isinstance(item, Image.Image):
        if item.mode in _IN_PNG:
            item.save(file, "PNG", compress_level=0)
            return file.getvalue()
        item = np.asarray(item)
    if isinstance(item, torch.Tensor):
        item = (item.float() if item.dtype == torch.bfloat16 else item).detach().cpu().numpy()
    if not isinstance(item, np.ndarray):
        raise OSError(f"must be an array, a tensor or a PIL image, got a {type(item).__name__}")
    np.save(file, item, allow_pickle=False)
    return file.getvalue()


def _labels_of(dataset: Any) -> Labels | None:
    """Labels of a PyTorch data set: as torchvision keeps them, or by going through all of it."""
    names = list(getattr(dataset, "classes", None) or ())
    targets = getattr(dataset, "targets", None)
    if targets is not None and len(targets) == len(dataset):
        return Labels.of(_label(value, names) for value in targets)
    if len(dataset) == 0 or not _has_label(dataset[0]):
        return None
    items = tracked((dataset[index] for index in range(len(dataset))), "reading labels", total=len(dataset))
    return Labels.of(_label(item[1], names) for item in items)


def _has_label(item: Any) -> bool:
    return isinstance(item, list | tuple) and len(item) > 1 and (
        isinstance(item[1], int | str | np.integer) or (isinstance(item[1], torch.Tensor) and item[1].ndim == 0)
    )  # fmt: skip


def _label(value: Any, names: Sequence[str]) -> str | None:
    """The name of a class."""
    if isinstance(value, torch.Tensor | np.generic):
        value = value.item()
    if isinstance(value, int) and 0 <= value < len(names):
        return str(names[value])
    return None if value is None else str(value)
