"""From a config to the objects of a run: target, student, method, normalisation, optimizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import nn

from hardpatch.config.config import Config, DataConfig, OptimisationConfig
from hardpatch.data.images.decode import Decoder
from hardpatch.data.loader.loading import IMAGENET_MEAN, IMAGENET_STD, Normalise, measure_statistics, read_or_next
from hardpatch.data.sources import Downloads, Source, open_source
from hardpatch.data.images.value_range import find_value_range, has_shallow_images
from hardpatch.runtime.distributed import is_main_of_environment
from hardpatch.runtime.errors import InputError
from hardpatch.method.targets.timm_features import TimmFeatureTarget, load_frozen
from hardpatch.runtime.log import say, warn
from hardpatch.method.masks import MASKS, num_hidden_patches
from hardpatch.method.method import Method, PREDICTED_LOSSES, Student
from hardpatch.method.schedules import NUM_STAGES, stage_side
from hardpatch.runtime.seeding import Stream, derive_seed
from hardpatch.method.targets.hog import HogTarget
from hardpatch.method.targets.pixels import PixelHardness, PixelTarget
from hardpatch.method.targets.target import Target
from hardpatch.method.targets.teacher import EmaFeatureTarget
from hardpatch.method.targets.tokens import KMeansTokenizer, TokenTarget
from hardpatch.runs.codebook import load_tokenizer
from hardpatch.method.vit import (
    CrossAttention,
    CrossBlock,
    create_encoder,
    grid_size,
    has_class_attention,
    patch_size,
)

COMPILED_SHAPES = 64
"""How often the code of a block may be compiled: a progressive run has 16 shapes, hardpatch benchmark step more."""
LOOK_AT = 256
"""Images of which the range of values is found, spread over the source."""


def timm_arguments(config: Config) -> dict[str, Any]:
    """Arguments with which ``timm.create_model`` builds the run's encoder (to load ``weights.safetensors`` into)."""
    model, data = config.model, config.data
    sizes = {
        "patch_size": model.patch_size,
        "embed_dim": model.encoder_width,
        "depth": model.encoder_depth,
        "num_heads": model.encoder_heads,
    }
    return {
        "model_name": model.encoder,
        "img_size": list(data.size),
        "in_chans": data.channels,
        "num_classes": 0,
        "fc_norm": False,
        **{key: value for key, value in sizes.items() if value is not None},
    }


def input_config(config: Config) -> dict[str, Any]:
    """How the encoder wants its images, in the terms of timm's ``pretrained_cfg``."""
    mean, std = statistics(config)
    return {
        "input_size": [config.data.channels, *config.data.size],
        "mean": list(mean),
        "std": list(std),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }


def build_encoder(config: Config) -> VisionTransformer:
    """The encoder, drawn from PyTorch's own random state.

    Raises:
        InputError: A size does not fit.
    """
    model = config.model
    return create_encoder(
        model.encoder,
        image_size=config.data.size,
        channels=config.data.channels,
        patch_size=model.patch_size,
        width=model.encoder_width,
        depth=model.encoder_depth,
        heads=model.encoder_heads,
    )


def build_target(config: Config) -> Target:
    """The reconstruction target, on the CPU.

    A frozen timm model is loaded with its weights; the embedded codebook is empty until it is fitted or loaded.

    Raises:
        InputError: A size does not fit, or a model or tokenizer cannot be loaded.
    """
    method, channels = config.method, config.data.channels
    with torch.device("meta"):  # all that a target wants to know of the encoder is sizes
        encoder = build_encoder(config)
    patch, grid = patch_size(encoder), grid_size(encoder)
    match method.target:
        case "pixels" | "norm_pix":
            return PixelTarget(patch, channels=channels, normalise=method.target == "norm_pix")
        case "hog":
            return HogTarget(patch, channels=channels)
        case "ema_features":
            return EmaFeatureTarget(encoder)
        case "timm_features":
            frozen = load_frozen(method.target_model, grid=grid, image_size=config.data.size, channels=channels)
            mean, std = statistics(config)
            return TimmFeatureTarget(frozen, grid=grid, mean=mean, std=std)
        case "tokens" if method.tokenizer:
            tokenizer = load_tokenizer(
                method.tokenizer, num_patches=grid[0] * grid[1], image_size=config.data.size, channels=channels,
                seed=config.optimisation.seed,
            )  # fmt: skip
            return TokenTarget(tokenizer)
        case "tokens":
            return TokenTarget(KMeansTokenizer(method.num_tokens, patch_size=patch, channels=channels))


def embedded_codebook(target: Target) -> KMeansTokenizer | None:
    """The part of a target that is fitted to the images, and so has to be saved with the run."""
    if isinstance(target, TokenTarget) and isinstance(target.tokenizer, KMeansTokenizer):
        return target.tokenizer
    return None


def build_student(config: Config, *, target_dim: int | None = None) -> Student:
    """The student with its seeded initialisation.

    Args:
        config: Of the run.
        target_dim: P, the width of the target; None builds the target to ask it.

    Raises:
        InputError: A size does not fit.
    """
    model = config.model
    if target_dim is None:
        target_dim = build_target(config).dim
    reduction = _reduction(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.optimisation.seed, Stream.INITIALISATION))
        return Student(
            build_encoder(config),
            target_dim=target_dim,
            decoder=model.decoder,
            decoder_dim=model.decoder_width,
            decoder_depth=model.decoder_depth,
            decoder_heads=model.decoder_heads,
            predictor_depth=0 if config.method.predicted_loss == "none" else model.predictor_depth,
            predictor_view=config.method.predictor_view,
            predictor_detached=config.method.predictor_detached,
            reduction=reduction,
            residual=torch.bfloat16 if config.run.residual_precision == "bf16" else None,
        )


def _reduction(config: Config) -> int:
    """How many times smaller the teacher sees images.

    Raises:
        InputError: The grid of patches cannot be divided like this.
    """
    with torch.device("meta"):
        rows, columns = grid_size(build_encoder(config))
    reduction = config.model.teacher_reduction
    if rows % reduction or columns % reduction:
        raise InputError(f"teacher_reduction: must divide the grid of {rows}x{columns} patches, got {reduction}")
    return reduction


class Stage(NamedTuple):
    """A part of a run, with images of one size."""

    grid: tuple[int, int]
    """Rows and columns of patches."""
    method: Method


def build_stages(config: Config, student: Student, target: Target) -> tuple[Stage, ...]:
    """The stages of a run with progressive resolution, the last at full size; of any other run that one alone.

    Raises:
        InputError: As :func:`build_method`.
    """
    full, unit = grid_size(student.encoder), student.reduction
    start = config.method.progressive_start
    sides = [stage_side(number, start=start) for number in range(NUM_STAGES)] if start < 1 else [1.0]
    grids = [tuple(max(1, round(side * length / unit)) * unit for length in full) for side in sides]
    return tuple(Stage((r, c), build_method(config, student, target, grid=(r, c))) for r, c in grids)


def build_method(
    config: Config, student: Student, target: Target | None = None, *, grid: tuple[int, int] | None = None
) -> Method:
    """The choices of the run.

    Args:
        config: Of the run.
        student: Of the run.
        target: What is reconstructed; None builds it.
        grid: Rows and columns of patches; None: those of full-sized images.

    Raises:
        InputError: The mask ratio leaves nothing hidden or nothing visible on this grid, or the mask asks for
            attention that the encoder cannot tell.
    """
    rows, columns = grid or grid_size(student.encoder)
    num_hidden = num_hidden_patches(rows * columns, config.method.mask_ratio)
    if not 0 < num_hidden < rows * columns:
        raise InputError(
            f"mask_ratio: must hide at least one and leave at least one of the {rows}x{columns} patches, "
            f"got {config.method.mask_ratio}"
        )
    if config.method.predicted_loss == "absolute" and num_hidden < 2:
        raise InputError("predicted_loss: 'absolute' standardises within an image and needs at least 2 hidden patches")
    num_decoded = max(1, round(num_hidden * config.method.decoded_share))
    if num_decoded < 2 and config.method.predicted_loss != "none":
        raise InputError(
            f"decoded_share: must leave at least 2 of the {num_hidden} hidden patches for the loss predictor to "
            f"compare, got {config.method.decoded_share}"
        )
    mask = MASKS[config.method.mask]
    if mask.guide == "attention" and not has_class_attention(student.encoder):
        raise InputError(
            f"mask: {config.method.mask!r} needs an encoder with a class token and plain attention blocks, "
            f"got {config.model.encoder!r}"
        )
    patch, block, in_pixels = (
        patch_size(student.encoder),
        config.method.hardness_block,
        config.method.hardness_in_pixels,
    )
    if any(side % block for side in patch):
        raise InputError(f"hardness_block: must divide a patch of {patch[0]}x{patch[1]} pixels, got {block}")
    if patch == (block, block) and config.method.target == "norm_pix":
        raise InputError(
            f"hardness_block: must be smaller than a patch ({block}x{block} pixels) with target 'norm_pix', which "
            f"takes the mean of every patch away; got {block}"
        )
    return Method(
        target=build_target(config) if target is None else target,
        mask_policy=mask.policy((rows, columns)),
        guide=mask.guide,
        num_hidden=num_hidden,
        predicted_loss=PREDICTED_LOSSES[config.method.predicted_loss],
        prediction_weight=config.method.prediction_weight,
        predictor_view=config.method.predictor_view,
        num_decoded=num_decoded,
        hardness=PixelHardness(patch, block=block, in_pixels=in_pixels) if block > 1 or in_pixels else None,
    )


def statistics(config: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the run's images per channel, ImageNet's where none are given."""
    return config.data.mean or IMAGENET_MEAN, config.data.std or IMAGENET_STD


def build_normalise(config: Config) -> Normalise:
    """Normalisation by the run's statistics."""
    return Normalise(*statistics(config))


def build_decoder(data: DataConfig) -> Decoder:
    """How the images of a run are read."""
    low_and_high = (data.value_range[0], data.value_range[1]) if data.value_range else None
    return Decoder(data.channels, low_and_high, data.no_data)


def open_images(config: Config) -> tuple[Config, Source]:
    """Open the images to learn from, and fill in what is found in them: range of values, mean and deviation.

    Raises:
        InputError: Nothing there, or nothing that can be read.
    """

    def opened() -> Source:
        return open_source(
            config.data.data, decoder=build_decoder(config.data), image_size=config.data.size,
            downloads=build_downloads(config),
        )  # fmt: skip

    source, data = opened(), config.data
    read_or_next(source, 0)  # a source of which nothing can be read is refused before it is looked through
    if not data.value_range and (found := find_value_range(source, max_images=LOOK_AT, no_data=data.no_data)):
        config = replace(config, data=replace(data, value_range=found))
        if is_main_of_environment():
            say(f"values that are not 8-bit: {found[0]:g} to {found[1]:g}, found in the images (--value-range)")
            if has_shallow_images(source, max_images=LOOK_AT):
                warn(
                    "some images are 8-bit and some are deeper: the deeper ones share one range of values, which may "
                    "leave them black or white. Better make a run of each (hardpatch data check lists depths)"
                )
        source, data = opened(), config.data
    if not data.mean and (data.channels != 3 or data.value_range):
        mean, std = measure_statistics(source)
        config = replace(config, data=replace(data, mean=mean, std=std))
    return config, source


def build_downloads(config: Config) -> Downloads:
    """Where a run keeps shards from far away."""
    folder = Path(config.run.download_dir).expanduser() if config.run.download_dir else None
    return Downloads(folder, gigabytes=config.data.download_gigabytes)


def build_optimizer(config: OptimisationConfig, student: Student) -> torch.optim.AdamW:
    """Fused AdamW, without weight decay on biases and one-dimensional tensors."""
    groups = param_groups_weight_decay(student, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.base_learning_rate, betas=config.betas, fused=True)


def choose_attention(model: nn.Module, device: torch.device, *, bf16: bool) -> None:
    """Fused attention except for bf16 on CPUs, where PyTorch's fused backward pass is several times slower.

    Measured in ``docs/log.md``; the numbers agree to rounding.

    Args:
        model: Changed in place.
        device: Where it runs.
        bf16: Under autocast.
    """
    for module in model.modules():
        if isinstance(module, Attention | CrossAttention):
            module.fused_attn = device.type != "cpu" or not bf16


def compile_blocks(*models: nn.Module, backend: str = "inductor") -> None:
    """``torch.compile`` every transformer block, in place; names of parameters stay as they are.

    Blocks rather than whole models: one compilation serves all blocks of a kind, gradients still flow out block by
    block (which DDP overlaps with its exchange), and nothing that a schedule changes lies inside a block, so nothing is
    compiled a second time during a run.
    """
    # All blocks are of one class, whose code compiles once for every shape and model: more often than dynamo allows by
    # default (8), after which it would run the rest uncompiled. timm happens to lift the limit, in some versions.
    torch._dynamo.config.recompile_limit = max(COMPILED_SHAPES, torch._dynamo.config.recompile_limit)
    for model in models:
        for module in model.modules():
            if isinstance(module, Block | CrossBlock):
                module.compile(dynamic=False, backend=backend)


def blocks(student: Student) -> list[nn.Module]:
    """All transformer blocks of a student: encoder, reconstructor, loss predictor."""
    parts = (student.encoder, student.reconstructor, student.predictor)
    return [block for part in parts if part is not None for block in part.blocks]


def recompute_blocks(student: Student) -> None:
    """Keep only the input of every block for the backward pass, which computes the rest again: memory for time."""
    student.encoder.set_grad_checkpointing(True)
    for decoder in (student.reconstructor, student.predictor):
        if decoder is not None:
            decoder.grad_checkpointing = True
