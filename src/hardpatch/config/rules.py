"""Rules between the fields of a config; what one field alone may be stands at the field."""

from __future__ import annotations

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
    data, model, method, optimisation = config.data, config.model, config.method, config.optimisation
    guide = method.guided_by
    if optimisation.warmup_epochs is not None and optimisation.warmup_epochs >= optimisation.epochs:
        raise InputError(
            f"warmup_epochs: must be less than epochs ({optimisation.epochs}), got {optimisation.warmup_epochs:g}"
        )
    if optimisation.cooldown_epochs is not None and optimisation.learning_rate_schedule != "constant":
        raise InputError(
            f"cooldown_epochs: goes with learning_rate_schedule 'constant', got {optimisation.cooldown_epochs:g} with "
            f"{optimisation.learning_rate_schedule!r}"
        )
    shown = config.run.display_channels
    if len(shown) not in (0, 1, 3) or any(channel >= data.channels for channel in shown):
        raise InputError(f"display_channels: must be one or three of channels 0 to {data.channels - 1}, got {shown}")
    if data.value_range and (len(data.value_range) != 2 or not data.value_range[0] < data.value_range[1]):
        raise InputError(f"value_range: must be a lower and a higher number, got {data.value_range}")
    if method.predicted_loss == "none" and guide == "predicted_loss":
        raise InputError(f"mask: {method.mask!r} chooses by predicted loss, so predicted_loss must not be 'none'")
    if method.mining_threshold and not method.learns_hardness:
        raise InputError("mining_threshold: watches the predicted loss, so predicted_loss must not be 'none'")
    if method.mining_threshold and guide is None:
        raise InputError(f"mining_threshold: holds guided masks back, and mask {method.mask!r} is never guided")
    if method.predictor_detached and (method.predicted_loss == "none" or method.predictor_view == "full"):
        raise InputError(
            "predictor_detached: with predicted_loss 'none' or predictor_view 'full' there is no gradient to cut"
        )
    kind = TARGETS[method.target]
    for name, row in TARGETS.items():
        for option in row.options:
            if getattr(method, option) and name != method.target:
                raise InputError(f"{option}: goes with target {name!r}, got target {method.target!r}")
    for option in kind.required:
        if not getattr(method, option):
            raise InputError(f"{option}: must be given with target {method.target!r}, got {getattr(method, option)!r}")
    if method.hardness_block > 1 and not kind.of_pixels:
        raise InputError(
            f"hardness_block: must be 1 with target {method.target!r}, which is not made of pixels; "
            f"got {method.hardness_block}"
        )
    if method.hardness_block > 1 and not method.learns_hardness:
        raise InputError("hardness_block: with predicted_loss 'none' nothing learns what is hard, so it must be 1; "
                         f"got {method.hardness_block}")  # fmt: skip
    if method.hardness_in_pixels and (not kind.normalised or not method.learns_hardness):
        raise InputError(
            "hardness_in_pixels: goes with target 'norm_pix' and a loss predictor or scout, got target "
            f"{method.target!r} and predicted_loss {method.predicted_loss!r}"
        )
    if len(data.image_size) not in (1, 2):
        raise InputError(f"image_size: must be one number or height and width, got {data.image_size}")
    if not 0 < data.crop_scale[0] <= data.crop_scale[1]:
        raise InputError(f"crop_scale: must go from a small area above 0 to a large one, got {data.crop_scale}")
    for name in ("mean", "std"):
        values = getattr(data, name)
        if values and len(values) != data.channels:
            raise InputError(f"{name}: needs one value per channel ({data.channels}), got {len(values)}")
    if bool(data.mean) != bool(data.std):
        raise InputError("mean, std: give both or neither")
    if model.decoder_width % model.decoder_heads:
        raise InputError(f"decoder_heads: must divide decoder_width {model.decoder_width}, got {model.decoder_heads}")
    if optimisation.batch_size % method.masks_per_image:
        raise InputError(f"masks_per_image: must divide batch_size {optimisation.batch_size}, "
                         f"got {method.masks_per_image}")  # fmt: skip
    if optimisation.batch_size % (method.masks_per_image * data.crops_per_image):
        raise InputError(
            f"crops_per_image: times masks_per_image ({method.masks_per_image}) must divide batch_size "
            f"{optimisation.batch_size}, got {data.crops_per_image}"
        )
    if model.teacher_reduction > 1 and (kind.needs_teacher or guide == "attention"):
        raise InputError(
            f"teacher_reduction: must be 1 with target {method.target!r} and mask {method.mask!r}, which need what the "
            f"teacher says of every patch; got {model.teacher_reduction}"
        )
    if model.decoder_width % 4:
        raise InputError(f"decoder_width: must be divisible by 4, got {model.decoder_width}")


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
