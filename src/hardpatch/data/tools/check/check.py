"""Go through a source and sum up what was seen."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hardpatch.config.commands import CheckConfig
from hardpatch.data.images.decode import Decoder
from hardpatch.data.images.value_range import LOOK_AT, join
from hardpatch.data.loader.loading import Damage
from hardpatch.data.sources import FileSource, Source, open_source, remote
from hardpatch.data.tools.check.duplicates import groups_of_equal, groups_of_near
from hardpatch.data.tools.check.look import Look, look_at
from hardpatch.data.tools.check.sheet import draw_sheet
from hardpatch.data.tools.check.workers import look_at_all
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.files import write_text_atomically
from hardpatch.runtime.log import tracked
from hardpatch.runtime.machine import usable_cores
from hardpatch.runtime.outputs import make_output_folder
from hardpatch.runtime.pictures import try_picture

_COLUMNS = (
    "path", "format", "width", "height", "channels", "alpha", "mode", "depth", "orientation", "frames", "bytes",
    "sha256", "hash", "lowest", "highest", "valid", "damaged",
)  # fmt: skip
"""Of ``images.csv``; sha256 is cut to its first half."""

_NONE = np.empty(0, np.float32)

_MOST_SIZES = 100
"""Sizes that are counted one by one; rarer ones are summed up."""


class CheckResult(NamedTuple):
    """What ``hardpatch data check`` found."""

    files: int
    """All that were gone through: loaded, damaged and skipped."""
    loaded: int
    damaged: list[Damage]
    skipped: list[str]
    """Files of a folder whose ending is not that of an image."""
    classes: dict[str, int]
    """Images by class, the largest first; none where no labels are known."""
    parts: dict[str, int]
    """Images of ``train/``, ``val/`` and the like, where the folder holds them."""
    formats: dict[str, int]
    channels: dict[str, int]
    """Images by number of channels, without alpha."""
    alpha: int
    """Images with alpha."""
    depths: dict[str, int]
    sizes: dict[str, int]
    """Images by WIDTHxHEIGHT, upright, the most frequent first; beyond 100 sizes the others together as ``other``."""
    width: dict[str, float]
    """Lowest, median and highest, pixels, upright."""
    height: dict[str, float]
    megabytes: float
    turned: int
    """Images that are stored turned or mirrored and are set upright."""
    animated: int
    """Files of more than one frame or page, of which the first is read."""
    without_data: int
    """Images in which some pixels hold no data."""
    constant: list[str]
    """Images that are of one value all over."""
    value_range: tuple[float, float] | None
    """Lowest and highest stored value of images that are not 8-bit."""
    advice: str
    """What to do about a range that most of these values do not fill."""
    duplicates: list[list[str]]
    """Groups of the same bytes."""
    near_duplicates: list[list[str]]
    """Groups that look the same, each with one of every group of duplicates."""


def run(config: CheckConfig) -> CheckResult:
    """Look at every file.

    Raises:
        InputError: A setting is wrong, or the source cannot be opened at all.
    """
    if config.out and Path(config.out).expanduser().is_file():
        raise InputError(f"out: must be a folder, got the file {config.out!r}")
    source = open_source(config.data, decoder=Decoder(config.channels or 3, no_data=config.no_data))
    folder = Path(config.data).expanduser()
    skipped = [str(folder / name) for name in source.others] if isinstance(source, FileSource) else []
    cores = usable_cores()
    seen = look_at_all(  # by processes that may die
        partial(look_at, source=source, channels=config.channels, no_data=config.no_data),
        len(source),
        workers=cores if config.workers is None else config.workers,
        timeout=config.timeout,
        failed=Look,
    )
    spread = set(source.spread(LOOK_AT))
    looks = [  # of the others the ends alone: the memory of a million samples is not needed
        look if look.values is None or look.number in spread else look._replace(values=look.values._replace(some=_NONE))
        for look in tracked(seen, "looking at images", total=len(source))
    ]
    looks.sort(key=lambda look: look.number)
    result = _summed_up(looks, source, skipped, near_bits=config.near_bits)
    if config.out:
        _write(Path(config.out).expanduser(), result, looks, source, config)
    return result


def _summed_up(looks: list[Look], source: Source, skipped: list[str], *, near_bits: int) -> CheckResult:
    good = [look for look in looks if not look.reason]
    abouts = [look.about for look in good if look.about is not None]
    found = join([look.values for look in good if look.values is not None])
    sizes = Counter(f"{about.width}x{about.height}" for about in abouts).most_common()
    others = sum(count for _, count in sizes[_MOST_SIZES:])
    equal = groups_of_equal([look.digest for look in good])
    repeated = {position for group in equal for position in group[1:]}
    seen = [look for position, look in enumerate(good) if position not in repeated and look.hash is not None]
    near = groups_of_near(np.array([look.hash for look in seen], np.uint64), most=near_bits)

    def names(group: list[int], among: list[Look]) -> list[str]:
        return [source.name(among[position].number) for position in group]

    return CheckResult(
        files=len(looks) + len(skipped),
        loaded=len(good),
        damaged=[Damage(source.name(look.number), look.reason) for look in looks if look.reason],
        skipped=skipped,
        classes=_counted(source.labels or ()),
        parts=_parts(source),
        formats=_counted(about.format for about in abouts),
        channels=_counted(str(about.bands) for about in abouts),
        alpha=sum(about.alpha for about in abouts),
        depths=_counted(about.depth for about in abouts),
        sizes=dict(sizes[:_MOST_SIZES]) | ({"other": others} if others else {}),
        width=_spread([about.width for about in abouts]),
        height=_spread([about.height for about in abouts]),
        megabytes=sum(look.size for look in looks) / 1e6,
        turned=sum(about.orientation != 1 for about in abouts),
        animated=sum(about.frames > 1 for about in abouts),
        without_data=sum(look.valid < 1 for look in good),
        constant=[source.name(look.number) for look in good if look.hash is None],
        value_range=None if found is None else (found.lowest, found.highest),
        advice="" if found is None else found.advice(),
        duplicates=[names(group, good) for group in equal],
        near_duplicates=[names(group, seen) for group in near],
    )


def _parts(source: Source) -> dict[str, int]:
    """How many images lie in each part of a folder."""
    if not isinstance(source, FileSource) or source.layout is None:
        return {}
    return _counted(path.partition("/")[0] for path in source.paths)


def _counted(names: Any) -> dict[str, int]:
    """The most frequent first."""
    return dict(Counter(names).most_common())


def _spread(numbers: list[int]) -> dict[str, float]:
    values = np.percentile(numbers, (0, 50, 100)).tolist() if numbers else (0, 0, 0)
    return dict(zip(("lowest", "median", "highest"), values))


def as_json(result: CheckResult) -> dict[str, Any]:
    """The keys of the ``--json`` line."""
    return result._asdict() | {"damaged": [{"path": name, "reason": reason} for name, reason in result.damaged]}


def _write(folder: Path, result: CheckResult, looks: list[Look], source: Source, config: CheckConfig) -> None:
    """``check.json``, ``images.csv``, ``good.txt`` of a source of files, ``contact_sheet.png``.

    Raises:
        InputError: The folder cannot be written to.
    """
    try:
        make_output_folder(folder)
        write_text_atomically(folder / "check.json", json.dumps(as_json(result), indent=1) + "\n")
        write_text_atomically(folder / "images.csv", _table(looks, source))
        if isinstance(source, FileSource):
            copies = {name for group in result.duplicates for name in group[1:]}
            names = [source.name(look.number) for look in looks if not look.reason]
            lines = [
                name if remote.is_url(name) else str(Path(name).absolute()) for name in names if name not in copies
            ]
            _write_list(folder, lines)
    except OSError as error:
        raise InputError(f"out: cannot write to {str(folder)!r}: {error.strerror}") from error
    try_picture(
        lambda: draw_sheet(source, looks, result.near_duplicates, config), folder / "contact_sheet.png",
        dpi=130, source=config.data,
    )  # fmt: skip


def _write_list(folder: Path, names: list[str]) -> None:
    """``good.txt``; or ``good.csv`` where a name has a line break in it, or blanks at its ends."""
    in_lines = all(name == name.strip() and not {"\n", "\r"} & set(name) for name in names)
    file, other = folder / "good.txt", folder / "good.csv"
    text = "".join(name + "\n" for name in names)
    if not in_lines:
        file, other, rows = other, file, io.StringIO()
        csv.writer(rows, lineterminator="\n").writerows([("path",), *((name,) for name in names)])
        text = rows.getvalue()
    write_text_atomically(file, text)
    other.unlink(missing_ok=True)  # of a call before


def _table(looks: list[Look], source: Source) -> str:
    """A row per image."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for look in looks:
        about = look.about
        seen = [""] * 9 if about is None else [
            about.format, about.width, about.height, about.bands, int(about.alpha), about.mode, about.depth,
            about.orientation, about.frames,
        ]  # fmt: skip
        hashed = "" if look.hash is None else f"{look.hash:016x}"
        ends = look.values[:2] if look.values else ("", "")
        writer.writerow(
            [source.name(look.number), *seen, look.size, look.digest.hex(), hashed, *ends, look.valid, look.reason]
        )
    return text.getvalue()
