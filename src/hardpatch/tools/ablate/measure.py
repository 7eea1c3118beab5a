"""What a run of the table is worth: the same measurements, on the same images, for all."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer

from hardpatch.config.config import Config
from hardpatch.data.loader.loading import default_workers
from hardpatch.data.sources import Source, class_indices, fingerprint, open_source
from hardpatch.evaluate.classify.accuracy import top_k_accuracy
from hardpatch.evaluate.classify.knn import knn_top1
from hardpatch.evaluate.classify.labelled_images import LabelledImages, labelled_fingerprint
from hardpatch.evaluate.classify.linear_classifiers import probe
from hardpatch.evaluate.contenders import untrained_encoder
from hardpatch.evaluate.features import split_features
from hardpatch.evaluate.foreground import predicted_loss_auroc
from hardpatch.figures.hardness import measure_hardness, spread_images
from hardpatch.runs.build import build_decoder, build_downloads, build_normalise, choose_attention
from hardpatch.runs.load import LoadedRun
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import say
from hardpatch.runtime.seeding import Stream, derive_seed

NEIGHBOURS = 20
"""k of the kNN accuracy."""
NUM_HARDNESS_IMAGES = 256
"""Images on which predicted and true loss are compared."""


class Accuracies(NamedTuple):
    """What an encoder's frozen features are worth, in percent."""

    knn_top1: float
    linear_top1: float
    """Accuracy of the published probe at one learning rate."""


class Images(NamedTuple):
    """What is learnt from, and what is classified."""

    data: Source
    val: Source | None
    fingerprint: str
    """Of both, with their labels: figures from other images or classes are not figures of this table."""


def open_images(base: Config, val_spec: str) -> Images:
    """Training and validation images; labels are needed on both where there is a validation source.

    Raises:
        InputError: Labels are missing or do not fit.
    """
    data = _open(base.data.data, base, "data")
    if not val_spec:
        say("no val: the table will have no accuracy, only losses and rank correlations")
        return Images(data, None, fingerprint(data))
    val = _open(val_spec, base, "val")
    for name, source in (("data", data), ("val", val)):
        if source.labels is None:
            raise InputError(
                f"{name}: for accuracies both data and val need labels, and {name} has none{source.without_labels()}"
            )
    class_indices(val.labels or [], sorted(set(data.labels or [])))
    if len(data) < NEIGHBOURS:
        raise InputError(f"data: needs at least {NEIGHBOURS} images for {NEIGHBOURS}-NN, got {len(data)}")
    return Images(data, val, f"{labelled_fingerprint(data)} {labelled_fingerprint(val)}")


def _open(spec: str, config: Config, field: str) -> Source:
    return open_source(
        spec, decoder=build_decoder(config.data), image_size=config.data.size, field=field,
        downloads=build_downloads(config),
    )  # fmt: skip


@torch.no_grad()
def measure(folder: Path, images: Images, device: torch.device) -> dict[str, float]:
    """The figures of one run: accuracies, rank correlation on full images, foreground AUROC where masks are known.

    Rank correlation is the mean over images of Spearman's between the teacher's scores of the full image and the
    student's loss on each patch, averaged over ten random masks (or what the run takes for hardness).
    """
    loaded = LoadedRun(folder, device=device)
    config = loaded.config
    figures: dict[str, float] = {}
    bf16 = config.run.precision != "float32" and distributed.has_bf16(device)
    choose_attention(loaded.student, device, bf16=bf16)
    choose_attention(loaded.teacher, device, bf16=bf16)
    if images.val is not None:
        figures |= _accuracies(loaded.student.encoder, config, images.data, images.val, device, bf16)._asdict()
    if loaded.student.predicts_hardness and distributed.is_main():
        shown = images.val or images.data
        figures["rank_correlation"] = _rank_correlation(loaded, shown, bf16)
        if shown.groups() is not None:
            figures["foreground_auroc"] = predicted_loss_auroc(
                loaded.teacher, loaded.normalise, shown, size=config.data.size, device=device, bf16=bf16
            )
    return figures


def _rank_correlation(loaded: LoadedRun, shown: Source, bf16: bool) -> float:
    """In parts of a size that any device can hold."""
    generator = torch.Generator().manual_seed(derive_seed(0, Stream.FIGURES))
    pixels, valid = spread_images(shown, NUM_HARDNESS_IMAGES, loaded.config.data.size)
    total = 0.0
    for start in range(0, len(pixels), 32):
        part = slice(start, start + 32)
        hardness = measure_hardness(
            loaded.student, loaded.teacher, loaded.method, loaded.normalise(pixels[part].to(loaded.device)), share=0.0,
            bf16=bf16, generator=generator, valid=None if valid is None else valid[part],
        )  # fmt: skip
        total += hardness.rank_correlation * len(hardness.hidden)
    return total / len(pixels)


def _accuracies(
    encoder: VisionTransformer, config: Config, data: Source, val: Source, device: torch.device, bf16: bool
) -> Accuracies:
    """The encoder runs over all images once, for both."""
    split = LabelledImages(data, val, sorted(set(data.labels or [])))
    features = split_features(
        encoder, split, build_normalise(config).to(device), size=config.data.size, pooling="mean", device=device,
        bf16=bf16, workers=default_workers() if config.run.workers is None else config.run.workers,
    )  # fmt: skip
    labels, truth = features.labels(split)
    linear = probe(
        features.train.values.to(device), labels.to(device), features.val.values.to(device),
        num_classes=len(split.classes), rates=(0.3,), batch_size=1024,
    )  # fmt: skip
    return Accuracies(knn_top1(features, split, k=NEIGHBOURS), top_k_accuracy(linear.logits, truth, 1))


def measure_untrained(config: Config, images: Images, device: torch.device) -> Accuracies:
    """Accuracies of the encoder at its random start."""
    assert images.val is not None, "accuracies need images to classify"
    encoder = untrained_encoder(config, device)
    bf16 = config.run.precision != "float32" and distributed.has_bf16(device)
    choose_attention(encoder, device, bf16=bf16)
    return _accuracies(encoder, config, images.data, images.val, device, bf16)
