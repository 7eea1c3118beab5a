"""What a source is made of, from the headers of some of its images."""

from __future__ import annotations

from collections import Counter

from hardpatch.data.images.decode import DecodeError
from hardpatch.data.images.formats import describe
from hardpatch.data.sources import Source
from hardpatch.runtime.errors import InputError


def find_channels(source: Source, *, max_images: int = 200) -> int:
    """As how many channels a source is read: 3 if some images are colour and all others grey, else the most frequent.

    Args:
        source: The images.
        max_images: Look at so many at most, spread over the source.

    Raises:
        InputError: None of them can be read.
    """
    if source.decoder is None:
        return int(source.read(0).image.shape[0])
    found: Counter[int] = Counter()
    reason = ""
    for index in source.spread(max_images):
        try:
            found[describe(source.content(index)).bands] += 1
        except (DecodeError, OSError) as error:
            reason = reason or f"; the first: {source.name(index)}: {error}"
    if not found:
        raise InputError(f"data: no image of {min(len(source), max_images)} can be read{reason}")
    return 3 if 3 in found and set(found) <= {1, 3} else max(found, key=lambda number: (found[number], number))
