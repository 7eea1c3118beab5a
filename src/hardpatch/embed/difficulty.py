"""How difficult an image is, and where.

Two measures, because no single one said both questions:

*Where in the image?* The teacher's predicted loss. Under the relative loss only differences within an image are trained
(adding a number to all scores of an image changes nothing), and under the absolute loss the target is standardised
within each image. So its mean over an image means nothing, and images must not be ranked by it.

*Which image?* The student's own loss on it. Each patch is reconstructed under several masks, the same for all images,
that hide every patch equally often; the mean over patches and masks is the image's difficulty. It has the unit of the
run's target, so it compares images under one run, not runs of different targets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from scipy.stats import spearmanr
from torch import Tensor

from hardpatch.data.loader.loading import ordered_batches
from hardpatch.data.sources.opening import as_spec, open_source
from hardpatch.figures.hardness import average_loss
from hardpatch.method.vit import grid_size, patch_size, patch_variance, whole_patches
from hardpatch.runs.build import build_decoder, build_downloads
from hardpatch.runs.load import LoadedRun
from hardpatch.runtime.distributed import choose_device
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.seeding import Stream, derive_seed

Device = Literal["auto", "cpu", "cuda", "mps"]


class Difficulty(NamedTuple):
    """How difficult some images are."""

    difficulty: Float[Tensor, " b"]
    """Mean reconstruction error, over the patches with data."""
    reconstruction_error: Float[Tensor, "b n"]
    """The student's loss on each patch, averaged over masks; NaN where pixels are no data."""
    predicted_loss: Float[Tensor, "b n"] | None
    """The teacher's scores; NaN likewise; None without a loss predictor."""
    contrast: Float[Tensor, " b"]
    """Root mean variance of the pixels within a patch, in 0..1: what difficulty has to tell more than."""


def mask_order(seed: int, num_patches: int) -> Int[Tensor, " n"]:
    """The permutation of the patches that decides the masks of every image."""
    generator = torch.Generator().manual_seed(derive_seed(seed, Stream.FIGURES))
    return torch.rand(num_patches, generator=generator).argsort()


@torch.no_grad()
def measure_difficulty(
    run: LoadedRun,
    images: Shaped[Tensor, "b c h w"],
    order: Int[Tensor, " n"],
    *,
    bf16: bool = False,
    valid: Bool[Tensor, "b h w"] | None = None,
) -> Difficulty:
    """Measure images, each independently of the others beside it.

    Args:
        run: Student, teacher and target.
        images: On the run's device.
        order: Of :func:`mask_order`.
        bf16: Autocast.
        valid: False = no data; None: all pixels are.
    """
    normalised = run.normalise(images)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        said = run.method.look(run.student, run.teacher, normalised)
        target = run.method.target(normalised, said.features)
        orders = order.to(images.device).expand(len(images), -1)
        error, _ = average_loss(run.student, run.method, normalised, target, orders)
    patch = patch_size(run.student.encoder)
    variance = patch_variance(images / 255, patch)
    scores = None if said.scores is None else said.scores.float()
    if valid is not None:
        hole = ~whole_patches(valid.to(images.device), (images.shape[2], images.shape[3]), patch)
        error, variance = (values.float().masked_fill(hole, torch.nan) for values in (error, variance))
        scores = None if scores is None else scores.masked_fill(hole, torch.nan)
    return Difficulty(
        difficulty=error.nanmean(dim=1),
        reconstruction_error=error,
        predicted_loss=scores,
        contrast=variance.nanmean(dim=1).sqrt(),
    )


@torch.no_grad()
def hardness(
    checkpoint: str | Path, images: Any, *, batch_size: int = 64, device: Device = "auto"
) -> Float[np.ndarray, "n rows columns"]:
    """What a run expects to be hard in images: a score per patch.

    Images of another size are resized and cropped to the run's own, as in every evaluation. Scores are comparable
    within an image, not between images.

    Args:
        checkpoint: A run folder, or one of its checkpoints.
        images: Any source, or images in memory (:mod:`hardpatch.data.sources.in_memory`).
        batch_size: Images that are looked at together.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.

    Returns:
        NaN where pixels are no data.

    Raises:
        InputError: The run predicts no hardness, or an image cannot be read.
    """
    run = LoadedRun(checkpoint, device=choose_device(device))
    if not run.student.predicts_hardness:
        raise InputError(f"checkpoint: {str(checkpoint)!r} has no loss predictor and no scout: it predicts no hardness")
    config, encoder = run.config, run.student.encoder
    source = open_source(
        as_spec(images, field="images"), decoder=build_decoder(config.data), image_size=config.data.size,
        field="images", downloads=build_downloads(config),
    )  # fmt: skip
    found = []
    for batch in ordered_batches(source, size=config.data.size, batch_size=batch_size, workers=0):
        if batch.damaged:
            raise InputError(f"images: {batch.damaged[0].name}: {batch.damaged[0].reason}")
        shown = batch.images.to(run.device)
        whole = batch.valid
        if whole is not None:
            whole = whole_patches(whole.to(run.device), config.data.size, patch_size(encoder))
        scores = run.method.look(run.student, run.teacher, run.normalise(shown), whole).scores
        assert scores is not None, "it predicts hardness"
        scores = scores.float() if whole is None else scores.float().masked_fill(~whole, torch.nan)
        found.append(scores.unflatten(1, grid_size(encoder)).cpu().numpy())
    return np.concatenate(found)


def rank_agreement(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Spearman's rank correlation of two measures over the images with both; NaN where one is constant or alone."""
    there = np.isfinite(a) & np.isfinite(b)
    a, b = a[there], b[there]
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(spearmanr(a, b).statistic)
