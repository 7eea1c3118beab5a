"""From a config to the objects of a run: target, student, method, normalisation, optimizer."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import nn

from hardpatch.config.config import Config, DataConfig, OptimisationConfig
from hardpatch.data.images.decode import Decoder
from hardpatch.data.images.value_range import find_depths
from hardpatch.data.loader.loading import Normalise, measure_statistics, read_or_next
from hardpatch.data.sources import Downloads, Source, open_source
from hardpatch.method.decoder import CrossAttention, CrossBlock
from hardpatch.method.hpm import HPM, make_method, make_target
from hardpatch.method.method import Method
from hardpatch.method.student import Student
from hardpatch.method.targets.target import FittedTarget, Target, TargetContext
from hardpatch.method.vit import Geometry, create_encoder, grid_size
from hardpatch.runtime.distributed import is_main_of_environment
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import say, warn
from hardpatch.runtime.seeding import Stream, derive_seed

COMPILED_SHAPES = 64
"""How often the code of a block may be compiled: hardpatch benchmark step has several models of each kind."""
SCOUT_LEARNING_RATE = 2e-3
"""Measured in ``docs/log.md``; constant, so that what is hard is followed to the end of the run."""
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

    A frozen timm model is loaded with its weights; a target that is fitted to the images is not fitted yet.

    Raises:
        InputError: A size does not fit, or a model or tokenizer cannot be loaded.
    """
    method, (mean, std) = config.method, statistics(config)
    with torch.device("meta"):  # all that a target wants to know of the encoder is sizes
        encoder = build_encoder(config)
    context = TargetContext(
        Geometry.of(encoder), encoder, mean, std, target_model=method.target_model, tokenizer=method.tokenizer,
        num_tokens=method.num_tokens, seed=config.optimisation.seed,
    )  # fmt: skip
    return make_target(method.target, context)


def build_student(config: Config, *, target_dim: int | None = None) -> Student:
    """The student with its seeded initialisation.

    Args:
        config: The run's config.
        target_dim: P, the width of the target; None builds the target to find it.

    Raises:
        InputError: A size does not fit.
    """
    model = config.model
    if target_dim is None:
        target_dim = build_target(config).dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.optimisation.seed, Stream.INITIALISATION))
        encoder = build_encoder(config)
        rows, columns = grid_size(encoder)
        if rows % model.teacher_reduction or columns % model.teacher_reduction:
            raise InputError(
                f"teacher_reduction: must divide the grid of {rows}x{columns} patches, got {model.teacher_reduction}"
            )
        return Student(
            encoder,
            target_dim=target_dim,
            decoder=model.decoder,
            decoder_dim=model.decoder_width,
            decoder_depth=model.decoder_depth,
            decoder_heads=model.decoder_heads,
            predictor_depth=0 if config.method.predicted_loss == "none" else model.predictor_depth,
            predictor_detached=config.method.predictor_detached,
            reduction=model.teacher_reduction,
            scout=config.method.guided_by == "scout",
        )


def build_method(config: Config, student: Student, target: Target | None = None) -> Method:
    """The choices of the run.

    Args:
        config: The run's config.
        student: The run's student.
        target: What is reconstructed; None builds it.

    Raises:
        InputError: The mask ratio leaves nothing hidden or nothing visible on this grid, or the mask is guided by
            attention that the encoder does not have.
    """
    method = config.method
    return make_method(
        student.encoder,
        build_target(config) if target is None else target,
        mask=method.mask,
        guide=method.guide,
        mask_ratio=method.mask_ratio,
        decoded_share=method.decoded_share,
        predicted_loss=method.predicted_loss,
        prediction_weight=method.prediction_weight,
        predictor_view=method.predictor_view,
        hardness_block=method.hardness_block,
        hardness_in_pixels=method.hardness_in_pixels,
    )


def build_hpm(config: Config, *, counted_only: bool = False) -> HPM:
    """Student, teacher and method of a run before its first step.

    Args:
        config: The run's config.
        counted_only: On the meta device, to count operations or bytes; a target that would be fitted gets any state,
            and a tokenizer of the user's own one that always names the same token.

    Raises:
        InputError: A size does not fit, or a model or tokenizer cannot be loaded.
    """
    target = build_target(config)
    if counted_only and isinstance(target, FittedTarget):
        target.adopt({name: torch.zeros_like(tensor) for name, tensor in target.fitted_state().items()})
    if counted_only and isinstance(target, nn.Module):
        target.to("meta")
    with torch.device("meta") if counted_only else nullcontext():
        student = build_student(config, target_dim=target.dim)
        return HPM(student, build_method(config, student, target))


def statistics(config: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the run's images per channel, ImageNet's where none are given."""
    return config.data.mean or IMAGENET_DEFAULT_MEAN, config.data.std or IMAGENET_DEFAULT_STD


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
    depths = None if data.value_range else find_depths(source, max_images=LOOK_AT, no_data=data.no_data)
    if depths is not None and (found := depths.value_range):
        config = replace(config, data=replace(data, value_range=found.ends()))
        if is_main_of_environment():
            say(
                f"values that are not 8-bit: {found.lowest:g} to {found.highest:g}, found in the images (--value-range)"
            )
            if advice := found.advice():
                warn(advice)
            if depths.num_shallow:
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
    """The folder in which a run keeps shards from far away, and its limit."""
    folder = Path(config.run.download_dir).expanduser() if config.run.download_dir else None
    return Downloads(folder, gigabytes=config.data.download_gigabytes)


def build_optimizer(config: OptimisationConfig, student: Student) -> torch.optim.AdamW:
    """Fused AdamW, without weight decay on biases and one-dimensional tensors; a scout has a constant rate of its own
    (``constant`` in its group)."""
    scout = [] if student.scout is None else list(student.scout.parameters())
    names = [name for name, _ in student.named_parameters() if name.startswith("scout.")]
    groups = param_groups_weight_decay(student, config.weight_decay, no_weight_decay_list=names)
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if not any(parameter is own for own in scout)]
    if scout:
        groups.append({"params": scout, "lr": SCOUT_LEARNING_RATE, "weight_decay": 0.0, "constant": True})
    return torch.optim.AdamW(groups, lr=config.base_learning_rate, betas=config.betas, fused=True)


def clipped_parameters(student: Student) -> list[nn.Parameter]:
    """The parameters whose gradients are clipped together: all that learn but a scout's."""
    named = student.named_parameters()
    return [parameter for name, parameter in named if parameter.requires_grad and not name.startswith("scout.")]


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
