"""What a training step costs, counted rather than timed: the same on every machine."""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from timm.layers import Attention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hardpatch.config.config import Config
from hardpatch.method.method import Teacher
from hardpatch.method.targets.tokens import TokenTarget
from hardpatch.method.vit import CrossAttention, patch_size
from hardpatch.runs.build import build_stages, build_student, build_target, embedded_codebook

NUM_IMAGES = 2
"""Images in the step that is counted."""


class StepCost(NamedTuple):
    """FLOPs of a training step per student view, mean over the run; a multiply-add counts as two.

    What serves several views of an image (``masks_per_image``, ``steps_per_batch``) is shared among them.
    Normalisation, optimizer and EMA, which do not depend on the batch, do not count.
    """

    teacher: float
    """The teacher's pass over the full image: features and predicted losses."""
    student: float
    """Target, student forward and backward, and a loss predictor that learns on the full image."""

    @property
    def total(self) -> float:
        """Of the whole step."""
        return self.teacher + self.student


def training_flops(config: Config) -> float:
    """Floating-point operations of one training step per student view, see :class:`StepCost`."""
    return step_cost(config).total


def step_cost(config: Config) -> StepCost:
    """Count a step on tensors without content, which takes a second or two for any model.

    A tokenizer of the user's own is not counted.
    """
    target = build_target(config)
    if codebook := embedded_codebook(target):  # any entries will do: what they are does not change the count
        codebook.adopt(torch.zeros(codebook.vocabulary, codebook.pixels.dim))
    if isinstance(target, nn.Module):
        target.to("meta")
    with torch.device("meta"):
        student = build_student(config, target_dim=target.dim)
        if config.method.tokenizer:
            target = TokenTarget(_NoTokenizer(target.dim, student.positions.shape[1]))
        stages = build_stages(config, student, target)
        teacher = Teacher(student)
        for model in (student, teacher, target):
            if isinstance(model, nn.Module):
                _write_out_attention(model)
        patch, views = patch_size(student.encoder), NUM_IMAGES * config.method.masks_per_image
        asked, solved = [], []
        for (rows, columns), method in stages:
            images = torch.zeros(NUM_IMAGES, config.data.channels, rows * patch[0], columns * patch[1])
            noise = torch.rand(views, rows * columns)
            with FlopCounterMode(display=False) as of_teacher:
                answers = method.ask(teacher, images) if method.needs_teacher else None
            with FlopCounterMode(display=False) as of_student:
                method.step(student, None, images, noise, num_hard=0, answers=answers).total.backward()
            asked.append(of_teacher.get_total_flops() / views / config.method.steps_per_batch)
            solved.append(of_student.get_total_flops() / views)
    return StepCost(statistics.fmean(asked), statistics.fmean(solved))


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
