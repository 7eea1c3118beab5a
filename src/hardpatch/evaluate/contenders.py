"""Is the pre-training worth it? The same protocol on other encoders: untrained, timm's weights, another run.

An evaluation opens its run with :func:`open_run` and asks :func:`open_contenders` for the encoders, does with each
whatever it does, and puts the scores it got for the same images into one table with :func:`standings`. Every encoder
keeps the image size and the normalisation that it was trained with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import timm
import torch
from jaxtyping import Float, Int
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from hardpatch.config.config import Config
from hardpatch.config.evaluations import KnnConfig, LinearConfig, Pooling
from hardpatch.data.loader.loading import Normalise
from hardpatch.evaluate.classify.accuracy import Interval, paired_difference, top_k_accuracy, wilson_interval
from hardpatch.evaluate.classify.labelled_images import LabelledImages
from hardpatch.evaluate.features import SplitFeatures, split_features
from hardpatch.figures.sections import Table, decimals
from hardpatch.method.student import Teacher
from hardpatch.runs.build import build_student, choose_attention, input_config, timm_arguments
from hardpatch.runs.load import LoadedRun, arguments_of_encoder, load_backbone
from hardpatch.runtime.distributed import choose_device, has_bf16, on_every, process_group, require_same
from hardpatch.runtime.errors import InputError
from hardpatch.weights.read import load_timm

Kind = Literal["run", "untrained", "against"]


@contextmanager
def open_run(checkpoint: str, *, device: Literal["auto", "cpu", "cuda", "mps"]) -> Iterator[LoadedRun]:
    """The run that is evaluated, on its device and in a process group.

    Raises:
        InputError: The device is not there, or the checkpoint cannot be read.
    """
    chosen = choose_device(device)
    with process_group(chosen):
        loaded = on_every(lambda: LoadedRun(checkpoint, device=chosen))
        require_same({"checkpoint": f"step {loaded.step}", "config": loaded.config, "device": chosen.type})
        yield loaded


class Contender(NamedTuple):
    """An encoder, with all it needs to be shown images."""

    name: str
    """What to call it in a table."""
    kind: Kind
    encoder: VisionTransformer
    normalise: Normalise
    """By the statistics that it was trained with."""
    size: tuple[int, int]
    """Height and width of the images it takes."""
    arguments: dict[str, Any]
    """With which ``timm.create_model`` builds it."""
    teacher: Teacher | None = None
    """What predicts the loss of every patch, where that is asked for."""


def open_contenders(
    loaded: LoadedRun, against: Sequence[str], *, pooling: Pooling = "mean", untrained: bool = True
) -> list[Contender]:
    """The encoder of a run, the same untrained, and those it is to be held against; in this order.

    Args:
        against: ``timm:NAME``, ``timm:local-dir:PATH``, or a run (folder, ``.pt`` or its ``weights.safetensors``).

    Raises:
        InputError: One is named twice, cannot be read, takes images of another number of channels, or has no class
            token where one is needed.
    """
    if len(set(against)) < len(against):
        raise InputError(f"against: must be different, got {', '.join(against)}")
    ours = loaded.student.encoder
    ours.pretrained_cfg.update(input_config(loaded.config))
    found = [_contender("this run", "run", ours, loaded.device, timm_arguments(loaded.config))]
    if untrained:
        start = untrained_encoder(loaded.config, loaded.device)
        start.pretrained_cfg.update(input_config(loaded.config))
        found.append(_contender("untrained", "untrained", start, loaded.device, timm_arguments(loaded.config)))
    for spec in against:
        try:
            other = load_timm(spec) if spec.startswith("timm:") else load_backbone(spec)
            arguments = _timm_model(spec, other) if spec.startswith("timm:") else arguments_of_encoder(spec)
        except InputError as error:
            raise InputError(f"against: {spec!r}: {str(error).removeprefix('checkpoint: ')}") from error
        channels, wanted = other.patch_embed.proj.in_channels, loaded.config.data.channels
        if channels != wanted:
            raise InputError(
                f"against: {spec!r} takes images of {channels} channel(s), and this run's have {wanted}; choose a "
                "model of as many"
            )
        found.append(_contender(spec, "against", other.eval(), loaded.device, arguments))
    if pooling == "hardness":
        return [contender._replace(teacher=_teacher(contender, loaded)) for contender in found]
    for contender in found:
        if pooling != "mean" and not contender.encoder.has_class_token:
            whose = "this encoder" if contender.kind == "run" else contender.name
            raise InputError(f"pooling: {pooling!r} needs a class token, and {whose} has none; use mean")
    return found


def features_by_contender(
    contenders: Sequence[Contender], images: LabelledImages, config: KnnConfig | LinearConfig, device: torch.device
) -> Iterator[tuple[Contender, SplitFeatures]]:
    """Features of both sides of a split by one encoder after the other, so that those of one are held at a time."""
    for contender in contenders:
        yield contender, split_features(
            contender.encoder, images, contender.normalise, size=contender.size, pooling=config.pooling, device=device,
            bf16=has_bf16(device), workers=config.workers, teacher=contender.teacher,
        )  # fmt: skip


def _teacher(contender: Contender, loaded: LoadedRun) -> Teacher:
    """The teacher that belongs to an encoder: of the run, of its random start, or of another run."""
    teacher = None
    if contender.kind == "run":
        teacher = loaded.teacher
    elif contender.kind == "untrained":
        teacher = Teacher(build_student(loaded.config, target_dim=loaded.method.target.dim).to(loaded.device))
    elif not contender.name.startswith("timm:") and not contender.name.endswith(".safetensors"):
        teacher = LoadedRun(contender.name, device=loaded.device).teacher
    if teacher is None or not teacher.model.predicts_hardness:
        whose = "this run" if contender.kind == "run" else contender.name
        raise InputError(f"pooling: 'hardness' needs a loss predictor, and {whose} has none")
    choose_attention(teacher, loaded.device, bf16=has_bf16(loaded.device))
    return teacher


def _timm_model(spec: str, encoder: VisionTransformer) -> dict[str, Any]:
    """Arguments for timm to build a model of its own again, without the head."""
    return {
        "model_name": spec.removeprefix("timm:"),
        "img_size": list(encoder.patch_embed.img_size or ()) or None,
        "in_chans": encoder.patch_embed.proj.in_channels,
    }


def _contender(
    name: str, kind: Kind, encoder: VisionTransformer, device: torch.device, arguments: dict[str, Any]
) -> Contender:
    """Take size and normalisation from where timm keeps them."""
    wanted = timm.data.resolve_model_data_config(encoder)
    mean, std = tuple(wanted["mean"]), tuple(wanted["std"])
    channels = encoder.patch_embed.proj.in_channels
    if len(mean) != channels:
        raise InputError(
            f"against: {name!r} takes {channels} channel(s), and its description has the mean of {len(mean)}"
        )
    height, width = encoder.patch_embed.img_size or wanted["input_size"][1:]
    choose_attention(encoder, device, bf16=has_bf16(device))
    normalise = Normalise(mean, std).to(device)
    return Contender(name, kind, encoder.to(device), normalise, (int(height), int(width)), arguments)


def untrained_encoder(config: Config, device: torch.device) -> VisionTransformer:
    """The run's encoder at its own seeded initialisation."""
    encoder = build_student(config, target_dim=1).encoder  # drawn before the head: any width gives the same
    return encoder.to(device).eval()


def folder_name(contender: str) -> str:
    """A name for a folder: ``this run`` and what stands in a path or a model's name, with plain signs alone."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", contender).strip("-.")


class Standing(NamedTuple):
    """A row of the table; percent."""

    name: str
    kind: Kind
    top1: float
    top1_interval: Interval
    """95 %, Wilson."""
    top5: float
    lead: float | None
    """Top-1 of this run minus that of this row, in percentage points; None for this run itself."""
    lead_interval: Interval | None
    """95 %, of the difference on the same images."""


def standings(
    contenders: Sequence[Contender], scores: Sequence[Float[Tensor, "q c"]], labels: Int[Tensor, " q"]
) -> list[Standing]:
    """Every encoder beside the first, on the same images."""
    right = [(score.argmax(dim=1) == labels).numpy() for score in scores]
    rows = []
    for contender, score, mine in zip(contenders, scores, right, strict=True):
        lead, interval = None, None
        if contender.kind != "run":
            lead, interval = paired_difference(right[0], mine)
        rows.append(
            Standing(
                name=contender.name,
                kind=contender.kind,
                top1=top_k_accuracy(score, labels, 1),
                top1_interval=wilson_interval(int(mine.sum()), len(mine)),
                top5=top_k_accuracy(score, labels, 5),
                lead=lead,
                lead_interval=interval,
            )
        )
    return rows


def standings_table(rows: Sequence[dict[str, Any]], *, what: str = "encoder") -> Table:
    """Every encoder by the same protocol, and by how much this run is ahead of it."""

    def lead(row: dict[str, Any]) -> str:
        if row["lead"] is None:
            return ""
        return "{:+.2f} ({low:+.1f} to {high:+.1f})".format(row["lead"], **row["lead_interval"])

    header = (what, "top-1 %", "95 % interval", "top-5 %", "this run is ahead by")
    return Table(header, [
        (row["name"], decimals(row["top1"]), "{low:.1f} to {high:.1f}".format(**row["top1_interval"]),
         decimals(row["top5"]), lead(row))
        for row in rows
    ])  # fmt: skip
