"""k-nearest-neighbour classification of frozen features: the published weights and temperature (0.07), done right.

Features come from ordered, unaugmented images, so that every feature meets its own label; neighbours are exact; the
same protocol on the untrained encoder stands beside every result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from hpm.build import build_normalise, build_student, choose_attention
from hpm.config import Config
from hpm.data.loading import Normalise
from hpm.data.sources import Source, class_indices, open_source
from hpm.distributed import choose_device, has_bf16, process_group
from hpm.errors import InputError
from hpm.evaluate.accuracy import top_k_accuracy
from hpm.evaluate.config import KnnConfig, Pooling
from hpm.evaluate.features import Features, check_max_damaged, extract_features, report_damage
from hpm.run_folder import LoadedRun


@dataclass(frozen=True)
class KnnResult:
    """Accuracies in percent."""

    top1: float
    top5: float
    untrained_top1: float
    k: int
    """The neighbours behind top1: the first k of the config, not the best."""
    top1_by_k: dict[int, float]
    num_train: int
    """Neighbours: training images without the damaged ones."""
    num_val: int
    """Images classified: validation images without the damaged ones."""
    damaged: int
    """Images left out, of both."""


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
        bank: Features to look among; need not be normalised.
        labels: Their classes.
        queries: Features to classify.
        k: Neighbours; at most n.
        temperature: Weight of a neighbour is exp(cosine / temperature).
        num_classes: C.
        chunk: Queries per matrix product, bounding memory at chunk × n.
    """
    bank, votes = F.normalize(bank, dim=1), []
    for part in F.normalize(queries, dim=1).split(chunk):
        similarity, nearest = (part @ bank.T).topk(k, dim=1)
        # The largest weight is set to 1 before exponentiating: the same votes up to a factor, without overflow.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes.append(torch.zeros(len(part), num_classes).scatter_add_(1, labels[nearest], weight))
    return torch.cat(votes)


@dataclass(frozen=True)
class LabelledSplit:
    """Which labelled images are looked among, and which are classified."""

    train: Source
    val: Source
    train_indices: list[int]
    val_indices: list[int]
    classes: list[str]

    def labels_of(self, features: SplitFeatures) -> tuple[Int[Tensor, " n"], Int[Tensor, " q"]]:
        """Classes of the images that have features, as positions in ``classes``: of training, of validation."""
        train, val = (
            torch.from_numpy(class_indices([(source.labels or ())[i] for i in side.indices], self.classes))
            for side, source in ((features.train, self.train), (features.val, self.val))
        )
        return train, val


class SplitFeatures(NamedTuple):
    """Features of both sides of a split."""

    train: Features
    val: Features


def split_features(
    vit: VisionTransformer,
    split: LabelledSplit,
    normalise: Normalise,
    *,
    size: tuple[int, int],
    pooling: Pooling,
    device: torch.device,
    bf16: bool,
    workers: int = 0,
) -> SplitFeatures:
    """Features of the images that are looked among and of those that are classified."""
    return SplitFeatures(*(
        extract_features(
            vit, source, normalise, size=size, pooling=pooling, device=device, bf16=bf16,
            indices=indices, workers=workers, description=name,
        )
        for name, source, indices in (
            ("neighbours", split.train, split.train_indices),
            ("queries", split.val, split.val_indices),
        )
    ))  # fmt: skip


def accuracy_of_features(
    features: SplitFeatures, split: LabelledSplit, *, ks: tuple[int, ...], temperature: float
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 accuracy for every k, in percent.

    Raises:
        InputError: A k is larger than the number of readable training images.
    """
    bank, queries = features.train.values, features.val.values
    bank_labels, truth = split.labels_of(features)
    accuracies = {}
    for k in sorted(set(ks)):
        if k > len(bank):
            raise InputError(f"k: must be at most the number of training images ({len(bank)}), got {k}")
        votes = knn_votes(
            bank,
            bank_labels,
            queries,
            k=k,
            temperature=temperature,
            num_classes=len(split.classes),
        )
        accuracies[k] = (top_k_accuracy(votes, truth, 1), top_k_accuracy(votes, truth, 5))
    return accuracies


def knn_accuracy(
    vit: VisionTransformer,
    split: LabelledSplit,
    normalise: Normalise,
    *,
    size: tuple[int, int],
    ks: tuple[int, ...],
    temperature: float,
    pooling: Pooling,
    device: torch.device,
    bf16: bool,
    workers: int = 0,
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 accuracy of an encoder for every k, in percent."""
    features = split_features(
        vit, split, normalise, size=size, pooling=pooling, device=device, bf16=bf16, workers=workers
    )
    return accuracy_of_features(features, split, ks=ks, temperature=temperature)


def run(config: KnnConfig) -> KnnResult:
    """``hpm evaluate knn``: accuracy of a run's encoder and of the same encoder untrained.

    Under ``torchrun`` every process reads a part of the images, and all return the same result.

    Raises:
        InputError: No labels, classes that do not fit, too few images for k, too many damaged, or a bad checkpoint.
    """
    device = choose_device(config.device)
    with process_group(device):
        return _run(config, device)


def _run(config: KnnConfig, device: torch.device) -> KnnResult:
    check_max_damaged(config.max_damaged)
    loaded = LoadedRun(config.checkpoint, device=device)
    data = loaded.config.data
    sources = []
    for name, spec in (("train", config.train), ("val", config.val)):
        source = open_source(spec, channels=data.channels, image_size=data.size, field=name)
        if source.labels is None:
            raise InputError(f"{name}: {spec!r} has no labels (sub-folders, a column 'label', or .cls files)")
        sources.append(source)
    train, val = sources
    classes = sorted(set(train.labels or ()))
    class_indices(val.labels or [], classes)  # before any work: are all validation classes known?
    if not config.k or not all(1 <= k <= len(train) for k in config.k):
        raise InputError(f"k: must be between 1 and the number of training images ({len(train)}), got {config.k}")
    if config.temperature <= 0:
        raise InputError(f"temperature: must be above 0, got {config.temperature}")
    if config.pooling != "mean" and not loaded.student.encoder.has_class_token:
        raise InputError(f"pooling: {config.pooling!r} needs a class token, and this encoder has none; use mean")
    split = LabelledSplit(train, val, list(range(len(train))), list(range(len(val))), classes)

    def features_of(encoder: VisionTransformer) -> SplitFeatures:
        choose_attention(encoder, device)
        return split_features(
            encoder, split, build_normalise(loaded.config).to(device), size=data.size, pooling=config.pooling,
            device=device, bf16=has_bf16(device), workers=config.workers,
        )  # fmt: skip

    def accuracy(features: SplitFeatures) -> dict[int, tuple[float, float]]:
        return accuracy_of_features(features, split, ks=config.k, temperature=config.temperature)

    features = features_of(loaded.student.encoder)
    damaged = report_damage(
        {"train": (features.train.damaged, len(train)), "val": (features.val.damaged, len(val))},
        max_damaged=config.max_damaged,
    )
    num_train, num_val = len(features.train.indices), len(features.val.indices)
    trained = accuracy(features)
    untrained = accuracy(features_of(untrained_encoder(loaded.config, device)))
    k = config.k[0]
    return KnnResult(
        top1=trained[k][0],
        top5=trained[k][1],
        untrained_top1=untrained[k][0],
        k=k,
        top1_by_k={key: value[0] for key, value in trained.items()},
        num_train=num_train,
        num_val=num_val,
        damaged=damaged,
    )


def untrained_encoder(config: Config, device: torch.device) -> VisionTransformer:
    """The run's encoder at its own seeded initialisation."""
    encoder = build_student(config, target_dim=1).encoder  # drawn before the head: any width gives the same
    return encoder.to(device).eval()
