"""What an evaluation can be told: kept apart from what it does, so that ``--help`` need not import it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from hardpatch.config.dense_evaluations import DetectConfig, EvaluationConfig, SegmentConfig
from hardpatch.config.fields import (
    NotNegative,
    NotNegativeFloat,
    OpenShare,
    Positive,
    PositiveFloat,
    Seed,
    Share,
    ShareAboveZero,
    ShareBelowOne,
)

Pooling = Literal["class", "mean", "both", "hardness"]
"""The class token, the mean of the patch tokens, or both side by side, each of length one."""


@dataclass(frozen=True)
class KnnConfig(EvaluationConfig):
    """k-nearest-neighbour evaluation."""

    train: str
    """Labelled images to look for neighbours among."""
    val: str = ""
    """Labelled images to classify; none: a fifth of every class of train, held back."""
    k: Annotated[tuple[Positive, ...], Field(min_length=1)] = (10, 20, 100, 200)
    """Numbers of neighbours; top1 is quoted for the first."""
    temperature: PositiveFloat = 0.07
    """Weight of a neighbour: exp(cosine similarity / temperature)."""
    pooling: Pooling = "mean"
    """Feature of an image: class token, mean of the patch tokens, or both; hardness: no feature of the encoder, but the
    teacher's predicted loss of every patch, standardised within the image."""
    workers: NotNegative = 0
    """Data processes."""


@dataclass(frozen=True)
class LinearConfig(EvaluationConfig):
    """Linear classification of frozen features: the published probe, or logistic regression."""

    train: str
    """Labelled images to learn from."""
    val: str = ""
    """Labelled images to classify; they decide nothing. None: a fifth of every class of train, held back."""
    mode: Literal["sgd", "logistic"] = "sgd"
    """sgd: the published probe (BatchNorm, linear layer, SGD); logistic: scikit-learn's, on standardised features."""
    learning_rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    """Learning rates of sgd, for batches of 256; a held-out tenth of the training images chooses among them."""
    inverse_penalties: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    """Inverse penalties of logistic, scikit-learn's C; chosen in the same way."""
    epochs: Positive = 90
    """Passes of sgd over the training images."""
    batch_size: Annotated[int, Field(ge=2)] = 256
    """Images per step of sgd; all where there are fewer."""
    pooling: Pooling = "mean"
    """Feature of an image: class token, mean of the patch tokens, or both; hardness: no feature of the encoder, but the
    teacher's predicted loss of every patch, standardised within the image."""
    labels_per_class: tuple[Positive, ...] = ()
    """Also learn from so few labelled images of every class, e.g. 5 10 50."""
    draws: Positive = 5
    """Random choices of those few images; quoted are mean and standard deviation."""
    out: str = ""
    """Folder for the confusion picture and the figures; none: RUN/evaluate."""
    seed: Seed = 0
    """Decides what is held out, the few labels, the start and the order."""
    workers: NotNegative = 0
    """Data processes."""


@dataclass(frozen=True)
class ForegroundConfig(EvaluationConfig):
    """Foreground evaluation."""

    images: str
    """Images; shapes:N brings its own masks."""
    masks: str = ""
    """Folder of masks, one per image with the same name up to the ending; bright = foreground."""
    boxes: str = ""
    """Instead of masks: table.csv (path, xmin, ymin, xmax, ymax) or .npy (n, 4); images without a box do not count."""
    untrained: bool = True
    """Measure the same with the model's own random start."""


@dataclass(frozen=True)
class FinetuneConfig(EvaluationConfig):
    """Fine-tuning: the whole encoder learns to classify. Defaults are the published recipe; where it stands "none:
    adapted", small data and images get a value by a written rule (docs/evaluate.md), and the published size the
    published value."""

    train: str
    """Labelled images to learn from."""
    val: str = ""
    """Labelled images to be measured on; nothing is chosen by them: the last epoch counts. None: a fifth of every class
    of train, held back."""
    out: str = ""
    """Folder for checkpoints, metrics and the classifier; none: finetune/ in the run folder."""
    labels_per_class: Positive | None = None
    """Learn from so many images of every class, drawn by the seed; none: all."""
    untrained: bool = False
    """The same from the untrained encoder as well (in untrained/ of the folder). Doubles the cost."""
    resume: Literal["auto", "restart"] = "auto"
    """auto goes on with an unfinished run in the folder; restart begins anew."""

    epochs: Positive | None = None
    """Passes over the training images; none: 100, or 50 for encoders at least as wide as ViT-L (published)."""
    batch_size: Annotated[int, Field(ge=2)] | None = None
    """Images per step over all processes; none: adapted, published 1,024."""
    micro_batch_size: Positive | None = None
    """Images per process and forward pass; gradients are accumulated up to batch_size. None: all at once. Images are
    mixed within a micro-batch."""
    base_learning_rate: PositiveFloat | None = None
    """Peak learning rate of the last layer per 256 images of batch; none: adapted, published 5e-4 (at batch 1,024)."""
    min_learning_rate: NotNegativeFloat = 1e-6
    """Learning rate of the last layer at the end of the cosine."""
    layer_decay: ShareAboveZero = 0.8
    """Each layer below learns slower by this factor."""
    warmup_epochs: NotNegativeFloat | None = None
    """Linear warm-up, epochs; none: 5, at most a tenth of the run."""
    weight_decay: NotNegativeFloat = 0.05
    """AdamW's weight decay, not on biases, one-dimensional tensors, positions and class token."""
    betas: tuple[OpenShare, OpenShare] = (0.9, 0.999)
    """AdamW's betas."""
    gradient_clip: PositiveFloat | None = None
    """Clip the global gradient norm; none: do not."""

    crop_scale: tuple[Share, Share] | None = None
    """Area of the random resized crop, share of the image; none: adapted, published 0.08 1."""
    flip: bool | None = None
    """Mirror half of the images; none: as in pre-training."""
    rand_augment: str | None = None
    """timm's RandAugment; none: rand-m9-mstd0.5-inc1 for 3 channels of 8 bits, and nothing for others, which it
    cannot handle. An empty string switches it off."""
    erasing: Share = 0.25
    """Share of the images in which a rectangle becomes noise."""
    mixup: NotNegativeFloat = 0.8
    """Mixup's alpha; 0: off."""
    cutmix: NotNegativeFloat = 1.0
    """CutMix's alpha; 0: off. With both on, each batch gets one of them."""
    mixed_share: Share | None = None
    """Share of the batches that get mixup or CutMix; none: adapted to the number of epochs, published 1."""
    label_smoothing: ShareBelowOne = 0.1
    """Share of the target spread over all classes."""
    drop_path: ShareBelowOne = 0.1
    """Stochastic depth of the last block; earlier ones less, in proportion."""
    seed: Seed = 0
    """Seed of head, order, augmentation, mixing, and of the images that labels_per_class draws."""

    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Autocast precision; auto: bf16 where the hardware has it."""
    workers: NotNegative | None = None
    """Data processes per training process; none: 1 per core beyond the first, at most 8."""
    val_epochs: Positive = 1
    """Epochs between two looks at the validation images; after the last there always is one."""
    checkpoint_minutes: NotNegativeFloat = 2.0
    """Save at least this often, minutes; 0: after every step."""


class Evaluation(NamedTuple):
    """One evaluation: ``hardpatch evaluate NAME``."""

    config: type[Any]
    """A dataclass of what it can be told."""
    module: str
    """The module, with ``run(config)`` and ``describe(figures)``, see :mod:`hardpatch.evaluate.result`."""
    about: str
    """One line for the list of commands."""
    kept_as: tuple[str, ...] = ()
    """Names of the files of its figures, where it has others than its own name."""


EVALUATIONS: dict[str, Evaluation] = {
    "knn": Evaluation(
        KnnConfig,
        "hardpatch.evaluate.classify.knn",
        "accuracy of the k nearest neighbours, beside the untrained encoder",
        kept_as=("knn", "knn_hardness"),
    ),
    "linear": Evaluation(
        LinearConfig,
        "hardpatch.evaluate.classify.linear",
        "linear probe or logistic regression on frozen features, also with few labels",
        kept_as=("linear", "logistic", "linear_hardness", "logistic_hardness"),
    ),
    "finetune": Evaluation(
        FinetuneConfig,
        "hardpatch.evaluate.classify.finetune",
        "accuracy of the encoder trained on labels, by the published recipe",
    ),
    "foreground": Evaluation(
        ForegroundConfig,
        "hardpatch.evaluate.foreground",
        "how well the predicted loss finds objects, beside simple measures",
    ),
    "segment": Evaluation(
        SegmentConfig,
        "hardpatch.evaluate.dense.segment",
        "semantic segmentation: mean IoU of a head on the encoder's feature maps",
    ),
    "detect": Evaluation(
        DetectConfig,
        "hardpatch.evaluate.dense.detect",
        "detection and instance masks: COCO AP of Mask R-CNN on the encoder",
    ),
}
"""Every evaluation by name, in the order of the list of commands and of the report."""
