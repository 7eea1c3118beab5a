"""k-nearest-neighbour classification of frozen features: the published weights and temperature (0.07), done right.

Features come from ordered, unaugmented images, so that every feature meets its own label; neighbours are exact; the
same protocol on the untrained encoder stands beside every result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hardpatch.config.evaluations import KnnConfig
from hardpatch.evaluate.classify.accuracy import top_k_accuracy
from hardpatch.evaluate.classify.labelled_images import LabelledImages, open_labelled
from hardpatch.evaluate.contenders import (
    Standing,
    features_by_contender,
    open_contenders,
    open_run,
    standings,
    standings_table,
)
from hardpatch.evaluate.features import SplitFeatures
from hardpatch.evaluate.result import Result, visualize_command
from hardpatch.figures.sections import Section, Table, decimals
from hardpatch.runtime.errors import InputError


@dataclass(frozen=True)
class KnnResult(Result):
    """Accuracies in percent."""

    top1: float
    top5: float
    untrained_top1: float
    pooling: str
    """What features are made of; ``hardness``: of predicted losses alone."""
    k: int
    """The neighbours behind top1: the first k of the config, not the best."""
    top1_by_k: dict[int, float]
    num_train: int
    """Neighbours: training images without the damaged ones."""
    num_val: int
    """Images classified: validation images without the damaged ones."""
    damaged: int
    """Images left out, of both."""
    standings: list[Standing]
    """At k: this run, the same encoder untrained, and what it was to be held against."""

    @property
    def name(self) -> str:
        """Neighbours by predicted loss are no measure of the features: beside the others, not in their place."""
        return "knn_hardness" if self.pooling == "hardness" else "knn"

    def what_next(self, config: KnnConfig) -> list[str]:
        """See what is hard in these images."""
        return [visualize_command(config.checkpoint, config.val or config.train)]


def knn_votes(
    bank: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    queries: Float[Tensor, "q d"],
    *,
    k: int,
    temperature: float,
    num_classes: int,
    chunk: int = 1024,
) -> Float[Tensor, "q c"]:
    """Summed weights of the k nearest neighbours of each class.

    Args:
        k: Neighbours; at most n.
        temperature: Weight of a neighbour is exp(cosine / temperature).
        chunk: Queries per matrix product, bounding memory at chunk × n.
    """
    bank, votes = F.normalize(bank, dim=1), []
    for part in F.normalize(queries, dim=1).split(chunk):
        similarity, nearest = (part @ bank.T).topk(k, dim=1)
        # The largest weight is set to 1 before exponentiating: the same votes up to a factor, without overflow.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes.append(torch.zeros(len(part), num_classes).scatter_add_(1, labels[nearest], weight))
    return torch.cat(votes)


def knn_scores(
    features: SplitFeatures, images: LabelledImages, *, ks: tuple[int, ...], temperature: float = 0.07
) -> dict[int, Float[Tensor, "q c"]]:
    """What the neighbours say about every validation image, for every k.

    Raises:
        InputError: A k is larger than the number of readable training images.
    """
    bank, queries = features.train.values, features.val.values
    labels, _ = features.labels(images)
    if max(ks) > len(bank):
        raise InputError(f"k: must be at most the number of training images ({len(bank)}), got {max(ks)}")
    return {
        k: knn_votes(bank, labels, queries, k=k, temperature=temperature, num_classes=len(images.classes))
        for k in sorted(set(ks))
    }


def knn_top1(features: SplitFeatures, images: LabelledImages, *, k: int) -> float:
    """Accuracy by the k nearest neighbours, in percent.

    Raises:
        InputError: k is larger than the number of readable training images.
    """
    return 100 * float(knn_right(features, images, k=k).double().mean())


def knn_right(features: SplitFeatures, images: LabelledImages, *, k: int) -> Bool[Tensor, " q"]:
    """Which images the k nearest neighbours classify rightly.

    Raises:
        InputError: k is larger than the number of readable training images.
    """
    scores, labels = knn_scores(features, images, ks=(k,))[k], features.labels(images)[1]
    return scores.topk(1, dim=1).indices[:, 0] == labels


def run(config: KnnConfig) -> KnnResult:
    """``hardpatch evaluate knn``: accuracy of a run's encoder and of the same encoder untrained.

    Under ``torchrun`` every process reads a part of the images, and all return the same result.

    Raises:
        InputError: No labels, classes that do not fit, too few images for k, too many damaged, or a bad checkpoint.
    """
    with open_run(config.checkpoint, device=config.device) as loaded:
        images = open_labelled(config.train, config.val, loaded.config)
        if max(config.k) > len(images.train):
            raise InputError(f"k: must be at most the number of training images ({len(images.train)}), got {config.k}")
        contenders = open_contenders(loaded, config.against, pooling=config.pooling)
        found = []
        for contender, features in features_by_contender(contenders, images, config, loaded.device):
            if contender.kind == "run":
                damaged = features.report_damage(images, max_damaged=config.max_damaged)
                labels, truth = features.labels(images)
            found.append(knn_scores(features, images, ks=config.k, temperature=config.temperature))
    k = config.k[0]
    rows = standings(contenders, [scores[k] for scores in found], truth)
    return KnnResult(
        top1=rows[0].top1,
        top5=rows[0].top5,
        untrained_top1=rows[1].top1,
        pooling=config.pooling,
        k=k,
        top1_by_k={key: top_k_accuracy(scores, truth, 1) for key, scores in found[0].items()},
        num_train=len(labels),
        num_val=len(truth),
        damaged=damaged,
        standings=rows,
    )


def describe(figures: dict[str, Any]) -> Section:
    """Accuracy for every k, and every encoder beside this run."""
    k, title = figures["k"], "k nearest neighbours"
    return Section(title if figures["pooling"] != "hardness" else f"{title} by predicted loss", [
        Table(("k", "top-1 %"), [(str(key), decimals(value)) for key, value in figures["top1_by_k"].items()]),
        f"k = {k}: top-1 {figures['top1']:.2f} %, top-5 {figures['top5']:.2f} %; the same encoder untrained "
        f"{figures['untrained_top1']:.2f} %   ({figures['num_train']:,} neighbours, {figures['num_val']:,} images "
        "classified)",
        standings_table(figures.get("standings", [])),
    ])  # fmt: skip
