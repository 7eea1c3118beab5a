"""Images with a class for every pixel: masks of a folder, matched by name, and the sources that bring their own.

Values of a mask file are classes: grey, palette (the index, not the colour) or ``.npy`` of whole numbers. Colour
pictures are refused unless their channels are equal.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Int16, Shaped
from PIL import Image
from torch import Tensor

from hardpatch.data.images.decode import EXTENSIONS, DecodeError
from hardpatch.data.loader.loading import Damage
from hardpatch.data.sources import Source
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import tracked

Found = TypeVar("Found")

IGNORED = -1
"""Value of a pixel that does not count, whatever the files say."""


class MaskRules(NamedTuple):
    """What the values of mask files mean."""

    binary: bool = False
    """Above 127 is class 1, the rest class 0."""
    ignore_index: int = 255
    """This value does not count."""
    reduce_zero_label: bool = False
    """0 does not count either, and class k has the value k + 1."""


class MaskedImage(NamedTuple):
    """An image and the class of each of its pixels."""

    image: Shaped[Tensor, "c h w"]
    mask: Int16[Tensor, "h w"]
    """:data:`IGNORED` where a pixel does not count."""


def read_class_mask(content: bytes, rules: MaskRules) -> Int16[Tensor, "h w"]:
    """Decode one mask.

    Raises:
        DecodeError: Damaged, or its values are no classes.
    """
    try:
        values = _mask_values(content)
    except DecodeError:
        raise
    except Exception as error:  # whatever Pillow and numpy raise on damaged files
        raise DecodeError(f"{type(error).__name__}: {error}") from error
    if values.dtype.kind not in "bui" or values.ndim != 2:
        raise DecodeError(f"holds {values.dtype} of shape {values.shape}; classes are whole numbers, one a pixel")
    classes = values.astype(np.int64)
    if classes.size and not -(2**15) <= classes.min() <= classes.max() < 2**15:
        raise DecodeError(f"holds values up to {classes.max()}; classes go up to {2**15 - 1}")
    if rules.binary:
        return torch.from_numpy((classes > (0 if values.dtype == np.bool_ else 127)).astype(np.int16))
    ignored = classes == rules.ignore_index
    if rules.reduce_zero_label:
        ignored |= classes == 0
        classes = classes - 1
    return torch.from_numpy(np.where(ignored, IGNORED, classes).astype(np.int16))


def _mask_values(content: bytes) -> np.ndarray:
    """The numbers of a mask file, (H, W)."""
    if content.startswith(b"\x93NUMPY"):
        return np.asarray(np.load(io.BytesIO(content), allow_pickle=False))
    with Image.open(io.BytesIO(content)) as picture:
        if picture.mode in ("RGB", "RGBA"):
            colours = np.asarray(picture)[..., :3]
            if (colours != colours[..., :1]).any():
                raise DecodeError("a colour picture; classes must be whole numbers, one channel (or a palette)")
            return np.ascontiguousarray(colours[..., 0])
        return np.asarray(picture.getchannel("L") if picture.mode == "LA" else picture)


class MaskedImages:
    """A numbered list of images with class masks.

    Args:
        masks: Their mask files in the same order; None where the source brings foreground masks of its own.
        indices: Only these images of the source.
    """

    def __init__(
        self, images: Source, masks: Sequence[Path] | None, rules: MaskRules, *, indices: list[int] | None = None
    ) -> None:
        self.images = images
        self.masks = masks
        self.rules = rules
        self.indices = list(range(len(images))) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def only(self, positions: Sequence[int]) -> MaskedImages:
        """Some of them, by their numbers here."""
        return MaskedImages(self.images, self.masks, self.rules, indices=[self.indices[i] for i in positions])

    def name(self, position: int) -> str:
        """What to call an image in a message."""
        return self.images.name(self.indices[position])

    def read(self, position: int) -> MaskedImage:
        """Image and mask.

        Raises:
            DecodeError: The image is damaged.
            OSError: It cannot be read at all.
            InputError: The mask is damaged, missing, or of another size.
        """
        index = self.indices[position]
        sample = self.images.read(index)
        if self.masks is None:
            if sample.mask is None:
                raise InputError("masks: the images bring no masks of their own; name a folder of masks")
            mask = sample.mask.to(torch.int16)
        else:
            try:
                mask = read_class_mask(self.masks[index].read_bytes(), self.rules)
            except (DecodeError, OSError) as error:
                raise InputError(f"masks: cannot read {self.masks[index]}: {error}") from error
        if mask.shape != sample.image.shape[-2:]:
            raise InputError(
                f"masks: the mask of {self.name(position)} is {mask.shape[0]}x{mask.shape[1]} pixels and the image "
                f"{sample.image.shape[1]}x{sample.image.shape[2]}; they must be of the same size"
            )
        return MaskedImage(sample.image, mask)


def match_by_stem(images: Source, folder: Path, *, field: str) -> list[Path]:
    """The mask file of every image: the one of the same name up to the ending.

    Raises:
        InputError: No such folder, two files of one name, or an image without a mask.
    """
    if not folder.is_dir():
        raise InputError(f"{field}: must be a folder, got {str(folder)!r}")
    by_stem: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in EXTENSIONS and not file.name.startswith("."):
            if file.stem in by_stem:
                raise InputError(f"{field}: two masks are named {file.stem!r}: {by_stem[file.stem]} and {file}")
            by_stem[file.stem] = file
    stems = [Path(images.name(index).rpartition(":")[2]).stem for index in range(len(images))]
    if len(set(stems)) < len(stems):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise InputError(f"{field}: are matched by name, and several images are named {twice!r}; rename them")
    for index, stem in enumerate(stems):
        if stem not in by_stem:
            raise InputError(f"{field}: {str(folder)!r} has no mask for the image {images.name(index)}")
    return [by_stem[stem] for stem in stems]


class Survey(NamedTuple):
    """What a look at every image and mask found."""

    readable: list[int]
    """Positions of the images that can be decoded."""
    damaged: list[Damage]
    pixels: dict[int, int]
    """Pixels of each class."""
    example: dict[int, str]
    """An image in which a class occurs."""


def survey(images: MaskedImages, *, description: str) -> Survey:
    """Read every image and mask once, so that what is wrong comes out before any training.

    Raises:
        InputError: A mask is damaged or of another size than its image.
    """

    def look(position: int) -> Damage | tuple[np.ndarray, np.ndarray]:
        try:
            mask = images.read(position).mask
        except (DecodeError, OSError) as error:
            return Damage(images.name(position), str(error))
        return np.unique(mask.numpy(), return_counts=True)

    readable, damaged = [], []
    pixels: dict[int, int] = {}
    example: dict[int, str] = {}
    for position, found in tracked(_in_threads(look, len(images)), description, total=len(images)):
        if isinstance(found, Damage):
            damaged.append(found)
            continue
        readable.append(position)
        for value, count in zip(*(part.tolist() for part in found)):
            if value != IGNORED:
                pixels[value] = pixels.get(value, 0) + count
                example.setdefault(value, images.name(position))
    return Survey(readable, damaged, pixels, example)


def _in_threads(look: Callable[[int], Found], count: int) -> Iterator[tuple[int, Found]]:
    """(number, result) in order; decoders leave Python's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from enumerate(pool.map(look, range(count)))
