"""What is exported: the encoder of a run, what builds it, and what is known about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hardpatch.config.commands import Output
from hardpatch.config.config import Config
from hardpatch.runs.build import input_config, timm_arguments
from hardpatch.runs.checkpoint import about_weights
from hardpatch.runs.folder import RunFolder
from hardpatch.runs.load import LoadedRun, load_encoder

Computed = Callable[[Tensor], Tensor]
"""Normalised images (B, C, H, W) to what an export puts out."""


class Backbone(NamedTuple):
    """An encoder with everything that an export says about it."""

    vit: VisionTransformer
    """On the CPU, in evaluation mode."""
    arguments: dict[str, Any]
    """``timm.create_model(**arguments)`` builds the like."""
    input: dict[str, Any]
    """Size, mean and standard deviation of its images, in the terms of timm's ``pretrained_cfg``."""
    config: Config | None
    """The run's config; None where a file of weights is all there is."""
    step: int
    """Optimizer steps behind it; 0 where nobody knows."""
    run: RunFolder | None
    """The folder in which it was trained, if there is one."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.input["input_size"]
        return channels, height, width


def read_backbone(checkpoint: str | Path) -> Backbone:
    """The encoder of a run folder, a checkpoint, or a ``weights.safetensors``.

    Raises:
        InputError: Nothing there, or damaged.
    """
    path = Path(checkpoint).expanduser()
    if path.suffix == ".safetensors" and path.is_file():
        vit = load_encoder(path)
        with safe_open(path, framework="pt") as file:
            about = about_weights(file.metadata())
        return Backbone(vit, about["timm"], about["input"], None, 0, _folder_of(path))
    loaded = LoadedRun(path)
    vit, config = loaded.student.encoder, loaded.config
    vit.pretrained_cfg.update(input_config(config))
    return Backbone(vit, timm_arguments(config), input_config(config), config, loaded.step, _folder_of(path))


def _folder_of(path: Path) -> RunFolder | None:
    """The run folder that ``path`` is, or that a file of its checkpoints lies in."""
    found = RunFolder(path if path.is_dir() else path.absolute().parent.parent)
    return found if found.config_file.is_file() else None


class Pooled(nn.Module):
    """Normalised images to tokens, or to one vector each: the graph of an export.

    Args:
        vit: The encoder; it has a class token if that is asked for.
        output: What to put out.
    """

    def __init__(self, vit: VisionTransformer, output: Output) -> None:
        super().__init__()
        self.vit = vit
        self.output = output

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b ..."]:
        """(B, T, D) tokens, or (B, D)."""
        tokens: Tensor = self.vit.forward_features(images)
        if self.output == "tokens":
            return tokens
        return tokens[:, 0] if self.output == "class" else tokens[:, self.vit.num_prefix_tokens :].mean(dim=1)


def random_images(backbone: Backbone, count: int, *, seed: int = 0) -> Float[Tensor, "b c h w"]:
    """Seeded noise in the shape of normalised images."""
    return torch.randn(count, *backbone.image_shape, generator=torch.Generator().manual_seed(seed))
