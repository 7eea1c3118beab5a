"""From a config to the objects of a run: student, method, normalisation, optimizer."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import nn

from hpm.config import Config, OptimisationConfig
from hpm.data.loading import IMAGENET_MEAN, IMAGENET_STD, Normalise
from hpm.errors import InputError
from hpm.masking import MASKS, num_hidden_patches
from hpm.method import PREDICTED_LOSSES, Method, Student
from hpm.seeding import Stream, derive_seed
from hpm.targets import PixelTarget
from hpm.vit import create_encoder, grid_size, patch_size


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
    data = config.data
    return {
        "input_size": [data.channels, *data.size],
        "mean": list(data.mean or IMAGENET_MEAN),
        "std": list(data.std or IMAGENET_STD),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }


def build_target(config: Config, patch: tuple[int, int]) -> PixelTarget:
    """The reconstruction target."""
    return PixelTarget(patch, channels=config.data.channels, normalise=config.method.target == "norm_pix")


def encoder_of(config: Config) -> VisionTransformer:
    """The encoder of a config, with an initialisation from torch's global random state.

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


def build_student(config: Config) -> Student:
    """The student with its seeded initialisation.

    Raises:
        InputError: A size does not fit.
    """
    model = config.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.optimisation.seed, Stream.INITIALISATION))
        encoder = encoder_of(config)
        return Student(
            encoder,
            target_dim=build_target(config, patch_size(encoder)).dim,
            decoder_dim=model.decoder_width,
            decoder_depth=model.decoder_depth,
            decoder_heads=model.decoder_heads,
            predictor_depth=0 if config.method.predicted_loss == "none" else model.predictor_depth,
            predictor_view=config.method.predictor_view,
            predictor_detached=config.method.predictor_detached,
        )


def build_method(config: Config, student: Student) -> Method:
    """The choices of the run.

    Raises:
        InputError: The mask ratio leaves nothing hidden or nothing visible on this grid.
    """
    rows, columns = grid_size(student.encoder)
    num_hidden = num_hidden_patches(rows * columns, config.method.mask_ratio)
    if not 0 < num_hidden < rows * columns:
        raise InputError(
            f"mask_ratio: must hide at least one and leave at least one of the {rows}x{columns} patches, "
            f"got {config.method.mask_ratio}"
        )
    if config.method.predicted_loss == "absolute" and num_hidden < 2:
        raise InputError("predicted_loss: 'absolute' standardises within an image and needs at least 2 hidden patches")
    return Method(
        target=build_target(config, patch_size(student.encoder)),
        mask_policy=MASKS[config.method.mask].policy((rows, columns)),
        guide=MASKS[config.method.mask].guide,
        num_hidden=num_hidden,
        predicted_loss=PREDICTED_LOSSES[config.method.predicted_loss],
        prediction_weight=config.method.prediction_weight,
    )


def build_normalise(config: Config) -> Normalise:
    """Normalisation by the run's statistics, ImageNet's where none are given."""
    return Normalise(config.data.mean or IMAGENET_MEAN, config.data.std or IMAGENET_STD)


def build_optimizer(config: OptimisationConfig, student: Student) -> torch.optim.AdamW:
    """Fused AdamW, without weight decay on biases and one-dimensional tensors."""
    groups = param_groups_weight_decay(student, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.base_learning_rate, betas=config.betas, fused=True)


def choose_attention(model: nn.Module, device: torch.device) -> None:
    """Fused attention except on CPUs, where PyTorch's fused backward pass is several times slower on short sequences.

    Measured in ``docs/log.md``; the numbers agree to rounding.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = device.type != "cpu"
