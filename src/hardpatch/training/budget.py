"""The teacher budget: how much of a step mining may cost, and what is done to keep to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from hardpatch.config.config import Config
from hardpatch.cost.flops import step_cost
from hardpatch.method.vit import grid_size
from hardpatch.runs.build import build_encoder
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import say

CHOICES = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (4, 2), (8, 2))
"""(masks_per_image, teacher_reduction), in the order in which they are tried."""


def keep_to_budget(config: Config) -> Config:
    """Raise ``masks_per_image`` and ``teacher_reduction`` until the teacher's pass keeps to ``teacher_budget``.

    Counted in FLOPs, so that every machine chooses the same and a run that goes on finds itself again. What the config
    already says is never lowered, and a config that keeps to its budget stays as it is.

    Raises:
        InputError: Nothing that fits this grid and batch is cheap enough.
    """
    budget = config.method.teacher_budget
    if budget is None:
        return config
    cheapest = 1.0
    for chosen in _candidates(config):
        share = teacher_share(chosen)
        if share <= budget:
            say(
                f"teacher_budget {budget:.0%}: {chosen.method.masks_per_image} masks an image, teacher on images "
                f"{chosen.model.teacher_reduction} times smaller per side; its pass is {share:.1%} of a step's FLOPs"
            )
            return chosen
        cheapest = min(cheapest, share)
    raise InputError(
        f"teacher_budget: must be at least {cheapest:.3f} with this model, grid and batch (several masks an image need "
        "a batch they divide; a smaller teacher image needs predictor_view 'full' or 'both', or decoder 'cross', and a "
        f"grid it divides), got {budget}"
    )


def teacher_share(config: Config) -> float:
    """Share of the teacher's pass in the FLOPs of a step."""
    cost = step_cost(config)
    return cost.teacher / cost.total


def _candidates(config: Config) -> Iterator[Config]:
    """The config itself, then every choice that makes the teacher cheaper and fits."""
    yield config
    with torch.device("meta"):
        rows, columns = grid_size(build_encoder(config))
    method, model = config.method, config.model
    micro = config.run.micro_batch_size or config.optimisation.batch_size
    asked_everywhere = method.target == "ema_features" or method.mask == "attention"
    learns_where_asked = method.predictor_view != "masked" or model.decoder == "cross"
    for masks, reduction in CHOICES:
        if (
            masks < method.masks_per_image
            or reduction < model.teacher_reduction
            or micro % (masks * config.data.crops_per_image)
        ):
            continue
        if reduction > 1 and (asked_everywhere or not learns_where_asked or rows % reduction or columns % reduction):
            continue
        yield replace(
            config,
            method=replace(method, masks_per_image=masks),
            model=replace(model, teacher_reduction=reduction),
        )
