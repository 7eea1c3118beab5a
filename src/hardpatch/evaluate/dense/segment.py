"""Semantic segmentation: a head on a run's encoder, beside the same head on the untrained encoder.

    images -> crops -> encoder (frozen or not) -> maps at several depths -> head -> logits -> cross entropy

Held-back images are looked at in sliding windows; figures count every pixel of every image at its own size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hardpatch.config.config import Config
from hardpatch.config.dense_evaluations import SegmentConfig
from hardpatch.evaluate.contenders import Contender, folder_name, open_contenders
from hardpatch.evaluate.dense.class_masks import IGNORED
from hardpatch.evaluate.dense.comparison import (
    Task,
    check_training,
    identity,
    make_plan,
    mean_values,
    output_folder,
    train,
)
from hardpatch.evaluate.dense.feature_maps import Bf16, DenseEncoder, check_size, choose_depths, parameter_groups
from hardpatch.evaluate.dense.overlays import Segmented, draw_segmentations
from hardpatch.evaluate.dense.segment_crops import FeatureCache, SegmentationCrops, resize, stack_pairs, working_size
from hardpatch.evaluate.dense.segment_data import Data, open_data
from hardpatch.evaluate.dense.segment_heads import LinearHead, Segmenter, UperNetHead, enlarge, pixel_loss
from hardpatch.evaluate.dense.windows import most_likely, slide
from hardpatch.evaluate.features import check_max_damaged
from hardpatch.figures.display import build_display
from hardpatch.figures.hardness import save_figure
from hardpatch.runs.build import build_decoder
from hardpatch.runs.load import LoadedRun
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.extras import install
from hardpatch.runtime.log import tracked
from hardpatch.runtime.seeding import Stream, derive_seed


class ClassFigures(NamedTuple):
    """How well one class is found, in percent; None where it does not occur in the validation images."""

    name: str
    iou: float | None
    untrained_iou: float | None
    pixels: int
    """Of the class in the validation masks."""


@dataclass(frozen=True)
class SegmentResult:
    """Figures in percent."""

    miou: float
    """Mean over the classes that occur in the validation masks or are predicted there."""
    pixel_accuracy: float
    untrained_miou: float | None
    """The same head on the encoder's random start; None where it was not asked for."""
    untrained_pixel_accuracy: float | None
    against: dict[str, float]
    """Mean IoU of the same head on the encoders that were named."""
    per_class: list[ClassFigures]
    head: str
    finetuned: bool
    num_train: int
    num_val: int
    damaged: int
    """Images left out, of both."""
    steps: int
    figure: str | None
    """Pictures of some validation images."""


class Scores(NamedTuple):
    """What a confusion matrix says, as shares."""

    miou: float
    pixel_accuracy: float
    iou: list[float | None]


def scores_of(confusion: Int64[Tensor, "k k"]) -> Scores:
    """Intersection over union of every class, their mean, and the share of right pixels.

    A class that neither occurs nor is predicted has no IoU and is left out of the mean.

    Args:
        confusion: Pixels by true (row) and predicted (column) class.
    """
    counts = confusion.double()
    right, union = counts.diag(), counts.sum(0) + counts.sum(1) - counts.diag()
    iou = [float(r / u) if u > 0 else None for r, u in zip(right, union)]
    known = [value for value in iou if value is not None]
    return Scores(sum(known) / max(1, len(known)), float(right.sum() / counts.sum().clamp(min=1)), iou)


def run(config: SegmentConfig) -> SegmentResult:
    """``hardpatch evaluate segment``.

    Raises:
        InputError: A mask is missing, damaged or of another size; a class out of range or missing in the training
            masks; values that do not fit; too many damaged images; a bad checkpoint.
        Interrupted: A signal arrived while training; the same call goes on from there.
    """
    device = distributed.choose_device(config.device)
    with distributed.process_group(device):
        return _run(config, device)


def _run(config: SegmentConfig, device: torch.device) -> SegmentResult:
    _check(config)
    loaded = LoadedRun(config.checkpoint, device=device)
    contenders = open_contenders(loaded, config.against, untrained=config.untrained)
    crop = config.crop_size or loaded.config.data.size
    for contender in contenders:
        check_size(crop, contender.encoder, field="crop_size")
        choose_depths(config.depths, len(contender.encoder.blocks))
    folder = output_folder(config, _name(config))
    data = open_data(config, decoder=build_decoder(loaded.config.data), size=loaded.config.data.size)
    bench = Bench(config, data, crop, folder, device)
    measured = [bench.measure(contender) for contender in contenders]
    scores, confusion = measured[0].scores, measured[0].confusion
    untrained = next((found for found in measured if found.contender.kind == "untrained"), None)
    figure = bench.draw(measured, folder / "segmentations.png", loaded.config) if config.num_pictures else None
    others = untrained.scores.iou if untrained else [None] * len(data.names)
    return SegmentResult(
        miou=100 * scores.miou,
        pixel_accuracy=100 * scores.pixel_accuracy,
        untrained_miou=100 * untrained.scores.miou if untrained else None,
        untrained_pixel_accuracy=100 * untrained.scores.pixel_accuracy if untrained else None,
        against={m.contender.name: 100 * m.scores.miou for m in measured if m.contender.kind == "against"},
        per_class=[
            ClassFigures(name, _percent(own), _percent(other), int(pixels))
            for name, own, other, pixels in zip(data.names, scores.iou, others, confusion.sum(1))
        ],
        head=config.head,
        finetuned=config.finetune,
        num_train=len(data.train),
        num_val=len(data.val),
        damaged=data.damaged,
        steps=measured[0].steps,
        figure=str(figure.absolute()) if figure else None,
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _name(config: SegmentConfig) -> str:
    return f"segment-{config.head}" + ("-finetuned" if config.finetune else "")


def _check(config: SegmentConfig) -> None:
    """Refuse values that do not fit together, before any work.

    Raises:
        InputError: One of them.
    """
    try:
        import torchmetrics  # noqa: F401
    except ImportError:
        raise InputError(f"segment: needs torchmetrics; {install('dense')}") from None
    check_training(config)
    check_max_damaged(config.max_damaged)
    if config.finetune and config.head == "linear":
        raise InputError("finetune: the linear head measures a frozen encoder; choose --head upernet")
    if config.cache and (config.finetune or config.head != "linear"):
        raise InputError("cache: keeps features of a frozen encoder for the linear head; leave it away")
    if config.head == "upernet" and config.batch_size // distributed.world_size() < 2:
        raise InputError(f"batch_size: upernet needs at least 2 images per process, got {config.batch_size}")
    if not 0 < config.scale[0] <= config.scale[1]:
        raise InputError(f"scale: must be a range above 0, got {config.scale}")
    if not 0 <= config.window_overlap < 1:
        raise InputError(f"window_overlap: must be at least 0 and below 1, got {config.window_overlap}")
    if config.short_side is not None and config.short_side < 0:
        raise InputError(f"short_side: must be at least 0, got {config.short_side}")
    if config.num_classes is not None and config.num_classes < 2:
        raise InputError(f"num_classes: must be at least 2, got {config.num_classes}")
    if config.binary and config.reduce_zero_label:
        raise InputError("reduce_zero_label: binary masks have no such label")


class Measured(NamedTuple):
    """A trained model and what it is worth."""

    contender: Contender
    model: Segmenter
    scores: Scores
    confusion: Int64[Tensor, "k k"]
    steps: int


class Bench:
    """The same training and the same look at held-back images, for one encoder after the other.

    Args:
        config: How.
        data: The images.
        crop: Height and width of crops and windows.
        folder: For checkpoints.
        device: Where to run.
    """

    def __init__(
        self,
        config: SegmentConfig,
        data: Data,
        crop: tuple[int, int],
        folder: Path,
        device: torch.device,
    ) -> None:
        self.config = config
        self.data = data
        self.crop = crop
        self.folder = folder
        self.device = device
        self.short_side = min(crop) if config.short_side is None else config.short_side
        self.plan = make_plan(config, epochs=config.epochs, num_images=len(data.train), trained=config.finetune)

    def measure(self, contender: Contender) -> Measured:
        """Train a head on an encoder and look at the validation images."""
        config, name = self.config, contender.name
        model = self._build(contender.encoder)
        make_task = self._cached_task if config.cache else self._task
        task = make_task(model, contender)
        plan = self.plan if not config.cache else make_plan(
            config, epochs=config.epochs, num_images=task.num_images, trained=False
        )  # fmt: skip
        decisive = {key: value for key, value in asdict(config).items() if key not in _INDIFFERENT}
        train(
            task, plan, device=self.device, checkpoints=self.folder / folder_name(name),
            identity=identity(
                decisive | {"images": [self.data.train.name(i) for i in range(len(self.data.train))],
                            "processes": distributed.world_size()},
                model,
            ),
        )  # fmt: skip
        confusion = self.evaluate(model, contender)
        return Measured(contender, model, scores_of(confusion), confusion, plan.total_steps)

    def _build(self, vit: VisionTransformer) -> Segmenter:
        config = self.config
        depths = choose_depths(config.depths, len(vit.blocks))
        encoder = DenseEncoder(
            vit, size=self.crop, depths=depths, trained=config.finetune, bf16=distributed.has_bf16(self.device)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, Stream.INITIALISATION))
            head: nn.Module
            if config.head == "linear":
                head = LinearHead(encoder.dim, num_maps=len(depths), num_classes=len(self.data.names))
            else:
                decoder = UperNetHead(encoder.dim, num_classes=len(self.data.names), width=config.width)
                head = Bf16(decoder, enabled=encoder.bf16)
        return Segmenter(encoder, head).to(self.device)

    def _task(self, model: Segmenter, contender: Contender) -> Task:
        config = self.config

        def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            images, masks = (part.to(self.device, non_blocking=True) for part in batch)
            return pixel_loss(module(contender.normalise(images)), masks)

        return Task(
            model=model,
            groups=parameter_groups(
                model.encoder, model.head, weight_decay=config.weight_decay, layer_decay=config.layer_decay
            ),
            images=SegmentationCrops(
                self.data.train, crop=self.crop, short_side=self.short_side, scale=config.scale, flip=config.flip,
                fill=mean_values(contender.normalise), seed=config.seed,
            ),
            num_images=len(self.data.train),
            collate=stack_pairs,
            loss=loss,
            name=contender.name,
        )  # fmt: skip

    def _cached_task(self, model: Segmenter, contender: Contender) -> Task:
        config = self.config
        cache = FeatureCache(
            model.encoder, self.data.train, contender.normalise, window=self.crop, short_side=self.short_side,
            flip=config.flip, limit_gb=config.cache_gb, description=f"features, {contender.name}",
        )  # fmt: skip

        def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            features, masks = (part.to(self.device, non_blocking=True) for part in batch)
            return pixel_loss(enlarge(module([features]), self.crop), masks)

        groups = parameter_groups(model.encoder, model.head, weight_decay=config.weight_decay, layer_decay=1.0)
        return Task(model.head, groups, cache, len(cache), stack_pairs, loss, contender.name)

    @torch.no_grad()
    def evaluate(self, model: Segmenter, contender: Contender) -> Int64[Tensor, "k k"]:
        """Confusion matrix over the validation images; every process looks at a part and has the whole."""
        from torchmetrics.classification import MulticlassConfusionMatrix

        model.eval()
        metric = MulticlassConfusionMatrix(len(self.data.names), ignore_index=IGNORED).to(self.device)
        mine = range(distributed.rank(), len(self.data.val), distributed.world_size())
        for position in tracked(mine, f"validation, {contender.name}"):
            image, mask = self.data.val.read(position)
            metric.update(self.predict(model, contender, image)[None], mask[None].to(self.device).long())
        confusion: Tensor = metric.compute()
        return confusion.cpu().long()

    @torch.no_grad()
    def predict(self, model: Segmenter, contender: Contender, image: Tensor) -> Int64[Tensor, "h w"]:
        """The class of every pixel of an image at its own size."""
        height, width = image.shape[1:]
        resized = resize(image, working_size(height, width, self.short_side))
        pixels = contender.normalise(resized[None].to(self.device))[0]
        logits = slide(
            model, pixels, window=self.crop, overlap=self.config.window_overlap, batch_size=self.config.batch_size
        )
        return most_likely(logits, (height, width))

    def draw(self, measured: list[Measured], path: Path, run_config: Config) -> Path:
        """Overlays of some validation images; the main process alone writes."""
        if distributed.is_main():
            count = min(self.config.num_pictures, len(self.data.val))
            rows = []
            for position in torch.linspace(0, len(self.data.val) - 1, count).long().tolist():
                image, mask = self.data.val.read(position)
                found = {m.contender.name: self.predict(m.model, m.contender, image).cpu().numpy() for m in measured}
                rows.append(Segmented(image, np.asarray(mask.numpy()), found))
            title = f"{self.config.checkpoint}: {self.config.head}" + (", fine-tuned" if self.config.finetune else "")
            display = build_display(run_config, [row.image for row in rows])
            save_figure(draw_segmentations(rows, self.data.names, display, title), path)
        return path


_INDIFFERENT = frozenset({
    "checkpoint", "against", "out", "val_images", "val_masks", "num_pictures", "checkpoint_minutes", "device",
    "workers",
    "window_overlap", "untrained", "cache_gb", "class_names", "max_damaged",
})  # fmt: skip
"""Fields that cannot change a training: the encoder counts by its weights, images by their names."""
