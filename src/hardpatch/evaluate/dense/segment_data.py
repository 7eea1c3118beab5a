"""What segmentation is trained and judged on: both sides opened, every image and mask looked at, classes that fit."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from hardpatch.config.dense_evaluations import SegmentConfig
from hardpatch.data.images.decode import Decoder
from hardpatch.data.sources import ShapesSource, open_source
from hardpatch.data.tools.describe import say_what_is_left
from hardpatch.evaluate.dense.class_masks import MaskedImages, MaskRules, Survey, match_by_stem, survey
from hardpatch.evaluate.dense.comparison import held_back
from hardpatch.evaluate.features import none_readable, report_damage
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import say


class Data(NamedTuple):
    """Checked images of both sides."""

    train: MaskedImages
    val: MaskedImages
    names: list[str]
    """What the classes are called."""
    damaged: int


def open_data(config: SegmentConfig, *, decoder: Decoder, size: tuple[int, int]) -> Data:
    """Open both sides and look at every image and mask once.

    Raises:
        InputError: Anything that would go wrong later.
    """
    rules = MaskRules(config.binary, config.ignore_index, config.reduce_zero_label)
    images, masks, val_images, val_masks = _places(config)
    train = _open(images, masks, "", rules, decoder, size)
    if val_images:
        val = _open(val_images, val_masks, "val_", rules, decoder, size)
    else:
        kept, drawn = held_back(len(train), config.val_share, config.seed)
        train, val = train.only(kept), train.only(drawn)
        say(f"no val_images: {len(val)} of the {len(kept) + len(drawn)} images are held back (val_share, seed)")
    found = [survey(side, description=f"check {name}") for side, name in ((train, "images"), (val, "val_images"))]
    for side in found:
        if not side.readable:
            raise none_readable(side.damaged)
    damaged = report_damage(
        {
            name: (side.damaged, len(images))
            for name, side, images in zip(("images", "val_images"), found, (train, val))
        },
        max_damaged=config.max_damaged,
    )
    classes = _class_names(config, *found, brings_own=train.masks is None)
    return Data(train.only(found[0].readable), val.only(found[1].readable), classes, damaged)


def _places(config: SegmentConfig) -> tuple[str, str, str, str]:
    """Images, masks, validation images and their masks, with ADE20K's layout spelt out."""
    root = Path(config.images).expanduser()
    if config.masks or not (root / "images" / "training").is_dir():
        return config.images, config.masks, config.val_images, config.val_masks or config.masks
    images, masks = (str(root / kind / "training") for kind in ("images", "annotations"))
    if config.val_images or not (root / "images" / "validation").is_dir():
        return images, masks, config.val_images, config.val_masks
    val_images, val_masks = (str(root / kind / "validation") for kind in ("images", "annotations"))
    return images, masks, val_images, val_masks


def _open(
    images: str, masks: str, prefix: str, rules: MaskRules, decoder: Decoder, size: tuple[int, int]
) -> MaskedImages:
    source = open_source(images, decoder=decoder, image_size=size, field=f"{prefix}images")
    say_what_is_left(source, field=f"{prefix}images")
    if isinstance(source, ShapesSource):
        return MaskedImages(source, None, rules)
    if not masks:
        raise InputError(f"{prefix}masks: name the folder of the masks of {images!r}")
    return MaskedImages(source, match_by_stem(source, Path(masks).expanduser(), field=f"{prefix}masks"), rules)


def _class_names(config: SegmentConfig, train: Survey, val: Survey, *, brings_own: bool) -> list[str]:
    """Names of all classes, after a check that both sides fit."""
    if not train.pixels:
        raise InputError("masks: no pixel counts: all have ignore_index" +
                         (" or 0" if config.reduce_zero_label else ""))  # fmt: skip
    if set(train.pixels) == {0} and not config.binary and config.ignore_index == 255:
        raise InputError("masks: hold no other class than 0 (and ignored pixels of 255); black and white masks need "
                         "--binary")  # fmt: skip
    number = config.num_classes or max(max(train.pixels) + 1, 2)
    for field, side in (("masks", train), ("val_masks", val)):
        for value in sorted(side.pixels):
            if not 0 <= value < number:
                raise InputError(f"{field}: classes go from 0 to {number - 1} (num_classes), and the mask of "
                                 f"{side.example[value]} has class {value}")  # fmt: skip
    if missing := sorted(set(val.pixels) - set(train.pixels)):
        raise InputError(f"val_masks: class {missing[0]} is in the mask of {val.example[missing[0]]} and in no "
                         "training mask")  # fmt: skip
    if not config.class_names:
        binary = ["background", "foreground"]
        return binary if (config.binary or brings_own) and number == 2 else [f"class {i}" for i in range(number)]
    try:
        lines = Path(config.class_names).expanduser().read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"class_names: cannot read {config.class_names!r}: {error}") from error
    named = [line.strip() for line in lines if line.strip()]
    if len(named) != number:
        raise InputError(f"class_names: {config.class_names!r} has {len(named)} names for {number} classes")
    return named
