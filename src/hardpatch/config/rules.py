"""Rules between the fields of a config; what one field alone may be stands at the field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hardpatch.method.choices import TARGETS
from hardpatch.runtime.errors import InputError

if TYPE_CHECKING:
    from hardpatch.config.config import Config


def check_together(config: Config) -> None:
    """Refuse fields that are fine each, and wrong together.

    Raises:
        InputError: Names the field, the rule and the value.
    """
    for told in (*_lengths(config), *_hardness(config), *_targets(config), *_sizes(config)):
        raise InputError(told)


def _lengths(config: Config) -> Iterator[str]:
    """What is broken of the rules between lengths, batch and views."""
    data, method, optimisation = config.data, config.method, config.optimisation
    epochs, batch, masks = optimisation.epochs, optimisation.batch_size, method.masks_per_image
    warmup, cooldown = optimisation.warmup_epochs, optimisation.cooldown_epochs
    if warmup is not None and warmup >= epochs:
        yield f"warmup_epochs: must be less than epochs ({epochs}), got {warmup:g}"
    if cooldown is not None and (schedule := optimisation.learning_rate_schedule) != "constant":
        yield f"cooldown_epochs: goes with learning_rate_schedule 'constant', got {cooldown:g} with {schedule!r}"
    if batch % masks:
        yield f"masks_per_image: must divide batch_size {batch}, got {masks}"
    if batch % (masks * data.crops_per_image):
        yield (f"crops_per_image: times masks_per_image ({masks}) must divide batch_size {batch}, "
               f"got {data.crops_per_image}")  # fmt: skip


def _hardness(config: Config) -> Iterator[str]:
    """What is broken of the rules between the masks and the predicted loss that guides them."""
    method, kind = config.method, TARGETS[config.method.target]
    guide, predicts, learns = method.guided_by, method.predicted_loss != "none", method.learns_hardness
    if not predicts and guide == "predicted_loss":
        yield f"mask: {method.mask!r} chooses by predicted loss, so predicted_loss must not be 'none'"
    if method.mining_threshold and not learns:
        yield "mining_threshold: watches the predicted loss, so predicted_loss must not be 'none'"
    if method.mining_threshold and guide is None:
        yield f"mining_threshold: holds guided masks back, and mask {method.mask!r} is never guided"
    if method.predictor_detached and (not predicts or method.predictor_view == "full"):
        yield "predictor_detached: with predicted_loss 'none' or predictor_view 'full' there is no gradient to cut"
    if method.hardness_block > 1 and not kind.of_pixels:
        yield (f"hardness_block: must be 1 with target {method.target!r}, which is not made of pixels; "
               f"got {method.hardness_block}")  # fmt: skip
    if method.hardness_block > 1 and not learns:
        yield ("hardness_block: with predicted_loss 'none' nothing learns what is hard, so it must be 1; "
               f"got {method.hardness_block}")  # fmt: skip
    if method.hardness_in_pixels and not (kind.normalised and learns):
        yield ("hardness_in_pixels: goes with target 'norm_pix' and a loss predictor or scout, got target "
               f"{method.target!r} and predicted_loss {method.predicted_loss!r}")  # fmt: skip


def _targets(config: Config) -> Iterator[str]:
    """What is broken of the rules between a target and what belongs to it."""
    method, kind, reduction = config.method, TARGETS[config.method.target], config.model.teacher_reduction
    for name, row in TARGETS.items():
        for option in row.options:
            if getattr(method, option) and name != method.target:
                yield f"{option}: goes with target {name!r}, got target {method.target!r}"
    for option in kind.required:
        if not getattr(method, option):
            yield f"{option}: must be given with target {method.target!r}, got {getattr(method, option)!r}"
    if reduction > 1 and (kind.needs_teacher or method.guided_by == "attention"):
        yield (f"teacher_reduction: must be 1 with target {method.target!r} and mask {method.mask!r}, which need what "
               f"the teacher says of every patch; got {reduction}")  # fmt: skip


def _sizes(config: Config) -> Iterator[str]:
    """What is broken of the rules between numbers that come in pairs or one for each channel, and of widths."""
    data, model, shown = config.data, config.model, config.run.display_channels
    if len(shown) not in (0, 1, 3) or any(channel >= data.channels for channel in shown):
        yield f"display_channels: must be one or three of channels 0 to {data.channels - 1}, got {shown}"
    if data.value_range and (len(data.value_range) != 2 or not data.value_range[0] < data.value_range[1]):
        yield f"value_range: must be a lower and a higher number, got {data.value_range}"
    if len(data.image_size) not in (1, 2):
        yield f"image_size: must be one number or height and width, got {data.image_size}"
    if not 0 < data.crop_scale[0] <= data.crop_scale[1]:
        yield f"crop_scale: must go from a small area above 0 to a large one, got {data.crop_scale}"
    for name in ("mean", "std"):
        if (values := getattr(data, name)) and len(values) != data.channels:
            yield f"{name}: needs one value per channel ({data.channels}), got {len(values)}"
    if bool(data.mean) != bool(data.std):
        yield "mean, std: give both or neither"
    if model.decoder_width % model.decoder_heads:
        yield f"decoder_heads: must divide decoder_width {model.decoder_width}, got {model.decoder_heads}"
    if model.decoder_width % 4:
        yield f"decoder_width: must be divisible by 4, got {model.decoder_width}"


def split_batch(config: Config, *, processes: int) -> int:
    """Micro-batches of each process in a step.

    Raises:
        InputError: The batch does not divide, or a micro-batch is larger than the share of a process.
    """
    batch = config.optimisation.batch_size
    if batch % processes:
        raise InputError(f"batch_size: must be divisible by the number of processes ({processes}), got {batch}")
    share = batch // processes
    micro = config.run.micro_batch_size or share
    if micro > share:
        raise InputError(f"micro_batch_size: must be at most the {share} images per process and step, got {micro}")
    if share % micro:
        raise InputError(f"micro_batch_size: must divide the {share} images per process and step, got {micro}")
    masks, crops = config.method.masks_per_image, config.data.crops_per_image
    if micro % masks:
        raise InputError(
            f"masks_per_image: must divide the {micro} views of a forward pass (batch_size, processes, "
            f"micro_batch_size), got {masks}"
        )
    if micro % (masks * crops):
        raise InputError(
            f"crops_per_image: times masks_per_image ({masks}) must divide the {micro} views of a forward pass "
            f"(batch_size, processes, micro_batch_size), got {crops}"
        )
    return share // micro
