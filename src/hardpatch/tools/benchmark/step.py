"""``hardpatch benchmark step``: the plain reference step, ours and the fast presets, timed in turns."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from hardpatch.config.benchmark import VARIANTS, BenchmarkConfig, StepConfig
from hardpatch.config.config import Config
from hardpatch.config.recipes import recipe
from hardpatch.config.values import with_fields
from hardpatch.cost.flops import training_flops
from hardpatch.method.targets.target import FittedTarget
from hardpatch.runs.build import (
    build_hpm,
    build_method,
    build_normalise,
    build_optimizer,
    build_student,
    choose_attention,
    clipped_parameters,
    compile_blocks,
    recompute_blocks,
)
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.seeding import mask_noise
from hardpatch.tools.benchmark.plain import PlainStep
from hardpatch.tools.benchmark.timing import Conditions, Stepper, measure

EMA_DECAY = 0.999
HARD_SHARE = 0.25
"""The mean of a run from 0 to 0.5; the time of a step does not depend on it."""
NUM_FLOP_IMAGES = 2


class OurStep:
    """The step of ``hardpatch pretrain``.

    Args:
        config: Of the run.
        device: Where.
        bf16: Autocast.
        compiled: Compile the blocks.
    """

    def __init__(self, config: Config, *, device: torch.device, bf16: bool, compiled: bool) -> None:
        self.config, self.device, self.bf16 = config, device, bf16
        self.batch_size = config.optimisation.batch_size
        self.images_per_step = self.batch_size // config.method.masks_per_image
        self.model = build_hpm(config).to(device)
        if isinstance(target := self.model.method.target, FittedTarget):
            target.adopt({name: torch.zeros_like(tensor) for name, tensor in target.fitted_state().items()})
        for part in self.model.networks:
            choose_attention(part, device, bf16=bf16)
        if config.run.activation_checkpointing:
            recompute_blocks(self.model.student)
        if compiled:
            compile_blocks(*self.model.networks)
        self.optimizer = build_optimizer(config.optimisation, self.model.student)
        self.parameters = clipped_parameters(self.model.student)
        self.normalise = build_normalise(config).to(device)
        self.steps_done = 0

    def step(self, fetch: Callable[[], torch.Tensor]) -> None:
        """One training step, without a wait for the device."""
        self.learn(fetch)
        self.finish()

    def learn(self, fetch: Callable[[], torch.Tensor]) -> None:
        """Forward and backward, teacher included: what every micro-batch costs."""
        num_patches = self.model.geometry.num_patches
        noise = mask_noise(0, self.steps_done, batch_size=self.batch_size, num_patches=num_patches, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            losses = self.model.step(self.normalise(fetch()), noise, share=HARD_SHARE)
        losses.total.backward()

    def finish(self) -> None:
        """Clipping, optimizer and EMA: what a step costs once."""
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimisation.gradient_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.update_teacher(decay=EMA_DECAY)
        self.steps_done += 1

    def flops_per_view(self, images: torch.Tensor) -> float:
        """As :func:`hardpatch.cost.flops.training_flops`."""
        return training_flops(self.config)


class ReferenceStep:
    """The plain step of :mod:`hardpatch.tools.benchmark.plain`.

    Args:
        config: Of the run.
        device: Where.
    """

    def __init__(self, config: Config, *, device: torch.device) -> None:
        student = build_student(config).to(device)
        method = build_method(config, student)
        self.images_per_step = config.optimisation.batch_size
        self.plain = PlainStep(student, method.target, num_hidden=method.num_hidden, optimisation=config.optimisation)
        self.normalise = build_normalise(config).to(device)
        self.num_hard = int(method.num_hidden * HARD_SHARE)

    def step(self, fetch: Callable[[], torch.Tensor]) -> None:
        """One training step."""
        images = fetch()
        noise = torch.rand(len(images), self.plain.student.positions.shape[1], device=images.device)
        self.plain.step(self.normalise(images), noise, num_hard=self.num_hard, ema_decay=EMA_DECAY)

    def flops_per_view(self, images: torch.Tensor) -> float:
        """Counted over a whole step of a few images."""
        return counted_flops(self, images)


def counted_flops(stepper: Stepper, images: torch.Tensor) -> float:
    """Floating-point operations per image, counted over a whole step of a few images."""
    with FlopCounterMode(display=False) as counter:
        stepper.step(lambda: images[:NUM_FLOP_IMAGES])
    return float(counter.get_total_flops() / len(images[:NUM_FLOP_IMAGES]))


def run(config: StepConfig) -> dict[str, Any]:
    """Measure the variants.

    Raises:
        InputError: A size does not fit or a variant is named twice.
    """
    if len(set(config.variants)) < len(config.variants) or not config.variants:
        raise InputError(f"variants: must be different, at least one, got {', '.join(config.variants) or 'none'}")
    conditions = Conditions.of(config)
    device, batch_size = conditions.device, conditions.batch_size
    configs = {name: variant_config(name, config, batch_size) for name in config.variants}
    steppers: dict[str, Callable[[], Stepper]] = {
        name: partial(ReferenceStep, chosen, device=device)
        if name == "reference"
        else partial(OurStep, chosen, device=device, bf16=conditions.bf16, compiled=conditions.compiled)
        for name, chosen in configs.items()
    }
    figures = measure(steppers, config, conditions)
    reference = "fp16" if device.type == "cuda" else "float32"
    figures["precision_of_reference"] = reference if "reference" in configs else None
    return figures


def variant_config(name: str, config: BenchmarkConfig, batch_size: int) -> Config:
    """The config of a run of which a variant is the step.

    Raises:
        InputError: A size does not fit.
    """
    variant = VARIANTS[name]
    base = with_fields(recipe(variant.recipe), variant.fields)
    sizes = ("encoder", "image_size", "patch_size", "decoder_width", "decoder_depth")
    fields = {"batch_size": batch_size, **{name: getattr(config, name) for name in sizes}}
    if base.model.predictor_depth == Config().model.predictor_depth:  # not chosen by the variant itself
        fields["predictor_depth"] = config.decoder_depth
    return with_fields(base, fields)
