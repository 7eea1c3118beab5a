"""Batches whose images are cropped on the device: kept there (``cache device``) or decoded there (``augmentation
device``); and the copy of a batch behind the work on the one before."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import NamedTuple

import torch
from jaxtyping import Bool, Shaped, UInt8
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset

from hardpatch.data.images import jpeg
from hardpatch.data.images.batched_crops import crop_batch, crop_masks
from hardpatch.data.images.crops import crop_numbers
from hardpatch.data.images.decode import DecodeError, Sample
from hardpatch.data.loader.cache import estimate
from hardpatch.data.loader.last_read import LastRead
from hardpatch.data.loader.loading import (
    Batch,
    Damage,
    TrainingImages,
    TrainingOrder,
    batches_in_order,
    first_readable,
)
from hardpatch.data.loader.processes import batches_of
from hardpatch.data.loader.reading import read_whole
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import tracked
from hardpatch.runtime.machine import free_memory

SHARE_OF_DEVICE = 0.6
"""A cache may take at most this share of the device's free memory."""


class Whole(NamedTuple):
    """An image that is not cropped yet."""

    pixels: Shaped[Tensor, "c h w"] | UInt8[Tensor, " n"]
    """uint8 or float32; or the bytes of a JPEG that the device decodes."""
    valid: Bool[Tensor, "h w"] | None
    """False = no data; None: all pixels are data."""
    damaged: list[Damage]
    """Images that were to be here and could not be read."""
    key: tuple[int, int]
    """(pass, index) that was asked for."""


class WholeImages(Dataset[Whole]):
    """Images asked for by (pass, index), as they are.

    Args:
        images: What is cropped of them later.
        encoded: Leave plain JPEGs as they are.
    """

    def __init__(self, images: TrainingImages, *, encoded: bool) -> None:
        self.images, self.encoded = images, encoded
        self.source = images.source

    def __len__(self) -> int:
        return len(self.images.source)

    def __getitem__(self, key: tuple[int, int]) -> Whole:
        found, damaged = first_readable(self.images.source, key[1], self._read)
        if isinstance(found, Sample):
            return Whole(found.image, found.valid, damaged, key)
        return Whole(found, None, damaged, key)

    def _read(self, index: int) -> Sample | Tensor:
        source = self.images.source
        if not self.encoded or source.decoder is None or source.decoder.no_data is not None:
            return read_whole(source, index)
        content = source.content(index)
        header = jpeg.read_header(content, channels=source.decoder.channels)
        if header is None or header.orientation != 1 or not content.rstrip(b"\0").endswith(b"\xff\xd9"):
            return source.decoder(content)  # the GPU's would not turn it, and fill up with grey what was cut off
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)


class ImagesOnDevice:
    """All images of a source, decoded, in the memory of a device.

    Args:
        images: Of the run.
        device: Where.
        workers: Data processes that decode, once.

    Raises:
        InputError: They do not fit, or would be decoded at a fraction of their size without a cache.
    """

    def __init__(self, images: TrainingImages, *, device: torch.device, workers: int) -> None:
        self.images, self.device = images, device
        self._check()
        self.kept: list[Whole | Damage] = []
        order = BatchSampler(range(len(images.source)), 16, drop_last=False)
        read = batches_of(_Once(images), order, collate=list, workers=workers)
        for some in tracked(read, "decoding onto the device", total=len(order), images_per_item=16):
            for item in some:
                self.kept.append(item if isinstance(item, Damage) else _moved(item, device))

    def _check(self) -> None:
        images = self.images
        if images.jpeg_scaling and estimate(images.source, size=images.size, jpeg_scaling=True).kept < 1:
            raise InputError(
                "cache: 'device' holds images at full size, and some are JPEGs that jpeg_scaling decodes at a fraction "
                "of it; shrink them once (hardpatch data pack), or give --no-jpeg-scaling"
            )
        need = estimate(images.source, size=images.size, jpeg_scaling=False).bytes
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else free_memory()
        if need > SHARE_OF_DEVICE * free:
            raise InputError(
                f"cache: the decoded images take about {need / 1e9:.1f} GB, 'device' may take {SHARE_OF_DEVICE:.0%} "
                f"of the {free / 1e9:.1f} GB that are free there; give --cache ram, "
                "or shrink them (hardpatch data pack)"
            )

    def whole(self, key: tuple[int, int]) -> Whole:
        """An image, or the first readable one after it."""

        def read(index: int) -> Whole:
            found = self.kept[index]
            if isinstance(found, Damage):
                raise DecodeError(found.reason)
            return found

        found, damaged = first_readable(self.images.source, key[1], read)
        return found._replace(damaged=damaged, key=key)


class _Once(Dataset[Whole | Damage]):
    """Every image once, damaged ones by their reason."""

    def __init__(self, images: TrainingImages) -> None:
        self.source = images.source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Whole | Damage:
        try:
            sample = read_whole(self.source, index)
        except (DecodeError, OSError) as error:
            return Damage(self.source.name(index), str(error))
        return Whole(sample.image.contiguous(), sample.valid, [], (0, index))


def batches_kept_on_device(kept: ImagesOnDevice, order: TrainingOrder) -> Generator[Batch, None, None]:
    """Micro-batches in the given order, cropped from what the device holds."""
    for keys in order:
        yield crop_on_device(kept.images, [kept.whole(key) for key in keys], device=kept.device)


def batches_decoded_on_device(
    images: LastRead[Whole], order: TrainingOrder, *, device: torch.device, workers: int
) -> Generator[Batch, None, None]:
    """Micro-batches in the given order; data processes only read, the device decodes (CUDA) and crops.

    Raises:
        InputError: Too many images in a row cannot be read.
    """
    assert isinstance(images.images, WholeImages)
    crops = images.images.images
    read = batches_in_order(
        images, order, collate=_listed, workers=workers, pin_memory=device.type == "cuda", prepare=crops.source.prepare
    )
    for wholes in read:
        yield crop_on_device(crops, _decoded(crops, wholes, device), device=device)


def crop_on_device(images: TrainingImages, wholes: Sequence[Whole], *, device: torch.device) -> Batch:
    """All views of each image, as :class:`TrainingImages` gives them, up to rounding."""
    numbers = crop_numbers(images.seed, [whole.key for whole in wholes], views=images.views)
    moved = [_moved(whole, device) for whole in wholes]
    boxes = [images.boxes((whole.pixels.shape[1], whole.pixels.shape[2]), row) for whole, row in zip(moved, numbers)]
    views = [(whole, box) for whole, some in zip(moved, boxes) for box in some]
    flat = [box for _, box in views]
    pixels = crop_batch([whole.pixels for whole, _ in views], flat, images.size, cover=images.covers)
    damaged = [damage for whole in wholes for damage in whole.damaged]
    if all(whole.valid is None for whole in moved):
        return Batch(pixels, damaged)
    masks = [
        torch.ones(whole.pixels.shape[1:], dtype=torch.bool, device=device) if whole.valid is None else whole.valid
        for whole, _ in views
    ]
    return Batch(pixels, damaged, crop_masks(masks, flat, images.size, cover=images.covers))


def _moved(whole: Whole, device: torch.device) -> Whole:
    valid = None if whole.valid is None else whole.valid.to(device, non_blocking=True)
    return whole._replace(pixels=whole.pixels.to(device, non_blocking=True), valid=valid)


def _listed(items: list[Whole]) -> list[Whole]:
    return items


def _decoded(images: TrainingImages, wholes: list[Whole], device: torch.device) -> list[Whole]:
    """JPEGs decoded by the GPU, all in one call."""
    encoded = [number for number, whole in enumerate(wholes) if whole.pixels.dim() == 1]
    if not encoded:
        return wholes
    decoder = images.source.decoder
    assert decoder is not None  # or nothing would be encoded
    try:
        pixels = decode_jpegs([wholes[number].pixels for number in encoded], channels=decoder.channels, device=device)
    except RuntimeError:  # one of them is damaged, or of a kind that the GPU does not know: one by one, by the rules
        pixels = None
    made = list(wholes)
    for place, number in enumerate(encoded):
        whole = made[number]
        if pixels is not None:
            made[number] = whole._replace(pixels=pixels[place])
            continue
        try:
            sample, damaged = decoder(whole.pixels.numpy().tobytes()), []
        except DecodeError as error:
            index = (whole.key[1] + len(whole.damaged)) % len(images.source)
            news = Damage(images.source.name(index), str(error))
            sample, more = first_readable(images.source, (index + 1) % len(images.source), images.source.read)
            damaged = [news, *more]
        made[number] = Whole(sample.image, sample.valid, [*whole.damaged, *damaged], whole.key)
    return made


def decode_jpegs(contents: list[Tensor], *, channels: int, device: torch.device) -> list[UInt8[Tensor, "c _h _w"]]:
    """Many JPEGs in one call on a GPU: by torchcodec where it is installed, else by torchvision, which gives it up.

    Raises:
        RuntimeError: One of them is damaged or unknown to the decoder.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        if importlib.util.find_spec("torchcodec") is not None:
            from torchcodec import decoders
        else:
            from torchvision.io import image as decoders
        mode = decoders.ImageReadMode.RGB if channels == 3 else decoders.ImageReadMode.GRAY
        pixels: list[Tensor] = decoders.decode_jpeg(contents, mode=mode, device=device)
    return pixels


def copied_behind(batches: Generator[Batch, None, None], device: torch.device) -> Generator[Batch, None, None]:
    """Batches on the device. On CUDA a stream of its own copies each while the device works on the one before."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    with closing(batches):
        for batch in batches:
            if stream is None:
                yield _batch_on(batch, device)
                continue
            with torch.cuda.stream(stream):
                moved = _batch_on(batch, device)
            now = torch.cuda.current_stream(device)
            now.wait_stream(stream)
            for tensor in (moved.images, moved.valid):
                if tensor is not None:
                    tensor.record_stream(now)  # its memory is not given away while this stream may read it
            yield moved


def _batch_on(batch: Batch, device: torch.device) -> Batch:
    valid = None if batch.valid is None else batch.valid.to(device, non_blocking=True)
    return batch._replace(images=batch.images.to(device, non_blocking=True), valid=valid)
