"""From a source to crops of an image: what is cut out is known before the file is decoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Bool, Shaped
from torch import Tensor

from hardpatch.data.images import jpeg
from hardpatch.data.images.crops import Box
from hardpatch.data.images.decode import Decoder, Sample
from hardpatch.data.loader.cache import SharedImages
from hardpatch.data.sources import Source


class View(NamedTuple):
    """One crop of an image."""

    image: Shaped[Tensor, "c h w"]
    """uint8, or float32 in the same units."""
    valid: Bool[Tensor, "h w"] | None
    """False = no data; None: all pixels are data."""


def read_views(
    source: Source,
    index: int,
    draw: Callable[[tuple[int, int]], list[Box]],
    cut: Callable[[Sample, Box], View],
    *,
    size: tuple[int, int],
    jpeg_scaling: bool,
    cache: SharedImages | None = None,
) -> list[View]:
    """Crops of one image, from one decoding of it at most.

    Args:
        source: The images.
        index: Of the image.
        draw: Where the crops of an image of this height and width lie.
        cut: Makes a crop of a decoded image.
        size: Height and width of the crops, pixels.
        jpeg_scaling: Decode large JPEGs smaller where all crops are large enough.
        cache: Holds images that were decoded before, and takes this one.

    Raises:
        DecodeError: The image is damaged.
        OSError: It cannot be read at all.
    """
    sample = None if cache is None else cache.get(index)
    if sample is None:
        found = _read_at_a_fraction(source, index, draw, cut, size) if jpeg_scaling else read_whole(source, index)
        if isinstance(found, list):
            return found
        sample = found
        if cache is not None:
            cache.put(index, sample)
    return [cut(sample, box) for box in draw((sample.image.shape[1], sample.image.shape[2]))]


def read_whole(source: Source, index: int) -> Sample:
    """As ``source.read``, and plain JPEGs quicker.

    Raises:
        DecodeError: The image is damaged.
        OSError: It cannot be read at all.
    """
    if source.decoder is None:
        return source.read(index)
    return _decode_whole(source.decoder, source.content(index))


def _read_at_a_fraction(
    source: Source,
    index: int,
    draw: Callable[[tuple[int, int]], list[Box]],
    cut: Callable[[Sample, Box], View],
    size: tuple[int, int],
) -> list[View] | Sample:
    """The crops of a JPEG that is large enough for it, or a whole image."""
    if source.decoder is None:
        return source.read(index)
    decoder, content = source.decoder, source.content(index)
    header = _plain_header(decoder, content)
    if header is None or jpeg.choose_scale(header.size, size) == 1:
        return _decode_whole(decoder, content)
    boxes = draw(header.size)
    scale = min(jpeg.choose_scale((box.height, box.width), size) for box in boxes)
    image = jpeg.decode(content, header, channels=decoder.channels, scale=scale)
    if image is None:
        sample = decoder(content)  # knows all formats, and says what is wrong with a damaged file
        return [cut(sample, box) for box in draw((sample.image.shape[1], sample.image.shape[2]))]
    shape = (image.shape[1], image.shape[2])
    return [cut(Sample(image), jpeg.scaled_box(box, scale, shape)) for box in boxes]


def _decode_whole(decoder: Decoder, content: bytes) -> Sample:
    header = _plain_header(decoder, content)
    image = None if header is None else jpeg.decode(content, header, channels=decoder.channels, scale=1)
    return decoder(content) if image is None else Sample(image)


def _plain_header(decoder: Decoder, content: bytes) -> jpeg.Jpeg | None:
    """The header of a JPEG whose pixels the decoder's rules leave as they are."""
    return jpeg.read_header(content, channels=decoder.channels) if decoder.no_data is None else None
