"""What a training step costs, counted rather than timed: the same on every machine."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from timm.layers import Attention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hardpatch.config.config import Config
from hardpatch.method.decoder import CrossAttention
from hardpatch.method.hpm import HPM
from hardpatch.method.targets.tokens import TokenTarget
from hardpatch.runs.build import build_hpm

NUM_IMAGES = 2
"""Images in the step that is counted."""


class StepCost(NamedTuple):
    """FLOPs of a training step per student view; a multiply-add counts as two.

    What serves several views of an image (``masks_per_image``) is shared among them.
    Normalisation, optimizer and EMA, which do not depend on the batch, do not count.
    """

    teacher: float
    """The teacher's pass over the full image: features and predicted losses."""
    student: float
    """Target, student forward and backward, and a loss predictor that learns on the full image."""

    @property
    def total(self) -> float:
        """FLOPs of the whole step."""
        return self.teacher + self.student


def training_flops(config: Config) -> float:
    """Floating-point operations of one training step per student view, see :class:`StepCost`."""
    return step_cost(config).total


def step_cost(config: Config) -> StepCost:
    """Count a step on tensors without content, which takes a second or two for any model.

    A tokenizer of the user's own is not counted.
    """
    model = build_hpm(config, counted_only=True)
    if config.method.tokenizer:
        no_tokenizer = _NoTokenizer(model.method.target.dim, model.geometry.num_patches)
        model = HPM(model.student, replace(model.method, target=TokenTarget(no_tokenizer)), model.teacher)
    method = model.method
    for part in (*model.networks, method.target):
        if isinstance(part, nn.Module):
            _write_out_attention(part)
    views = NUM_IMAGES * config.method.masks_per_image
    with torch.device("meta"):
        images = torch.zeros(NUM_IMAGES, config.data.channels, *model.geometry.image_size)
        noise = torch.rand(views, model.geometry.num_patches)
        with FlopCounterMode(display=False) as of_teacher:
            batch = method.mask(
                model.student, model.teacher if method.needs_teacher else None, images, noise, num_hard=0
            )
        with FlopCounterMode(display=False) as of_student:
            method.learn(model.student, batch).total.backward()
    return StepCost(of_teacher.get_total_flops() / views, of_student.get_total_flops() / views)


class _NoTokenizer:
    """Stands for a tokenizer that cannot run without content: the same token everywhere.

    Args:
        vocabulary: Number of tokens.
        num_patches: N.
    """

    def __init__(self, vocabulary: int, num_patches: int) -> None:
        self.vocabulary = vocabulary
        self.num_patches = num_patches

    def __call__(self, images: Float[Tensor, "b c h w"]) -> Int[Tensor, "b n"]:
        return torch.zeros(len(images), self.num_patches, dtype=torch.int64, device=images.device)


def _write_out_attention(model: nn.Module) -> None:
    """Fused kernels are not counted alike on every device."""
    for module in model.modules():
        if isinstance(module, Attention | CrossAttention):
            module.fused_attn = False
