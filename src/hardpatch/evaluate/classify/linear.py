"""Linear classification of frozen features: what most papers quote, beside the untrained encoder.

The encoder runs over every image once. The classifiers then see features only
(:mod:`hardpatch.evaluate.classify.linear_classifiers`), so that a sweep over learning rates, few labels and several
encoders cost seconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hardpatch.config.evaluations import LinearConfig
from hardpatch.evaluate.classify.accuracy import (
    ClassAccuracy,
    Interval,
    classes_table,
    count_confusions,
    draw_confusions,
    per_class_accuracy,
    top_k_accuracy,
)
from hardpatch.evaluate.classify.labelled_images import LabelledImages, choose_per_class, open_labelled
from hardpatch.evaluate.classify.linear_classifiers import Probed, logistic, probe
from hardpatch.evaluate.contenders import (
    Contender,
    Kind,
    Standing,
    features_by_contender,
    open_contenders,
    open_run,
    standings,
    standings_table,
)
from hardpatch.evaluate.result import Result, visualize_command
from hardpatch.figures.sections import Picture, Section, Table, decimals
from hardpatch.runs.folder import RunFolder
from hardpatch.runtime.distributed import from_main, is_main
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import tracked, warn
from hardpatch.runtime.outputs import make_output_folder
from hardpatch.runtime.pictures import try_picture


class FewLabels(NamedTuple):
    """Accuracy of one encoder after learning from few labelled images; percent."""

    labels_per_class: int
    name: str
    """What the encoder is called."""
    kind: Kind
    top1: float
    """Mean over the draws."""
    deviation: float | None
    """Standard deviation over the draws; None of one."""
    draws: list[float]
    """Accuracy of every draw."""


@dataclass(frozen=True)
class LinearResult(Result):
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
    """This run's on the held-out training images, by learning rate or C; None where there was no choice."""
    standings: list[Standing]
    """This run, the same encoder untrained, and what it was to be held against."""
    few_labels: list[FewLabels]
    per_class: list[ClassAccuracy]
    """Class by class, for this run."""
    picture: str
    """What is taken for what; empty where no folder is known."""

    @property
    def name(self) -> str:
        """One for each way of learning, and others for features that are predicted losses."""
        name = "linear" if self.mode == "sgd" else "logistic"
        return f"{name}_hardness" if self.pooling == "hardness" else name

    def what_next(self, config: LinearConfig) -> list[str]:
        """See what is hard in these images."""
        return [visualize_command(config.checkpoint, config.val or config.train)]


def run(config: LinearConfig) -> LinearResult:
    """``hardpatch evaluate linear``: accuracy of a linear classifier on an encoder, and on it untrained.

    Under ``torchrun`` every process reads a part of the images; the first one trains the classifiers.

    Raises:
        InputError: A setting breaks a rule, no labels, classes that do not fit, too many damaged, or a bad checkpoint.
    """
    _check(config)
    with open_run(config.checkpoint, device=config.device) as loaded:
        images = open_labelled(config.train, config.val, loaded.config)
        for count in config.labels_per_class:  # before any work: are there so many?
            choose_per_class(images.train.labels or (), count, seed=config.seed)
        contenders = open_contenders(loaded, config.against, pooling=config.pooling)
        fitted: list[Probed] = []
        few_labels: list[FewLabels] = []
        for contender, features in features_by_contender(contenders, images, config, loaded.device):
            if contender.kind == "run":
                damaged = features.report_damage(images, max_damaged=config.max_damaged)
                labels, truth = features.labels(images)
            if not all(side.values.isfinite().all() for side in features):
                raise InputError(
                    f"{contender.name}: the encoder's features are not all finite; its weights are damaged"
                )
            train, val = (side.values.to(loaded.device) for side in features)
            everything, few = from_main(partial(_classify, contender, train, labels, val, truth, images, config))
            fitted.append(everything)
            few_labels += few
        for contender, found in zip(contenders, fitted, strict=True):
            _warn_of_the_edge(contender, found)
        rows, ours = standings(contenders, [found.logits for found in fitted], truth), fitted[0]
        confusions = count_confusions(ours.logits.argmax(dim=1).numpy(), truth.numpy(), len(images.classes))
        picture = _draw(confusions, images, config, rows[0].top1)
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
        chosen={contender.name: found.chosen for contender, found in zip(contenders, fitted, strict=True)},
        held_out_top1=None if ours.held_out_top1 is None else {f"{key:g}": v for key, v in ours.held_out_top1.items()},
        standings=rows,
        few_labels=few_labels,
        per_class=per_class_accuracy(confusions, images.classes),
        picture=picture,
    )


def describe(figures: dict[str, Any]) -> Section:
    """Every encoder beside this run, with all labels and with few, and this run class by class."""
    sgd = figures["mode"] == "sgd"
    chosen = ", ".join(f"{name} {value:g}" for name, value in figures["chosen"].items())
    tables = [standings_table(figures["standings"])]
    if few := figures["few_labels"]:
        names, counts = (list(dict.fromkeys(item[key] for item in few)) for key in ("name", "labels_per_class"))
        found = {(item["labels_per_class"], item["name"]): item for item in few}
        tables.append(Table(
            ("labels per class", *(f"{name}, top-1 %" for name in names)),
            [(str(count), *(_mean_and_spread(found[count, name]) for name in names)) for count in counts],
        ))  # fmt: skip
    title = "Linear probe" if sgd else "Logistic regression"
    return Section(title if figures["pooling"] != "hardness" else f"{title} on predicted losses", [
        *tables,
        classes_table(figures["per_class"]),
        ("The published probe: frozen encoder, BatchNorm without affine parameters, a linear layer, SGD. " if sgd else
         "scikit-learn's logistic regression on standardised features of the frozen encoder. ") +
        f"{figures['num_train']:,} images of {figures['num_classes']} classes, {figures['num_val']:,} images "
        f"classified; {'learning rate' if sgd else 'C'}: {chosen}" +
        ("" if figures["held_out_top1"] is None else " (chosen on a held-out tenth of train)"),
        *([Picture(figures["picture"], "what is taken for what")] if figures["picture"] else []),
    ])  # fmt: skip


def _mean_and_spread(item: dict[str, Any]) -> str:
    return decimals(item["top1"]) + ("" if item["deviation"] is None else f" ± {item['deviation']:.2f}")


def _check(config: LinearConfig) -> None:
    """Refuse settings that cannot work, before any work."""
    for field, values in (("learning_rates", config.learning_rates), ("inverse_penalties", config.inverse_penalties)):
        if len(set(values)) < len(values):
            raise InputError(f"{field}: must be different numbers, got {values}")
    if len(set(config.labels_per_class)) < len(config.labels_per_class):
        raise InputError(f"labels_per_class: must be different, got {config.labels_per_class}")
    field = "learning_rates" if config.mode == "sgd" else "inverse_penalties"
    if 1 in config.labels_per_class and len(getattr(config, field)) > 1:
        raise InputError(
            f"labels_per_class: 1 leaves no image of any class to choose among the {field} on; give one of these only"
        )


def _classify(
    contender: Contender,
    train: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    val: Float[Tensor, "q d"],
    truth: Int[Tensor, " q"],
    images: LabelledImages,
    config: LinearConfig,
) -> tuple[Probed, list[FewLabels]]:
    """Learn from all labels, and from few."""
    fit = _method(config, len(images.classes))
    all_labels = fit(train, labels.to(train.device), val, seed=config.seed)
    names = [images.classes[label] for label in labels.tolist()]
    few = []
    for count in config.labels_per_class:
        accuracies = []
        for draw in tracked(range(config.draws), f"{contender.name}, {count} labels"):
            seed = config.seed + draw
            chosen = torch.tensor(choose_per_class(names, count, seed=seed)).to(train.device)
            fitted = fit(train[chosen], labels.to(train.device)[chosen], val, seed=seed, bar=False)
            accuracies.append(top_k_accuracy(fitted.logits, truth, 1))
        deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else None
        few.append(
            FewLabels(count, contender.name, contender.kind, statistics.fmean(accuracies), deviation, accuracies)
        )
    return all_labels, few


def _method(config: LinearConfig, num_classes: int) -> Callable[..., Probed]:
    """What learns on features and labels, and scores others."""
    if config.mode == "logistic":
        return partial(logistic, num_classes=num_classes, inverse_penalties=config.inverse_penalties)
    return partial(
        probe, num_classes=num_classes, rates=config.learning_rates, epochs=config.epochs, batch_size=config.batch_size
    )


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
    if config.out:
        with suppress(OSError):  # said with the picture
            make_output_folder(folder)
    made = try_picture(lambda: draw_confusions(confusions, images.classes, title=title), path, dpi=130)
    return str(path) if made else ""
