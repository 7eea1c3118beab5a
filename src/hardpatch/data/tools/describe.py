"""What a source is made of, from the headers of some of its images."""

from __future__ import annotations

from collections import Counter

from hardpatch.data.images.decode import DecodeError
from hardpatch.data.images.formats import describe
from hardpatch.data.sources import FileSource, Source
from hardpatch.data.sources.left_out import told_of_others
from hardpatch.runtime.distributed import is_main_of_environment
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import warn
from hardpatch.runtime.text import quoted

FEW_SCENES = 200
MANY_CROPS = 16
"""At most so many images, each as large as so many crops, had better be cut into tiles."""
_LOOK_FOR_PAGES = 64
"""Images of a source, spread over it, whose pages and frames are counted."""


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


def say_scenes(source: Source, spec: str, size: tuple[int, int]) -> None:
    """Say so where few, very large images give an epoch of few crops.

    Args:
        source: The images.
        spec: What they were opened by.
        size: Height and width of a crop, pixels.
    """
    if source.decoder is None or len(source) > FEW_SCENES or not is_main_of_environment():
        return
    areas = []
    for index in source.spread(_LOOK_FOR_PAGES):
        try:
            about = describe(source.content(index))
        except (DecodeError, OSError):
            continue
        areas.append(about.width * about.height)
    crops = sorted(areas)[len(areas) // 2] / (size[0] * size[1]) if areas else 0
    if crops >= MANY_CROPS:
        warn(
            f"data: {len(source):,} images, each of about {crops:,.0f} times {size[1]}x{size[0]} px, and an epoch "
            "takes one crop of each. If they are scenes rather than pictures of one thing, cut them into images first: "
            f"hardpatch data pack {quoted(spec)} --tile {min(size)} --out tiles/"
        )


def say_what_is_left(source: Source, *, field: str = "data") -> None:
    """Say once what a source holds that is not read: files of other endings, pages and frames after the first.

    Of several processes the main one says it.

    Args:
        source: The images.
        field: What to call the source in a message.
    """
    if not is_main_of_environment():
        return
    if isinstance(source, FileSource) and (told := told_of_others(source)):
        warn(f"{field}: {told}")
    several, example, seen = 0, "", 0
    for index in source.spread(_LOOK_FOR_PAGES) if source.decoder is not None else ():
        try:
            about = describe(source.content(index))
        except (DecodeError, OSError):
            continue
        seen += 1
        if about.frames > 1 and about.format != "JPEG":  # a JPEG's others are previews and depth maps
            several += 1
            example = example or f"{source.name(index)} has {about.frames}"
    if several:
        warn(
            f"{field}: {several} of {seen} images looked at have several pages or frames ({example}): the first is "
            "read. Bands belong into one page (tifffile.imwrite(..., planarconfig='separate'), or .npy), frames that "
            "are to be learnt from into files of their own"
        )
