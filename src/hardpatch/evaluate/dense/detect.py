"""Detection and instance segmentation: Mask R-CNN on a run's encoder, COCO's average precision.

    images -> large-scale jitter -> encoder -> simple feature pyramid -> torchvision's Mask R-CNN

Source: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (ViTDet), arXiv 2203.16527; here
with global attention everywhere and without its cascade.
"""

from __future__ import annotations

import contextlib
import copy
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from hardpatch.config.config import Config
from hardpatch.config.dense_evaluations import DetectConfig
from hardpatch.data.images.decode import Decoder
from hardpatch.evaluate.contenders import Contender, open_contenders, open_run
from hardpatch.evaluate.dense.coco import CocoImages, find_damage, open_instances
from hardpatch.evaluate.dense.comparison import (
    Comparison,
    Lesson,
    Measured,
    held_back,
    mean_values,
    spread,
)
from hardpatch.evaluate.dense.detect_crops import InstanceCrops, Target, list_pairs
from hardpatch.evaluate.dense.detector import build_detector, check_patch, fitting_size
from hardpatch.evaluate.dense.feature_maps import DenseEncoder, parameter_groups
from hardpatch.evaluate.dense.overlays import Detected, draw_detections
from hardpatch.evaluate.features import none_readable, report_damage
from hardpatch.evaluate.harness import Examples
from hardpatch.evaluate.result import Result, command_of, output_folder, visualize_command
from hardpatch.figures.display import build_display
from hardpatch.figures.sections import Picture, Section, Table, decimals
from hardpatch.method.vit import patch_size
from hardpatch.runs.build import build_decoder
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.extras import install
from hardpatch.runtime.log import say, tracked
from hardpatch.runtime.pictures import try_picture
from hardpatch.runtime.seeding import Stream, derive_seed
from hardpatch.runtime.signals import stopped_by_signals

SHOWN_SCORE = 0.5
"""Detections of a lower score are not drawn, but for the best of an image that has none above it."""


class Precision(NamedTuple):
    """COCO's average precision, in percent; None where the validation set has no instance to find."""

    ap: float | None
    """Mean over IoU thresholds 0.5, 0.55, ..., 0.95 and over classes."""
    ap50: float | None
    ap75: float | None


@dataclass(frozen=True)
class DetectResult(Result):
    """Figures in percent."""

    kind = "detect"
    ap: float | None
    """By boxes."""
    ap50: float | None
    ap75: float | None
    mask_ap: float | None
    """None where the annotations have no masks."""
    mask_ap50: float | None
    untrained_ap: float | None
    """The same detector on the encoder's random start; None where it was not asked for."""
    untrained_ap50: float | None
    untrained_mask_ap: float | None
    untrained_mask_ap50: float | None
    against: dict[str, float | None]
    """AP of boxes of the same detector on the encoders that were named."""
    classes: list[str]
    frozen: bool
    num_train: int
    num_val: int
    num_val_instances: int
    damaged: int
    """Images left out, of both."""
    steps: int
    figure: str | None
    """Pictures of some validation images."""

    def what_next(self, config: DetectConfig) -> list[str]:
        """The control, then what is hard in the images."""
        if not config.untrained:
            return [f"next:  {command_of('detect', config, untrained=True)}    # what of this pre-training gave"]
        return [visualize_command(config.checkpoint, config.train_images)]


class Data(NamedTuple):
    """Checked images of both sides."""

    train: CocoImages
    val: CocoImages
    damaged: int


def average_precision(content: dict[str, Any], detections: list[dict[str, Any]], kind: str) -> Precision:
    """COCO's average precision by pycocotools.

    Args:
        content: The annotations, a COCO object.
        detections: ``image_id``, ``category_id``, ``score`` and, by kind, ``bbox`` or ``segmentation`` (run-length).
        kind: ``bbox`` or ``segm``.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not any(not item.get("iscrowd") for item in content["annotations"]):
        return Precision(None, None, None)
    if not detections:
        return Precision(0.0, 0.0, 0.0)
    truth = copy.deepcopy(content)
    for item in truth["annotations"]:
        item.setdefault("iscrowd", 0)
        item.setdefault("area", item["bbox"][2] * item["bbox"][3])
    with contextlib.redirect_stdout(io.StringIO()):  # it prints tables of its own
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        measured = COCOeval(coco, coco.loadRes(copy.deepcopy(detections)), kind)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return Precision(*(100 * float(value) if value >= 0 else None for value in measured.stats[:3]))


def run(config: DetectConfig) -> DetectResult:
    """``hardpatch evaluate detect``.

    Raises:
        InputError: Annotations that do not fit together or with the images; values that do not fit; too many damaged
            images; a bad checkpoint.
        Interrupted: A signal arrived; the same call goes on from what is saved.
    """
    _check(config)
    with (
        stopped_by_signals(),
        open_run(config.checkpoint, device=config.device) as loaded,
    ):
        contenders = open_contenders(loaded, config.against, untrained=config.untrained)
        data_config = loaded.config.data
        size = config.size or fitting_size(max(data_config.size), check_patch(patch_size(contenders[0].encoder)))
        for contender in contenders:
            patch = check_patch(patch_size(contender.encoder))
            if size < 1 or size != fitting_size(size, patch):
                raise InputError(f"size: must be a multiple of 4 patches ({4 * patch} pixels), got {size}")
        folder = output_folder(config, "evaluate", "detect" + ("-frozen" if config.freeze else ""))
        data = open_data(config, decoder=build_decoder(data_config), image_size=data_config.size)
        detection = Detection(config, data, size, folder, loaded.device)
        measured = [detection.measure(contender) for contender in contenders]
        figure = detection.draw(measured, loaded.config) if config.num_pictures else None
    boxes, masks = measured[0].figures
    none = Precision(None, None, None)
    untrained = next((m.figures for m in measured if m.contender.kind == "untrained"), (none, none))
    instances = [item for item in data.val.content["annotations"] if not item.get("iscrowd")]
    return DetectResult(
        ap=boxes.ap,
        ap50=boxes.ap50,
        ap75=boxes.ap75,
        mask_ap=masks.ap,
        mask_ap50=masks.ap50,
        untrained_ap=untrained[0].ap,
        untrained_ap50=untrained[0].ap50,
        untrained_mask_ap=untrained[1].ap,
        untrained_mask_ap50=untrained[1].ap50,
        against={m.contender.name: m.figures[0].ap for m in measured if m.contender.kind == "against"},
        classes=[str(category["name"]) for category in data.train.categories],
        frozen=config.freeze,
        num_train=len(data.train),
        num_val=len(data.val),
        num_val_instances=len(instances),
        damaged=data.damaged,
        steps=measured[0].steps,
        figure=str(figure.absolute()) if figure else None,
    )


def describe(figures: dict[str, Any]) -> Section:
    """COCO's average precision beside the untrained encoder, and pictures."""
    blocks: list[str | Table | Picture] = [
        Table(
            ("COCO AP %", "encoder", "untrained"),
            [
                (what, decimals(figures[key]), decimals(figures[f"untrained_{key}"]))
                for what, key in (
                    ("boxes, IoU 0.5 to 0.95", "ap"),
                    ("boxes, IoU 0.5", "ap50"),
                    ("masks, IoU 0.5 to 0.95", "mask_ap"),
                    ("masks, IoU 0.5", "mask_ap50"),
                )
            ],
        ),
        f"Mask R-CNN on the {'frozen' if figures['frozen'] else 'fine-tuned'} encoder: {figures['num_train']:,} "
        f"training images, {figures['num_val']:,} validation images with {figures['num_val_instances']:,} instances, "
        f"{figures['steps']:,} steps",
        *(f"{name}: AP of boxes {decimals(ap)} %" for name, ap in figures["against"].items()),
    ]
    if figures["figure"]:
        blocks.append(Picture(figures["figure"], "detections"))
    return Section("Detection", blocks)


def _check(config: DetectConfig) -> None:
    """Refuse values that do not fit together, before any work."""
    try:
        import pycocotools  # noqa: F401
    except ImportError:
        raise InputError(f"detect: needs pycocotools; {install('dense')}") from None
    if config.scale[0] > config.scale[1]:
        raise InputError(f"scale: must go from a small to a large number, got {config.scale}")
    alone = config.val_images.startswith("shapes:")
    if bool(config.val_images) != bool(config.val_annotations) and not alone:
        missing = "val_annotations" if config.val_images else "val_images"
        raise InputError(f"{missing}: val_images and val_annotations belong together; name both or neither")


def open_data(config: DetectConfig, *, decoder: Decoder, image_size: tuple[int, int] = (224, 224)) -> Data:
    """Open both sides and look at every image once.

    Raises:
        InputError: Anything that would go wrong later.
    """

    def side(annotations: str, images: str, field: str) -> CocoImages:
        return open_instances(
            annotations, images, decoder=decoder, field=field, image_size=image_size, min_pixels=config.min_pixels,
            drop_empty_boxes=config.drop_empty_boxes,
        )  # fmt: skip

    train_side = side(config.train_annotations, config.train_images, "train")
    if config.val_images:
        val = side(config.val_annotations, config.val_images, "val")
    else:
        kept, drawn = held_back(len(train_side), config.val_share, config.seed)
        train_side, val = train_side.only(kept), train_side.only(drawn)
        say(f"no val_images: {len(val)} of the {len(kept) + len(drawn)} images are held back (val_share, seed)")
    known = {(item["id"], item["name"]) for item in train_side.categories}
    if unknown := [item for item in val.categories if (item["id"], item["name"]) not in known]:
        raise InputError(f"val_annotations: category {unknown[0]['id']} ({unknown[0]['name']}) is not among those of "
                         "train_annotations")  # fmt: skip
    found = [find_damage(images, description=f"check {name}") for name, images in (("train", train_side), ("val", val))]
    damaged = [[item for item in part if item is not None] for part in found]
    for items, images in zip(damaged, (train_side, val)):
        if len(items) == len(images):
            raise none_readable(items)
    left_out = report_damage(
        {"train_images": (damaged[0], len(train_side)), "val_images": (damaged[1], len(val))},
        max_damaged=config.max_damaged,
    )
    readable = [[i for i, item in enumerate(part) if item is None] for part in found]
    return Data(train_side.only(readable[0]), val.only(readable[1]), left_out)


class Detection(Comparison[FasterRCNN, tuple[Precision, Precision]]):
    """The same detector on one encoder after the other; its figures are the precision of boxes and of masks."""

    indifferent = frozenset({"train_images", "train_annotations", "val_annotations"})

    def __init__(self, config: DetectConfig, data: Data, size: int, folder: Path, device: torch.device) -> None:
        super().__init__(config, folder, device, epochs=config.epochs, trained=not config.freeze)
        self.config, self.data, self.size = config, data, size
        self.has_masks = data.train.has_masks and data.val.has_masks
        self.plan(len(data.train))  # refuses what cannot be, before any work

    def known_images(self) -> dict[str, Any]:
        """Their annotations."""
        return self.data.train.content

    def prepare(self, contender: Contender) -> Lesson[FasterRCNN]:
        """A detector on the encoder, and jittered crops."""
        config, model = self.config, self._build(contender)
        rest = nn.ModuleList([model.backbone.pyramid, model.rpn, model.roi_heads])
        groups = parameter_groups(
            model.backbone.encoder, rest, weight_decay=config.weight_decay, layer_decay=config.layer_decay
        )
        crops = InstanceCrops(
            self.data.train, size=self.size, scale=config.scale, flip=config.flip,
            fill=mean_values(contender.normalise), seed=config.seed,
        )  # fmt: skip

        def loss(module: nn.Module, batch: tuple[list[Tensor], list[Target]]) -> Tensor:
            images = [image.to(self.device).float() / 255 for image in batch[0]]
            targets = [{name: value.to(self.device) for name, value in target.items()} for target in batch[1]]
            return torch.stack(list(module(images, targets).values())).sum()

        return Lesson(model, model, groups, Examples(crops, len(self.data.train), list_pairs), loss)

    def _build(self, contender: Contender) -> FasterRCNN:
        vit = contender.encoder
        normalise = contender.normalise
        mean, std = (tuple((part.flatten() / 255).tolist()) for part in (normalise.mean, normalise.std))
        encoder = DenseEncoder(
            vit, size=(self.size, self.size), depths=(len(vit.blocks),), trained=not self.config.freeze,
            bf16=distributed.has_bf16(self.device),
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.config.seed, Stream.INITIALISATION))
            model = build_detector(
                encoder, num_classes=len(self.data.train.categories), masks=self.has_masks, size=self.size,
                width=self.config.width, anchor_scale=self.config.anchor_scale,
                samples_per_image=self.config.samples_per_image, mean=mean, std=std,
            )  # fmt: skip
        return model.to(self.device)

    @torch.no_grad()
    def evaluate(self, model: FasterRCNN, contender: Contender) -> tuple[Precision, Precision]:
        """Average precision of boxes and of masks; every process looks at a part, all get the whole."""
        from pycocotools import mask as coco_mask

        model.eval()
        ids = [category["id"] for category in self.data.train.categories]
        boxes, masks = [], []
        mine = range(distributed.rank(), len(self.data.val), distributed.world_size())
        for index in tracked(mine, f"validation, {contender.name}"):
            found = self.predict(model, index)
            about = [
                {"image_id": self.data.val.images[index]["id"], "category_id": ids[label - 1], "score": score}
                for label, score in zip(found["labels"].tolist(), found["scores"].tolist())
            ]
            corners = found["boxes"].numpy().astype(float)
            sides = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()
            boxes += [{**item, "bbox": box} for item, box in zip(about, sides)]
            if self.has_masks:
                drawn = (found["masks"][:, 0] > 0.5).to(torch.uint8).permute(1, 2, 0).numpy()
                codes = coco_mask.encode(np.asfortranarray(drawn))
                masks += [{**item, "segmentation": code} for item, code in zip(about, codes)]
        gathered = distributed.gather_objects((boxes, masks))
        all_boxes, all_masks = ([item for part in gathered for item in part[side]] for side in (0, 1))
        content = self.data.val.content
        return (
            average_precision(content, all_boxes, "bbox"),
            average_precision(content, all_masks, "segm") if self.has_masks else Precision(None, None, None),
        )

    @torch.no_grad()
    def predict(self, model: FasterRCNN, index: int) -> Target:
        """What is found in a validation image, best first, at the image's own size; on the CPU."""
        image = self.data.val.read(index).image.to(self.device).float() / 255
        return {name: value.cpu() for name, value in model([image])[0].items()}

    def draw(
        self, measured: list[Measured[FasterRCNN, tuple[Precision, Precision]]], run_config: Config
    ) -> Path | None:
        """Pictures of some validation images; the main process alone writes."""

        def drawn() -> Figure:
            names = [str(category["name"]) for category in self.data.train.categories]
            rows = []
            for index in spread(len(self.data.val), self.config.num_pictures):
                image, boxes, labels, masks = self.data.val.read(index)
                told = [names[label - 1] if len(names) > 1 else "" for label in labels.tolist()]
                columns = {"truth": Detected(boxes.numpy(), told, None if masks is None else masks.numpy())}
                for found in measured:
                    columns[found.contender.name] = self._drawable(found.model, index, names)
                rows.append((image, columns))
            display = build_display(run_config, [image for image, _ in rows])
            about = f"detection, scores above {SHOWN_SCORE:g}, else the best"
            return draw_detections(rows, display, f"{self.config.checkpoint}: {about}")

        path = self.folder / "detections.png"
        return path if not distributed.is_main() or try_picture(drawn, path) else None

    def _drawable(self, model: FasterRCNN, index: int, names: list[str]) -> Detected:
        found = self.predict(model, index)
        kept = worth_drawing(found["scores"])
        several = len(names) > 1
        told = []
        for label, score in zip(found["labels"][kept].tolist(), found["scores"][kept].tolist()):
            number = f"{score:.2f}" if several or score <= SHOWN_SCORE else ""  # of many alike it would be clutter
            told.append(f"{names[label - 1]} {number}" if several else number)
        masks = found["masks"][kept, 0].numpy() > 0.5 if self.has_masks else None
        return Detected(found["boxes"][kept].numpy(), told, masks)


def worth_drawing(scores: Float[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """The detections above :data:`SHOWN_SCORE`, or the best alone where there are none."""
    above = scores > SHOWN_SCORE
    if len(scores) and not above.any():
        above[scores.argmax()] = True
    return above
