"""Linear classification of frozen features: what most papers quote, beside the untrained encoder.

The encoder runs over every image once. The classifiers then see features only
(:mod:`hardpatch.evaluate.classify.linear_classifiers`), so that a sweep over learning rates, few labels and several
encoders cost seconds.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hardpatch.config.evaluations import LinearConfig
from hardpatch.evaluate.classify.accuracy import (
    ClassAccuracy,
    Interval,
    count_confusions,
    draw_confusions,
    per_class_accuracy,
    top_k_accuracy,
)
from hardpatch.evaluate.classify.labelled_images import LabelledImages, choose_per_class, open_labelled
from hardpatch.evaluate.classify.linear_classifiers import Probed, logistic, probe
from hardpatch.evaluate.contenders import Contender, Kind, Standing, open_contenders, standings
from hardpatch.evaluate.features import check_max_damaged, damage_of_split, split_features, whole_split
from hardpatch.runs.build import build_decoder, build_downloads
from hardpatch.runs.folder import RunFolder
from hardpatch.runs.load import LoadedRun
from hardpatch.runtime.distributed import choose_device, from_main, has_bf16, is_main, process_group
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.files import write_atomically
from hardpatch.runtime.log import tracked, warn


class FewLabels(NamedTuple):
    """Accuracy of one encoder after learning from few labelled images; percent."""

    labels_per_class: int
    name: str
    """Of the encoder."""
    kind: Kind
    top1: float
    """Mean over the draws."""
    deviation: float | None
    """Standard deviation over the draws; None of one."""
    draws: list[float]
    """Accuracy of every draw."""


@dataclass(frozen=True)
class LinearResult:
    """Accuracies in percent."""

    top1: float
    top1_interval: Interval
    """95 %, Wilson."""
    top5: float
    untrained_top1: float
    num_train: int
    """Training images without the damaged ones."""
    num_val: int
    """Images classified: validation images without the damaged ones."""
    num_classes: int
    damaged: int
    """Images left out, of both."""
    mode: str
    pooling: str
    chosen: dict[str, float]
    """Learning rate or C, by encoder."""
    held_out_top1: dict[str, float] | None
    """Of this run on the held-out training images, by learning rate or C; None where there was no choice."""
    standings: list[Standing]
    """This run, the same encoder untrained, and what it was to be held against."""
    few_labels: list[FewLabels]
    per_class: list[ClassAccuracy]
    """Of this run."""
    picture: str
    """What is taken for what; empty where no folder is known."""


class _Classified(NamedTuple):
    """What one encoder's features came to."""

    all_labels: Probed
    few_labels: list[FewLabels]


def run(config: LinearConfig) -> LinearResult:
    """``hardpatch evaluate linear``: accuracy of a linear classifier on an encoder, and on it untrained.

    Under ``torchrun`` every process reads a part of the images; the first one trains the classifiers.

    Raises:
        InputError: A setting breaks a rule, no labels, classes that do not fit, too many damaged, or a bad checkpoint.
    """
    _check(config)
    device = choose_device(config.device)
    with process_group(device):
        return _run(config, device)


def _check(config: LinearConfig) -> None:
    """Refuse settings that cannot work, before any work.

    Raises:
        InputError: Names the field.
    """
    check_max_damaged(config.max_damaged)
    for field, values in (("learning_rates", config.learning_rates), ("inverse_penalties", config.inverse_penalties)):
        if not values or len(set(values)) < len(values) or not all(0 < value < float("inf") for value in values):
            raise InputError(f"{field}: must be different numbers above 0, at least one, got {values}")
    for field, least in (("epochs", 1), ("batch_size", 2), ("draws", 1), ("seed", 0)):
        if getattr(config, field) < least:
            raise InputError(f"{field}: must be at least {least}, got {getattr(config, field)}")
    if len(set(config.labels_per_class)) < len(config.labels_per_class):
        raise InputError(f"labels_per_class: must be different, got {config.labels_per_class}")
    field = "learning_rates" if config.mode == "sgd" else "inverse_penalties"
    if 1 in config.labels_per_class and len(getattr(config, field)) > 1:
        raise InputError(
            f"labels_per_class: 1 leaves no image of any class to choose among the {field} on; give one of these only"
        )


def _run(config: LinearConfig, device: torch.device) -> LinearResult:
    loaded = LoadedRun(config.checkpoint, device=device)
    images = open_labelled(
        config.train, config.val, decoder=build_decoder(loaded.config.data), image_size=loaded.config.data.size,
        downloads=build_downloads(loaded.config),
    )  # fmt: skip
    for count in config.labels_per_class:  # before any work: are there so many?
        choose_per_class(images.train.labels or (), count, seed=config.seed)
    contenders = open_contenders(loaded, config.against, pooling=config.pooling)
    split = whole_split(images.train, images.val, images.classes)
    found = []
    for contender in contenders:
        features = split_features(
            contender.encoder, split, contender.normalise, size=contender.size, pooling=config.pooling, device=device,
            bf16=has_bf16(device), workers=config.workers, teacher=contender.teacher,
        )  # fmt: skip
        if contender.kind == "run":
            damaged = damage_of_split(features, split, max_damaged=config.max_damaged)
            labels, truth = split.labels_of(features)
        train, val = (_finite(side.values, contender).to(device) for side in features)
        found.append(from_main(partial(_classify, contender, train, labels, val, truth, images, config)))
    rows = standings(contenders, [each.all_labels.logits for each in found], truth)
    ours = found[0].all_labels
    for contender, each in zip(contenders, found, strict=True):
        _warn_of_the_edge(contender, each.all_labels)
    confusions = count_confusions(ours.logits.argmax(dim=1).numpy(), truth.numpy(), len(images.classes))
    return LinearResult(
        top1=rows[0].top1,
        top1_interval=rows[0].top1_interval,
        top5=rows[0].top5,
        untrained_top1=rows[1].top1,
        num_train=len(labels),
        num_val=len(truth),
        num_classes=len(images.classes),
        damaged=damaged,
        mode=config.mode,
        pooling=config.pooling,
        chosen={contender.name: each.all_labels.chosen for contender, each in zip(contenders, found, strict=True)},
        held_out_top1=None if ours.held_out_top1 is None else {f"{key:g}": v for key, v in ours.held_out_top1.items()},
        standings=rows,
        few_labels=[item for each in found for item in each.few_labels],
        per_class=per_class_accuracy(confusions, images.classes),
        picture=_draw(confusions, images, config, rows[0].top1),
    )


def _finite(features: Float[Tensor, "n d"], contender: Contender) -> Float[Tensor, "n d"]:
    """The features.

    Raises:
        InputError: Some are not finite: the weights are damaged.
    """
    if not features.isfinite().all():
        raise InputError(f"{contender.name}: the encoder's features are not all finite; its weights are damaged")
    return features


def _classify(
    contender: Contender,
    train: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    val: Float[Tensor, "q d"],
    truth: Int[Tensor, " q"],
    images: LabelledImages,
    config: LinearConfig,
) -> _Classified:
    """Learn from all labels, and from few."""
    all_labels = _fit(train, labels, val, len(images.classes), config, seed=config.seed)
    names = [images.classes[label] for label in labels.tolist()]
    few = []
    for count in config.labels_per_class:
        accuracies = []
        for draw in tracked(range(config.draws), f"{contender.name}, {count} labels"):
            seed = config.seed + draw
            chosen = torch.tensor(choose_per_class(names, count, seed=seed))
            few_images = train[chosen.to(train.device)]
            fitted = _fit(few_images, labels[chosen], val, len(images.classes), config, seed=seed, bar=False)
            accuracies.append(top_k_accuracy(fitted.logits, truth, 1))
        deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else None
        few.append(
            FewLabels(count, contender.name, contender.kind, statistics.fmean(accuracies), deviation, accuracies)
        )
    return _Classified(all_labels, few)


def _fit(
    train: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    val: Float[Tensor, "q d"],
    num_classes: int,
    config: LinearConfig,
    *,
    seed: int,
    bar: bool = True,
) -> Probed:
    if config.mode == "logistic":
        return logistic(
            train, labels, val, num_classes=num_classes, inverse_penalties=config.inverse_penalties, seed=seed, bar=bar
        )
    return probe(
        train, labels.to(train.device), val, num_classes=num_classes, rates=config.learning_rates, epochs=config.epochs,
        batch_size=config.batch_size, seed=seed, bar=bar,
    )  # fmt: skip


def _warn_of_the_edge(contender: Contender, probed: Probed) -> None:
    """Say where the best setting is the last one that was tried, so that a better one may lie beyond."""
    tried = sorted(probed.held_out_top1 or ())
    if len(tried) > 1 and probed.chosen in (tried[0], tried[-1]) and is_main():
        side = "largest" if probed.chosen == tried[-1] else "smallest"
        warn(f"{contender.name}: {probed.chosen:g} was chosen, the {side} that was tried; a better one may lie beyond")


def _draw(confusions: Int[np.ndarray, "c c"], images: LabelledImages, config: LinearConfig, top1: float) -> str:
    """Save the confusion picture, and return where."""
    name = "linear" if config.mode == "sgd" else "logistic"
    folder = Path(config.out).expanduser() if config.out else RunFolder(config.checkpoint).evaluations
    if not is_main() or not (config.out or RunFolder(config.checkpoint).config_file.is_file()):
        return ""
    path = folder / f"{name}_confusion.png"
    title = f"{name} on frozen features: {top1:.1f} % of {confusions.sum():,} images"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: draw_confusions(confusions, images.classes, file, title=title))
    except OSError as error:
        warn(f"could not save the picture in {folder}: {error.strerror}")
        return ""
    return str(path)
