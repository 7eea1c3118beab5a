"""The paper's Figure 2 for any images: what is hard, what the model thinks is hard, and the exercise it sets itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from hardpatch.data.loader.loading import Cover, read_or_next, stack_images
from hardpatch.data.sources import Source, open_source
from hardpatch.data.tools.describe import say_what_is_left
from hardpatch.figures.display import Display, build_display, hatched
from hardpatch.method.losses import rank_correlation
from hardpatch.method.masks import split_patches
from hardpatch.method.method import Method
from hardpatch.method.student import Student, Teacher
from hardpatch.method.targets.pixels import PixelTarget
from hardpatch.method.vit import grid_size, patch_size, patchify, take, unpatchify, whole_patches
from hardpatch.runs.build import build_decoder, build_downloads, choose_attention
from hardpatch.runs.load import LoadedRun
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.pictures import write_picture
from hardpatch.runtime.seeding import Stream, derive_seed

NUM_MASKS = 10
"""Masks over which the true loss of a patch is averaged, as in the paper's Figure 2."""

DEVIATIONS = 2.5
"""Ends of the scale of the maps, in standard deviations from the mean of an image's patches."""
SEES = 0.3
"""From this rank correlation on, predicted losses have their full colour; below they are paler, at most so:"""
PALEST = 0.15


class Hardness(NamedTuple):
    """What is hard in some images."""

    true_loss: Float[Tensor, "b n"]
    """The student's reconstruction loss of each patch, averaged over the masks that hide it."""
    hardness: Float[Tensor, "b n"]
    """What the loss predictor learns, in the same way: the loss, where the run does not say otherwise."""
    predicted_loss: Float[Tensor, "b n"] | None
    """What teacher or scout expect from the full image; None without a loss predictor or scout."""
    hidden: Bool[Tensor, "b n"]
    """A mask of the run's own kind."""
    reconstruction: Float[Tensor, "b c h w"] | None
    """Normalised images with the hidden patches reconstructed; None where the target is no pixels."""
    whole: Bool[Tensor, "b n"] | None = None
    """Patches of pixels that are all data; None: all are."""
    reduction: int = 1
    """One prediction counts for so many patches a side."""
    own_contrast: bool = False
    """Does the reconstruction take mean and contrast of each patch from the image itself, as ``norm_pix`` leaves them?
    """

    @property
    def rank_correlation(self) -> float:
        """Mean Spearman correlation of predicted loss and hardness over all patches of an image that are data."""
        if self.predicted_loss is None:
            return float("nan")
        return float(rank_correlation(self.predicted_loss, self.hardness, self.whole).mean())


@torch.no_grad()
def measure_hardness(
    student: Student,
    teacher: Teacher | None,
    method: Method,
    images: Float[Tensor, "b c h w"],
    *,
    share: float,
    generator: torch.Generator,
    bf16: bool = False,
    valid: Bool[Tensor, "b h w"] | None = None,
) -> Hardness:
    """Measure the true loss over :data:`NUM_MASKS` masks, predict it, and set one exercise.

    Args:
        student: Reconstructs.
        teacher: Predicts the loss and guides the mask; None where a scout does, or nothing.
        method: The choices of the run.
        images: Normalised images.
        share: a_t of the exercise.
        generator: Of the masks, on the CPU.
        bf16: Autocast.
        valid: False = no data, which is not chosen by predicted loss; None: all pixels are data.
    """
    was_training = student.training
    patch, size = patch_size(student.encoder), (images.shape[2], images.shape[3])
    whole = None if valid is None else whole_patches(valid.to(images.device), size, patch)
    student.eval()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        said = method.look(student, teacher, images, whole)
        order = torch.rand(len(images), student.positions.shape[1], generator=generator).argsort(1).to(images.device)
        target = method.target(images, said.features)
        true_loss, hardness = average_loss(student, method, images, target, order)
        noise = torch.rand(true_loss.shape, generator=generator).to(images.device)
        hidden = method.hide(said.guide, noise, num_hard=int(method.num_hidden * share), valid=whole)
        prediction = student(images, hidden, num_hidden=method.num_hidden).prediction.float()
    student.train(was_training)
    filled = _fill_in(student, method, images, hidden, prediction)
    own_contrast = isinstance(method.target, PixelTarget) and method.target.normalise
    return Hardness(true_loss, hardness, said.scores, hidden, filled, whole, student.reduction, own_contrast)


def average_loss(
    student: Student,
    method: Method,
    images: Float[Tensor, "b c h w"],
    target: Num[Tensor, "b n q"],
    order: Int[Tensor, "b n"],
) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n"]]:
    """Mean of the student's loss, and of what the loss predictor learns, for every patch.

    Over :data:`NUM_MASKS` masks that rotate, so that each patch is hidden equally often.

    Args:
        student: Reconstructs; in evaluation mode.
        method: The choices of the run.
        images: Normalised images.
        target: Of every patch.
        order: A permutation of the patches per image; it decides the masks.
    """
    num_patches = student.positions.shape[1]
    total, hard, count = torch.zeros(3, len(images), num_patches, device=images.device)
    for number in range(NUM_MASKS):
        turned = (order + number * num_patches // NUM_MASKS) % num_patches
        hidden = turned < method.num_hidden
        _, index = split_patches(hidden, method.num_hidden)
        prediction, wanted = student(images, hidden, num_hidden=method.num_hidden).prediction, take(target, index)
        total.scatter_add_(1, index, method.target.patch_loss(prediction, wanted))
        if method.hardness is not None:
            hard.scatter_add_(1, index, method.hardness(prediction, wanted, images, index))
        count += hidden
    loss = total / count.clamp(min=1)
    return loss, loss if method.hardness is None else hard / count.clamp(min=1)


def _fill_in(
    student: Student,
    method: Method,
    images: Float[Tensor, "b c h w"],
    hidden: Bool[Tensor, "b n"],
    prediction: Float[Tensor, "b m p"],
) -> Float[Tensor, "b c h w"] | None:
    """The images with their hidden patches replaced by the prediction; None where it is no pixels."""
    if not isinstance(method.target, PixelTarget):
        return None
    patch, grid = patch_size(student.encoder), grid_size(student.encoder)
    patches = patchify(images, patch)
    _, index = split_patches(hidden, method.num_hidden)
    wide = index.unsqueeze(-1).expand(-1, -1, patches.shape[-1])
    pixels = method.target.to_pixels(torch.zeros_like(patches).scatter(1, wide, prediction), images)
    return unpatchify(torch.where(hidden.unsqueeze(-1), pixels, patches), patch, grid)


def draw_hardness(
    images: Float[Tensor, "b c h w"],
    hardness: Hardness,
    display: Display,
    grid: tuple[int, int],
    title: str,
    valid: Bool[Tensor, "b h w"] | None = None,
) -> Figure:
    """One row per image: input, loss (or hardness), predicted loss, masked input, reconstruction, if any.

    Both maps have one scale: standard deviations from the mean of the image's patches. Predicted losses are the paler
    the less they agree with the true ones. Pixels without data are hatched; so are patches that hold some, in the maps.

    Args:
        images: Normalised images.
        hardness: What :func:`measure_hardness` says of them.
        display: How the run's images are shown.
        grid: Rows and columns of patches.
        title: Line above the figure.
        valid: False = no data; None: all pixels are data.
    """
    patch = (images.shape[2] // grid[0], images.shape[3] // grid[1])
    covered = hardness.hidden.reshape(-1, *grid).repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)
    shown = hatched(display(images), valid)
    told = "loss" if hardness.hardness is hardness.true_loss else "hardness"
    sees = min(1.0, max(PALEST, hardness.rank_correlation / SEES))
    predicted = "predicted loss" if hardness.reduction == 1 else (
        f"predicted loss,\n{grid[0] // hardness.reduction} x {grid[1] // hardness.reduction}"
    )  # fmt: skip
    predicted += "\npale: agrees little" if sees < 1 and hardness.predicted_loss is not None else ""
    pictures: dict[str, Any] = {
        "image": shown,
        f"true {told},\n{NUM_MASKS} masks": hardness.hardness,
        predicted: hardness.predicted_loss,
        "hidden": np.where(covered.cpu().numpy()[..., None], np.uint8(128), shown),
    }
    if hardness.reconstruction is not None:
        own = "\n(mean and contrast\nof the patch itself)" if hardness.own_contrast else ""
        pictures[f"reconstruction{own}"] = hatched(display(hardness.reconstruction), valid)
    columns = {name: content for name, content in pictures.items() if content is not None}
    height = 1.5 * images.shape[2] / images.shape[3]
    figure = Figure(figsize=(1.5 * len(columns), height * len(images) + 1.3), layout="constrained")
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for row in range(len(images)):
        for column, (name, content) in enumerate(columns.items()):
            axis = axes[row, column]
            if isinstance(content, Tensor):
                whole = None if hardness.whole is None else hardness.whole[row]
                colours = _draw_map(axis, content[row], grid, whole, alpha=sees if name == predicted else 1.0)
            else:
                axis.imshow(content[row], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            for side in axis.spines.values():
                side.set_visible(False)
            if row == 0:
                axis.set_title(name, fontsize=9)
    maps = [axes[-1, column] for column, content in enumerate(columns.values()) if isinstance(content, Tensor)]
    scale = figure.colorbar(colours, ax=maps, location="bottom", aspect=30, ticks=[-DEVIATIONS, 0, DEVIATIONS])
    scale.ax.set_xticklabels(["easy", "mean of the image", "hard"], fontsize=8)
    figure.suptitle(title + ("" if valid is None else "; hatched: no data"), fontsize=9)
    return figure


def _draw_map(
    axis: Axes, values: Float[Tensor, " n"], grid: tuple[int, int], whole: Bool[Tensor, " n"] | None, *, alpha: float
) -> AxesImage:
    """A value per patch as colours, by its distance from their mean; patches that are not whole are hatched."""
    shown = values.float().reshape(grid).cpu().numpy()
    if whole is not None:
        there = whole.reshape(grid).cpu().numpy()
        axis.set_facecolor("0.75")
        axis.patch.set(hatch="////", edgecolor="0.45", linewidth=0)
        shown = np.where(there, shown, np.nan)
    shown = (shown - np.nanmean(shown)) / (np.nanstd(shown) + 1e-12) if np.isfinite(shown).any() else shown
    return axis.imshow(shown, cmap="magma", interpolation="nearest", vmin=-DEVIATIONS, vmax=DEVIATIONS, alpha=alpha)


def told_correlation(hardness: Hardness) -> str:
    """For a title; nothing without a loss predictor."""
    if hardness.predicted_loss is None:
        return ""
    return f"; rank correlation of predicted and true loss here {hardness.rank_correlation:+.2f}"


def visualize(checkpoint: str | Path, images: str, out: Path, *, count: int = 8) -> float:
    """``hardpatch visualize``: draw the hardness figure of some images of a source.

    Args:
        checkpoint: A run folder, or one of its checkpoints.
        images: Any source.
        out: The figure, ``.png``.
        count: Images, spread over the source.

    Returns:
        Mean rank correlation of predicted and true loss.

    Raises:
        InputError: Nothing there, or a bad checkpoint.
    """
    if count < 1:
        raise InputError(f"count: must be at least 1, got {count}")
    if out.suffix.lower() != ".png":
        raise InputError(f"out: the figure must end in .png, got {str(out)!r}")
    loaded = LoadedRun(checkpoint)
    config = loaded.config
    source = open_source(
        images, decoder=build_decoder(config.data), image_size=config.data.size, field="images",
        downloads=build_downloads(config),
    )  # fmt: skip
    say_what_is_left(source, field="images")
    pixels, valid = spread_images(source, count, config.data.size)
    shown = loaded.normalise(pixels)
    choose_attention(loaded.student, loaded.device, bf16=False)
    hardness = measure_hardness(
        loaded.student, loaded.teacher, loaded.method, shown, share=config.method.largest_hard_share,
        generator=torch.Generator().manual_seed(derive_seed(config.optimisation.seed, Stream.FIGURES)), valid=valid,
    )  # fmt: skip
    title = f"{checkpoint}, step {loaded.step}" + told_correlation(hardness)
    display = build_display(config, pixels)
    figure = draw_hardness(shown, hardness, display, grid_size(loaded.student.encoder), title, valid)
    try:
        write_picture(figure, out, source=images)
    except OSError as error:
        raise InputError(f"out: cannot write {str(out)!r}: {error.strerror}") from error
    return hardness.rank_correlation


class SpreadImages(NamedTuple):
    """Some images of a source, as every evaluation sees them."""

    pixels: Shaped[Tensor, "b c h w"]
    valid: Bool[Tensor, "b h w"] | None
    """False = no data; None: all pixels are data."""


def spread_images(source: Source, count: int, size: tuple[int, int]) -> SpreadImages:
    """``count`` images spread evenly over a source."""
    cover = Cover(size)
    positions = torch.linspace(0, len(source) - 1, min(count, len(source))).long().tolist()
    samples = [read_or_next(source, position)[0] for position in positions]
    pixels = stack_images([cover(sample.image) for sample in samples])
    if all(sample.valid is None for sample in samples):
        return SpreadImages(pixels, None)
    everything = torch.ones(size, dtype=torch.bool)
    valid = [everything if sample.valid is None else cover(sample.valid[None])[0] for sample in samples]
    return SpreadImages(pixels, torch.stack(valid))
