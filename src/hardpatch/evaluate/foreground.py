"""Does the predicted loss find the objects? The paper's Figure 2 claim as a number.

Every patch gets a score by each measure; a patch is foreground if more than half of its pixels are. Scores are
compared within an image (predicted losses only mean something there), figures are means over images. Objects are known
by masks or by boxes; what lies in any box is foreground.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from hardpatch.config.config import Config
from hardpatch.config.evaluations import ForegroundConfig
from hardpatch.data.images.decode import DecodeError, Decoder
from hardpatch.data.loader.loading import Cover, Damage, Normalise, ordered_batches
from hardpatch.data.sources import Source, open_source
from hardpatch.data.tools.describe import say_what_is_left
from hardpatch.evaluate.boxes import read_boxes
from hardpatch.evaluate.contenders import Contender, open_contenders, open_run
from hardpatch.evaluate.dense.class_masks import match_by_stem
from hardpatch.evaluate.features import none_readable, report_damage
from hardpatch.evaluate.result import Result, visualize_command
from hardpatch.figures.hardness import measure_hardness
from hardpatch.figures.sections import Picture, Section, Table, Tile, decimals
from hardpatch.method.method import Method
from hardpatch.method.student import Student, Teacher
from hardpatch.method.vit import class_attention, has_class_attention, patch_size, patch_variance, patchify
from hardpatch.runs.build import build_decoder, build_downloads, build_student, choose_attention
from hardpatch.runs.load import LoadedRun
from hardpatch.runtime.distributed import has_bf16
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import tracked
from hardpatch.runtime.seeding import Stream, derive_seed

MEASURES = {
    "predicted_loss": "predicted loss (full image)",
    "reconstruction_error": "reconstruction error (student, 10 masks)",
    "patch_variance": "patch variance",
    "edge_density": "edge density",
    "attention": "class-token attention",
}
"""What scores the patches, and what to call it."""
IMAGE_ALONE = ("patch_variance", "edge_density")
"""Measures that are the same whatever model looks."""


class Finding(NamedTuple):
    """How well one measure finds the foreground: means over images, in 0..1."""

    auroc: float
    average_precision: float
    pointing_game: float
    """Share of images whose highest-scored patch is foreground."""


@dataclass(frozen=True)
class ForegroundResult(Result):
    """One finding per measure, over all images and by group."""

    kind = "foreground"
    measures: dict[str, Finding | None]
    """None for attention where the encoder has no class token, or blocks of another kind than timm's plain one."""
    by_group: dict[str, dict[str, Finding | None]]
    others: dict[str, dict[str, Finding | None]]
    """The measures by other models that the run was held against, by their names."""
    num_images: int
    """Images measured, without the damaged ones and those that have no box."""
    damaged: int
    """Images left out."""

    def what_next(self, config: ForegroundConfig) -> list[str]:
        """See what is hard in these images."""
        return [visualize_command(config.checkpoint, config.images)]

    def figures(self) -> dict[str, Any]:
        """Every measure by its own name, then the rest."""
        values = super().figures()
        return {**values.pop("measures"), **values}


def find_in_images(scores: Float[np.ndarray, "b n"], foreground: Bool[np.ndarray, "b n"]) -> Float[np.ndarray, "b 3"]:
    """AUROC, average precision and pointing game of every image; NaN where an image is all one or the other.

    AUROC is the Mann-Whitney statistic: the share of (foreground, background) pairs in which the foreground patch
    scores higher, ties counting half.
    """
    positive = foreground.sum(axis=1)
    negative = foreground.shape[1] - positive
    rank_sum = (rankdata(scores, axis=1) * foreground).sum(axis=1)
    figures = np.full((len(scores), 3), np.nan)
    for row in np.flatnonzero((positive > 0) & (negative > 0)):
        below = rank_sum[row] - positive[row] * (positive[row] + 1) / 2
        figures[row] = (
            below / (positive[row] * negative[row]),
            average_precision_score(foreground[row], scores[row]),
            foreground[row, scores[row].argmax()],
        )
    return figures


def mean_finding(figures: Float[np.ndarray, "b 3"]) -> Finding:
    """Mean of what :func:`find_in_images` gives over the images that have both foreground and background."""
    usable = figures[~np.isnan(figures[:, 0])]
    return Finding(*map(float, usable.mean(axis=0) if len(usable) else [np.nan] * 3))


def foreground_patches(masks: Bool[Tensor, "b h w"], patch: tuple[int, int]) -> Bool[Tensor, "b n"]:
    """Patches of which more than half of the pixels are foreground."""
    return patchify(masks.unsqueeze(1).float(), patch).mean(dim=-1) > 0.5


def edge_density(images: Float[Tensor, "b c h w"], patch: tuple[int, int]) -> Float[Tensor, "b n"]:
    """Mean gradient magnitude (forward differences of the channel mean) in each patch."""
    grey = images.mean(dim=1, keepdim=True)
    down = F.pad(grey[:, :, 1:] - grey[:, :, :-1], (0, 0, 0, 1))
    right = F.pad(grey[..., 1:] - grey[..., :-1], (0, 1))
    return patchify((down.square() + right.square()).sqrt(), patch).mean(dim=-1)


def measure_patches(
    student: Student,
    teacher: Teacher | None,
    method: Method,
    normalise: Normalise,
    images: Tensor,
    *,
    generator: torch.Generator,
    bf16: bool,
) -> dict[str, Float[np.ndarray, "b n"] | None]:
    """Every measure of every patch of some uint8 images."""
    vit, patch = student.encoder, patch_size(student.encoder)
    normalised = normalise(images)
    hardness = measure_hardness(student, teacher, method, normalised, share=0, generator=generator, bf16=bf16)
    values = {
        "predicted_loss": hardness.predicted_loss,
        "reconstruction_error": hardness.true_loss,
        "patch_variance": patch_variance(images / 255, patch),
        "edge_density": edge_density(images / 255, patch),
        "attention": class_attention(vit, normalised) if has_class_attention(vit) else None,
    }
    return {name: None if value is None else value.float().cpu().numpy() for name, value in values.items()}


Ask = Callable[[Tensor], dict[str, Float[np.ndarray, "b n"] | None]]
"""Gives every measure of every patch of some uint8 images; None or nothing where there is no such measure."""


class Objects(NamedTuple):
    """Images and where the objects in them are, at the size that an encoder takes."""

    source: Source
    size: tuple[int, int]
    masks: dict[int, Bool[Tensor, "h w"]] | None
    """By the image's number, images without one are left out; None: the source knows its own."""


class Measured(NamedTuple):
    """Every patch of the images that were measured."""

    scores: dict[str, Float[np.ndarray, "b n"]]
    """By measure; without one that the encoder does not have."""
    foreground: Bool[np.ndarray, "b n"]
    indices: list[int]
    damaged: list[Damage]


def _judge(
    ask: Ask, vit: VisionTransformer, there: Objects, *, device: torch.device, max_damaged: float | None
) -> ForegroundResult:
    """Hold what ``ask`` says of every patch of a ViT against the objects; ``max_damaged`` None: damage is known."""
    source = there.source
    found = measure_images(ask, there, patch=patch_size(vit), device=device)
    if max_damaged is not None:
        report_damage({"images": (found.damaged, len(source))}, max_damaged=max_damaged)
    figures = {name: find_in_images(value, found.foreground) for name, value in found.scores.items()}

    def findings(rows: Bool[np.ndarray, " b"]) -> dict[str, Finding | None]:
        return {name: mean_finding(figures[name][rows]) if name in figures else None for name in MEASURES}

    groups = source.groups()
    names = np.array([] if groups is None else [groups[i] for i in found.indices])
    return ForegroundResult(
        measures=findings(np.ones(len(found.indices), dtype=bool)),
        by_group={str(name): findings(names == name) for name in dict.fromkeys(names.tolist())},
        num_images=len(found.indices),
        damaged=len(found.damaged),
        others={},
    )


def measure_images(ask: Ask, there: Objects, *, patch: tuple[int, int], device: torch.device) -> Measured:
    """Ask for every measure of the images that have a mask or a box.

    Raises:
        InputError: Nobody knows masks, or no image can be read.
    """
    source, size, masks = there
    scores: dict[str, list[Float[np.ndarray, "b n"]]] = {name: [] for name in MEASURES}
    foreground, indices, damaged = [], [], []
    for batch in tracked(ordered_batches(source, size=size), "foreground", total=-(-len(source) // 128)):
        damaged += batch.damaged
        wanted = [place for place, index in enumerate(batch.indices) if masks is None or index in masks]
        if not wanted:
            continue
        chosen = [batch.indices[place] for place in wanted]
        known = batch.masks if masks is None else torch.stack([masks[index] for index in chosen])
        if known is None:
            raise InputError("masks: the images bring no masks of their own; name a folder of masks, or boxes")
        foreground.append(foreground_patches(known, patch).numpy())
        indices += chosen
        for name, value in ask(batch.images[wanted].to(device)).items():
            if value is not None:
                scores[name].append(value)
    if not indices:
        raise none_readable(damaged)
    joined = {name: np.concatenate(parts) for name, parts in scores.items() if parts}
    return Measured(joined, np.concatenate(foreground), indices, damaged)


@torch.no_grad()
def predicted_loss_auroc(
    asked: Student | Teacher,
    normalise: Normalise,
    source: Source,
    *,
    size: tuple[int, int],
    device: torch.device,
    bf16: bool,
) -> float:
    """AUROC of the predicted loss alone, for a look during training: no masks are drawn, nothing is reconstructed.

    Raises:
        InputError: The source knows no masks.
    """
    aurocs = []
    for batch in ordered_batches(source, size=size):
        if batch.masks is None:
            raise InputError("masks: the images bring no masks of their own")
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            scores = asked.predict_loss(normalise(batch.images.to(device))).float().cpu().numpy()
        truth = foreground_patches(batch.masks, asked.geometry.patch).numpy()
        aurocs.append(find_in_images(scores, truth)[:, 0])
    return float(np.nanmean(np.concatenate(aurocs)))


def run(config: ForegroundConfig) -> ForegroundResult:
    """``hardpatch evaluate foreground``.

    Raises:
        InputError: No masks, masks or boxes that do not fit the images, too many damaged images, or a bad checkpoint.
    """
    if config.masks and config.boxes:
        raise InputError("boxes: give masks or boxes, not both")
    with open_run(config.checkpoint, device=config.device) as loaded:
        contenders = open_contenders(loaded, config.against, untrained=config.untrained)
        opened = {size: _open(config, loaded.config, size) for size in {contender.size for contender in contenders}}
        judged: dict[str, ForegroundResult] = {}
        for contender in contenders:
            judged[contender.name] = _judge(
                _asker(contender, loaded), contender.encoder, opened[contender.size], device=loaded.device,
                max_damaged=None if judged else config.max_damaged,
            )  # fmt: skip
    ours, *others = judged.items()
    return replace(ours[1], others={name: result.measures for name, result in others})


def _open(config: ForegroundConfig, run_config: Config, size: tuple[int, int]) -> Objects:
    """Images, and the masks or boxes of the objects in them, at the size that an encoder takes."""
    source = open_source(
        config.images, decoder=build_decoder(run_config.data), image_size=size, field="images",
        downloads=build_downloads(run_config),
    )  # fmt: skip
    say_what_is_left(source, field="images")
    masks = _read_masks(Path(config.masks).expanduser(), source, size) if config.masks else None
    if config.boxes:
        masks = read_boxes(Path(config.boxes).expanduser(), source, size)
    return Objects(source, size, masks)


def _asker(contender: Contender, loaded: LoadedRun) -> Ask:
    """What gives the measures for a contender: all of a run and of its own start, attention alone of the others."""
    device, generator = loaded.device, torch.Generator().manual_seed(derive_seed(0, Stream.FIGURES))
    bf16 = has_bf16(device)
    student, teacher, method = loaded.student, loaded.teacher, loaded.method
    if contender.kind == "untrained":
        student = build_student(loaded.config, target_dim=method.target.dim).to(device).eval()
        teacher = Teacher(student)
    elif contender.kind == "against":
        if contender.name.startswith("timm:") or contender.name.endswith(".safetensors"):
            return partial(_attention_alone, contender)
        other = LoadedRun(contender.name, device=device)
        student, teacher, method = other.student, other.teacher, other.method
    choose_attention(student, device, bf16=bf16)
    choose_attention(teacher, device, bf16=bf16)
    return partial(measure_patches, student, teacher, method, contender.normalise, generator=generator, bf16=bf16)


@torch.no_grad()
def _attention_alone(contender: Contender, images: Tensor) -> dict[str, Float[np.ndarray, "b n"] | None]:
    """What an encoder without decoders gives; the measures of the image itself are in every table already."""
    vit = contender.encoder
    value = class_attention(vit, contender.normalise(images)) if has_class_attention(vit) else None
    return {"attention": None if value is None else value.float().cpu().numpy()}


def _read_masks(folder: Path, source: Source, size: tuple[int, int]) -> dict[int, Bool[Tensor, "h w"]]:
    """The mask of every readable image by the image's number, matched by name."""
    cover, masks = Cover(size), {}
    for index, file in enumerate(match_by_stem(source, folder, field="masks")):
        try:
            mask = Decoder(1)(file.read_bytes()).image[0] > 127
        except (DecodeError, OSError) as error:
            raise InputError(f"masks: cannot read {file}: {error}") from error
        try:
            shape = source.read(index).image.shape[-2:]
        except (DecodeError, OSError):  # a damaged image is left out, and reported where the others are measured
            continue
        if mask.shape != shape:
            raise InputError(
                f"masks: {file} is {tuple(mask.shape)} pixels and its image {tuple(shape)}; "
                "they must be of the same size"
            )
        masks[index] = cover(mask[None])[0]
    return masks


def describe(figures: dict[str, Any]) -> Section:
    """Every measure over all images, by other models, and by level."""
    header = ("AUROC", "average precision", "pointing game")

    def rows(measures: dict[str, Any], names: Iterable[str]) -> list[tuple[str, ...]]:
        return [
            (MEASURES[name], *(decimals(measures[name] and measures[name][key], 3) for key in Finding._fields))
            for name in names
        ]  # fmt: skip

    blocks: list[str | Table | Picture] = [
        "No label or mask was used in training. In every image the patches are ranked by each measure and held against "
        "the objects. AUROC: 0.5 is chance, 1 is perfect.",
        Table((f"{figures['num_images']:,} images", *header), rows(figures, MEASURES)),
    ]
    for name, measures in figures.get("others", {}).items():
        known = [key for key, finding in measures.items() if finding and key not in IMAGE_ALONE]
        blocks.append(Table((f"by {name}", *header), rows(measures, known)))
    if groups := figures["by_group"]:
        by_level = [
            (MEASURES[name], *(decimals(group[name] and group[name]["auroc"], 3) for group in groups.values()))
            for name in MEASURES
        ]
        blocks.append(Table(("AUROC by level", *groups), by_level))
    found, plain = figures["predicted_loss"], figures["patch_variance"]
    tile = found and Tile(
        decimals(found["auroc"], 3), "foreground AUROC",
        f"of the predicted loss; patch variance {decimals(plain['auroc'], 3)}, chance 0.5",
    )  # fmt: skip
    return Section("Does the predicted loss find the objects?", blocks, tile)
