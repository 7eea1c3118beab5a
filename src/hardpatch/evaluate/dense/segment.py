"""Semantic segmentation: a head on a run's encoder, beside the same head on the untrained encoder.

    images -> crops -> encoder (frozen or not) -> maps at several depths -> head -> logits -> cross entropy

Held-back images are looked at in sliding windows; figures count every pixel of every image at its own size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hardpatch.config.config import Config
from hardpatch.config.dense_evaluations import SegmentConfig
from hardpatch.evaluate.contenders import Contender, open_contenders, open_run
from hardpatch.evaluate.dense.class_masks import IGNORED
from hardpatch.evaluate.dense.comparison import (
    Comparison,
    Lesson,
    Measured,
    mean_values,
    spread,
)
from hardpatch.evaluate.dense.feature_maps import Bf16, DenseEncoder, check_size, choose_depths, parameter_groups
from hardpatch.evaluate.dense.overlays import Segmented, draw_segmentations
from hardpatch.evaluate.dense.segment_crops import FeatureCache, SegmentationCrops, resize, stack_pairs, working_size
from hardpatch.evaluate.dense.segment_data import Data, open_data
from hardpatch.evaluate.dense.segment_heads import LinearHead, Segmenter, UperNetHead, enlarge, pixel_loss
from hardpatch.evaluate.dense.windows import most_likely, slide
from hardpatch.evaluate.harness import Examples
from hardpatch.evaluate.result import Result, command_of, output_folder, visualize_command
from hardpatch.figures.display import build_display
from hardpatch.figures.sections import Picture, Section, Table, decimals
from hardpatch.runs.build import build_decoder
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.extras import install
from hardpatch.runtime.log import tracked
from hardpatch.runtime.pictures import try_picture
from hardpatch.runtime.seeding import Stream, derive_seed
from hardpatch.runtime.signals import stopped_by_signals


class ClassFigures(NamedTuple):
    """How well one class is found, in percent; None where it does not occur in the validation images."""

    name: str
    iou: float | None
    untrained_iou: float | None
    pixels: int
    """How many the class has in the validation masks."""


@dataclass(frozen=True)
class SegmentResult(Result):
    """Figures in percent."""

    kind = "segment"
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

    def what_next(self, config: SegmentConfig) -> list[str]:
        """After the frozen encoder what it can be trained to, then what is hard in the images."""
        if self.head == "linear":
            trained = command_of("segment", config, head="upernet", finetune=True)
            return [f"next:  {trained}    # what the encoder can be trained to"]
        return [visualize_command(config.checkpoint, config.images)]


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
        Interrupted: A signal arrived; the same call goes on from what is saved.
    """
    _check(config)
    with (
        stopped_by_signals(),
        open_run(config.checkpoint, device=config.device) as loaded,
    ):
        contenders = open_contenders(loaded, config.against, untrained=config.untrained)
        crop = config.crop_size or loaded.config.data.size
        for contender in contenders:
            check_size(crop, contender.encoder, field="crop_size")
            choose_depths(config.depths, len(contender.encoder.blocks))
        folder = output_folder(config, "evaluate", f"segment-{config.head}" + ("-finetuned" if config.finetune else ""))
        data = open_data(config, decoder=build_decoder(loaded.config.data), size=loaded.config.data.size)
        segmentation = Segmentation(config, data, crop, folder, loaded.device)
        measured = [segmentation.measure(contender) for contender in contenders]
        figure = segmentation.draw(measured, loaded.config) if config.num_pictures else None
    scores, confusion = scores_of(measured[0].figures), measured[0].figures
    untrained = next((scores_of(m.figures) for m in measured if m.contender.kind == "untrained"), None)
    others = untrained.iou if untrained else [None] * len(data.names)
    return SegmentResult(
        miou=100 * scores.miou,
        pixel_accuracy=100 * scores.pixel_accuracy,
        untrained_miou=100 * untrained.miou if untrained else None,
        untrained_pixel_accuracy=100 * untrained.pixel_accuracy if untrained else None,
        against={m.contender.name: 100 * scores_of(m.figures).miou for m in measured if m.contender.kind == "against"},
        per_class=[
            ClassFigures(name, own and 100 * own, other and 100 * other, int(pixels))
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


def describe(figures: dict[str, Any]) -> Section:
    """Every class beside the untrained encoder, the means, and pictures."""
    total = max(1, sum(item["pixels"] for item in figures["per_class"]))
    blocks: list[str | Table | Picture] = [
        Table(
            ("class", "IoU %", "untrained", "pixels %"),
            [
                (item["name"], decimals(item["iou"]), decimals(item["untrained_iou"]),
                 decimals(100 * item["pixels"] / total))
                for item in figures["per_class"]
            ],
            folded="by class",
        ),
        f"{figures['head']} head on the {'fine-tuned' if figures['finetuned'] else 'frozen'} encoder: mean IoU "
        f"{figures['miou']:.2f} %, pixel accuracy {figures['pixel_accuracy']:.2f} %; the same encoder untrained "
        f"{decimals(figures['untrained_miou'])} %, {decimals(figures['untrained_pixel_accuracy'])} %   "
        f"({figures['num_train']:,} training images, {figures['num_val']:,} validation images, "
        f"{figures['steps']:,} steps)",
        *(f"{name}: mean IoU {miou:.2f} %" for name, miou in figures["against"].items()),
    ]  # fmt: skip
    if figures["figure"]:
        blocks.append(Picture(figures["figure"], "segmentations"))
    return Section("Semantic segmentation", blocks)


def _check(config: SegmentConfig) -> None:
    """Refuse values that do not fit together, before any work."""
    try:
        import torchmetrics  # noqa: F401
    except ImportError:
        raise InputError(f"segment: needs torchmetrics; {install('dense')}") from None
    if config.finetune and config.head == "linear":
        raise InputError("finetune: the linear head measures a frozen encoder; choose --head upernet")
    if config.cache and (config.finetune or config.head != "linear"):
        raise InputError("cache: keeps features of a frozen encoder for the linear head; leave it away")
    if config.head == "upernet" and config.batch_size // distributed.world_size() < 2:
        raise InputError(f"batch_size: upernet needs at least 2 images per process, got {config.batch_size}")
    if config.scale[0] > config.scale[1]:
        raise InputError(f"scale: must go from a small to a large number, got {config.scale}")
    if config.binary and config.reduce_zero_label:
        raise InputError("reduce_zero_label: binary masks have no such label")


class Segmentation(Comparison[Segmenter, Int64[Tensor, "k k"]]):
    """The same head on one encoder after the other; its figures are confusion matrices."""

    indifferent = frozenset({"val_masks", "window_overlap", "cache_gb", "class_names"})

    def __init__(
        self, config: SegmentConfig, data: Data, crop: tuple[int, int], folder: Path, device: torch.device
    ) -> None:
        super().__init__(config, folder, device, epochs=config.epochs, trained=config.finetune)
        self.config, self.data, self.crop = config, data, crop
        self.short_side = min(crop) if config.short_side is None else config.short_side
        self.plan(len(data.train))  # refuses what cannot be, before any work

    def known_images(self) -> list[str]:
        """Their names."""
        return [self.data.train.name(i) for i in range(len(self.data.train))]

    def prepare(self, contender: Contender) -> Lesson[Segmenter]:
        """A head on the encoder, and random crops; or, where features are cached, the head alone and those."""
        config, model = self.config, self._build(contender.encoder)
        encoder = model.encoder
        layer_decay = 1.0 if config.cache else config.layer_decay
        groups = parameter_groups(encoder, model.head, weight_decay=config.weight_decay, layer_decay=layer_decay)
        if config.cache:
            cache = FeatureCache(
                encoder, self.data.train, contender.normalise, window=self.crop, short_side=self.short_side,
                flip=config.flip, limit_gb=config.cache_gb, description=f"features, {contender.name}",
            )  # fmt: skip
            return Lesson(model, model.head, groups, Examples(cache, len(cache), stack_pairs), self._loss_of_features)
        crops = SegmentationCrops(
            self.data.train, crop=self.crop, short_side=self.short_side, scale=config.scale, flip=config.flip,
            fill=mean_values(contender.normalise), seed=config.seed,
        )  # fmt: skip

        def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            images, masks = (part.to(self.device, non_blocking=True) for part in batch)
            return pixel_loss(module(contender.normalise(images)), masks)

        return Lesson(model, model, groups, Examples(crops, len(self.data.train), stack_pairs), loss)

    def _loss_of_features(self, module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        features, masks = (part.to(self.device, non_blocking=True) for part in batch)
        return pixel_loss(enlarge(module([features]), self.crop), masks)

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

    def draw(self, measured: list[Measured[Segmenter, Int64[Tensor, "k k"]]], run_config: Config) -> Path | None:
        """Overlays of some validation images; the main process alone writes."""

        def drawn() -> Figure:
            rows = []
            for position in spread(len(self.data.val), self.config.num_pictures):
                image, mask = self.data.val.read(position)
                found = {m.contender.name: self.predict(m.model, m.contender, image).cpu().numpy() for m in measured}
                rows.append(Segmented(image, np.asarray(mask.numpy()), found))
            title = f"{self.config.checkpoint}: {self.config.head}" + (", fine-tuned" if self.config.finetune else "")
            display = build_display(run_config, [row.image for row in rows])
            return draw_segmentations(rows, self.data.names, display, title)

        path = self.folder / "segmentations.png"
        return path if not distributed.is_main() or try_picture(drawn, path) else None
