"""k-nearest-neighbour classification of frozen features: the published weights and temperature (0.07), done right.

Features come from ordered, unaugmented images, so that every feature meets its own label; neighbours are exact; the
same protocol on the untrained encoder stands beside every result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from hpm.build import build_normalise, build_student, choose_attention
from hpm.config import Config
from hpm.data.loading import Normalise
from hpm.data.sources import Source, class_indices, open_source
from hpm.distributed import choose_device, has_bf16
from hpm.errors import InputError
from hpm.evaluate.features import Pooling, extract_features
from hpm.run_folder import LoadedRun


@dataclass(frozen=True)
class KnnConfig:
    """k-nearest-neighbour evaluation."""

    checkpoint: str
    """Run folder or checkpoint file."""
    train: str
    """Labelled images to look for neighbours among."""
    val: str
    """Labelled images to classify."""
    k: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours; top1 is quoted for the first."""
    temperature: float = 0.07
    """Weight of a neighbour: exp(cosine similarity / temperature)."""
    pooling: Pooling = "mean"
    """Feature of an image: class token, mean of the patch tokens, or both."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to run."""
    workers: int = 0
    """Data processes."""


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
    num_val: int


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


def top_k_accuracy(votes: Float[Tensor, "q c"], labels: Int[Tensor, " q"], k: int) -> float:
    """Share of queries, in percent, whose class is among the k of most votes."""
    best = votes.topk(min(k, votes.shape[1]), dim=1).indices
    return float((best == labels.unsqueeze(1)).any(dim=1).double().mean() * 100)


@dataclass(frozen=True)
class LabelledSplit:
    """Which labelled images are looked among, and which are classified."""

    train: Source
    val: Source
    train_indices: list[int]
    val_indices: list[int]
    classes: list[str]


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
    """Top-1 and top-5 accuracy for every k, in percent."""
    sides = []
    for name, source, indices in (
        ("neighbours", split.train, split.train_indices),
        ("queries", split.val, split.val_indices),
    ):
        features = extract_features(
            vit, source, normalise, size=size, pooling=pooling, device=device, bf16=bf16,
            indices=indices, workers=workers, description=name,
        )  # fmt: skip
        labels = source.labels or []
        sides.append((features.values, class_indices([labels[i] for i in features.indices], split.classes)))
    (bank, bank_labels), (queries, query_labels) = sides
    accuracies = {}
    for k in sorted(set(ks)):
        if k > len(bank):
            raise InputError(f"k: must be at most the number of training images ({len(bank)}), got {k}")
        votes = knn_votes(
            bank,
            torch.from_numpy(bank_labels),
            queries,
            k=k,
            temperature=temperature,
            num_classes=len(split.classes),
        )
        truth = torch.from_numpy(query_labels)
        accuracies[k] = (top_k_accuracy(votes, truth, 1), top_k_accuracy(votes, truth, 5))
    return accuracies


def run(config: KnnConfig) -> KnnResult:
    """``hpm evaluate knn``: accuracy of a run's encoder and of the same encoder untrained.

    Raises:
        InputError: No labels, classes that do not fit, too few images for k, or a bad checkpoint.
    """
    device = choose_device(config.device)
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
    results = []
    for encoder in (loaded.student.encoder, untrained_encoder(loaded.config, device)):
        choose_attention(encoder, device)
        results.append(
            knn_accuracy(
                encoder,
                split,
                build_normalise(loaded.config).to(device),
                size=data.size,
                ks=config.k,
                temperature=config.temperature,
                pooling=config.pooling,
                device=device,
                bf16=has_bf16(device),
                workers=config.workers,
            )
        )
    trained, untrained = results
    k = config.k[0]
    return KnnResult(
        top1=trained[k][0],
        top5=trained[k][1],
        untrained_top1=untrained[k][0],
        k=k,
        top1_by_k={key: value[0] for key, value in trained.items()},
        num_train=len(train),
        num_val=len(val),
    )


def untrained_encoder(config: Config, device: torch.device) -> VisionTransformer:
    """The run's encoder at its own seeded initialisation."""
    encoder = build_student(config, target_dim=1).encoder  # drawn before the head: any width gives the same
    return encoder.to(device).eval()
