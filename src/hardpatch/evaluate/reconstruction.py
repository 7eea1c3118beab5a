"""Is what the student makes of hidden patches better than what needs no learning?

Two rivals, in the loss of the run's own target, on the patches that one random mask hides:

    flat           each patch as its own mean: colour known, pattern not; under ``norm_pix`` the loss is about 1
    interpolated   linear between the visible pixels; under ``norm_pix`` with the mean of what it made taken away and
                   the patch's own contrast, as the target leaves neither to be guessed
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator
from torch import Tensor

from hardpatch.method.masks import split_patches
from hardpatch.method.method import Method
from hardpatch.method.student import Student
from hardpatch.method.targets.pixels import PixelTarget, patch_statistics
from hardpatch.method.vit import grid_size, patch_size, patchify, take, unpatchify, whole_patches


class Reconstruction(NamedTuple):
    """Mean loss over the hidden patches of each image."""

    student: Float[np.ndarray, " b"]
    flat: Float[np.ndarray, " b"]
    interpolated: Float[np.ndarray, " b"]


@torch.no_grad()
def compare_reconstruction(
    student: Student,
    method: Method,
    images: Float[Tensor, "b c h w"],
    *,
    generator: torch.Generator,
    bf16: bool = False,
    valid: Bool[Tensor, "b h w"] | None = None,
) -> Reconstruction | None:
    """Hide the same patches of all images, and reconstruct them in three ways.

    Args:
        student: Reconstructs.
        method: The run's target and share of hidden patches.
        images: Normalised images.
        generator: Of the mask, on the CPU.
        bf16: Autocast.
        valid: False = no data; patches that touch it do not count. None: all pixels are data.

    Returns:
        None where the target is no pixels: the rivals make pixels.
    """
    target = method.target
    if not isinstance(target, PixelTarget):
        return None
    patch, grid = patch_size(student.encoder), grid_size(student.encoder)
    number = grid[0] * grid[1]
    one = torch.zeros(1, number, dtype=torch.bool)
    one[0, torch.randperm(number, generator=generator)[: method.num_hidden]] = True
    hidden = one.to(images.device).expand(len(images), -1)
    _, index = split_patches(hidden, method.num_hidden)
    was_training = student.training
    student.eval()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        prediction = student(images, hidden, num_hidden=method.num_hidden).prediction.float()
    student.train(was_training)

    patches = take(patchify(images.float(), patch), index)
    wanted = take(target(images), index)
    mean, deviation = patch_statistics(patches)
    guess = take(patchify(interpolate(images.float(), one[0], patch, grid), patch), index)
    if target.normalise:
        flat, guess = torch.zeros_like(wanted), (guess - guess.mean(dim=-1, keepdim=True)) / deviation
    else:
        flat = mean.expand_as(wanted)
    size = (images.shape[2], images.shape[3])
    counts = torch.ones_like(index, dtype=torch.bool)
    if valid is not None:
        counts = whole_patches(valid.to(images.device), size, patch).gather(1, index)

    def loss(made: Float[Tensor, "b m p"]) -> Float[np.ndarray, " b"]:
        each = target.patch_loss(made, wanted).masked_fill(~counts, torch.nan).nanmean(dim=1)
        found: np.ndarray = each.double().cpu().numpy()
        return found

    return Reconstruction(loss(prediction), loss(flat), loss(guess))


def interpolate(
    images: Float[Tensor, "b c h w"], hidden: Bool[Tensor, " n"], patch: tuple[int, int], grid: tuple[int, int]
) -> Float[Tensor, "b c h w"]:
    """Hidden patches filled linearly between visible pixels; beyond the outermost ones by the nearest.

    Args:
        images: Images.
        hidden: Patches, the same of all images.
        patch: Height and width in pixels.
        grid: Rows and columns of patches.
    """
    channels = images.shape[1]
    wide = hidden[None, :, None].expand(1, -1, channels * patch[0] * patch[1]).to(images)
    hole = unpatchify(wide, patch, grid)[0, 0].cpu().numpy() > 0
    values = images.permute(2, 3, 0, 1).flatten(2).double().cpu().numpy()  # (h, w, images x channels)
    visible, asked = np.argwhere(~hole), np.argwhere(hole)
    made = LinearNDInterpolator(visible, values[~hole])(asked)
    outside = np.isnan(made).any(axis=1) & np.isfinite(values).all()
    if outside.any():
        made[outside] = NearestNDInterpolator(visible, values[~hole])(asked[outside])
    filled = values.copy()
    filled[hole] = made
    whole = torch.from_numpy(filled).unflatten(2, (len(images), channels)).permute(2, 3, 0, 1)
    made_images: Tensor = whole.to(images)
    return made_images
