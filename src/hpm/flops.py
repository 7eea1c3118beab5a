"""What a training step costs, counted rather than timed: the same on every machine."""

from __future__ import annotations

import torch
from timm.layers import Attention
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hpm.build import build_method, build_student, build_target, embedded_codebook
from hpm.config import Config
from hpm.method import Method, Student, Teacher
from hpm.vit import CrossAttention

NUM_IMAGES = 2
"""Images in the step that is counted."""


def training_flops(config: Config) -> float:
    """Floating-point operations of one training step per student view: teacher, target, student forward and backward.

    What serves several views of an image (``masks_per_image``) is shared among them. A multiply-add counts as two;
    normalisation, optimizer and EMA, which do not depend on the batch, do not count.
    """
    target = build_target(config)
    student = build_student(config, target_dim=target.dim)
    if codebook := embedded_codebook(target):  # any entries will do: what they are does not change the count
        codebook.adopt(torch.zeros(codebook.vocabulary, codebook.pixels.dim))
    return step_flops(student, build_method(config, student, target), masks_per_image=config.method.masks_per_image)


def step_flops(student: Student, method: Method, *, masks_per_image: int = 1) -> float:
    """As :func:`training_flops`, for a student and method that are there already; the student keeps no gradient."""
    teacher = Teacher(student) if method.needs_teacher else None
    device = student.mask_token.device
    size = student.encoder.patch_embed.img_size
    images = torch.zeros(NUM_IMAGES, student.encoder.patch_embed.proj.in_channels, *size, device=device)
    noise = torch.rand(NUM_IMAGES * masks_per_image, student.positions.shape[1], device=device)
    models = [model for model in (student, teacher, method.target) if isinstance(model, nn.Module)]
    written_out = [_write_out_attention(model) for model in models]
    try:
        with FlopCounterMode(display=False) as counter:
            method.step(student, teacher, images, noise, num_hard=0).total.backward()
    finally:
        for undo in written_out:
            for module, fused in undo:
                module.fused_attn = fused
        student.zero_grad(set_to_none=True)
    return float(counter.get_total_flops() / len(noise))


def _write_out_attention(model: nn.Module) -> list[tuple[Attention | CrossAttention, bool]]:
    """Fused kernels are not counted alike on every device; returns what undoes it."""
    before = [
        (module, module.fused_attn) for module in model.modules() if isinstance(module, Attention | CrossAttention)
    ]
    for module, _ in before:
        module.fused_attn = False
    return before
