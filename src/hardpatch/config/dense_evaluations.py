"""What segmentation and detection can be told: kept apart from what they do, so that ``--help`` need not import it."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Literal

from pydantic import Field

from hardpatch.config.fields import (
    NotNegative,
    NotNegativeFloat,
    OpenShare,
    Positive,
    PositiveFloat,
    Seed,
    Settings,
    Share,
    ShareAboveZero,
    ShareBelowOne,
)


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """What every evaluation can be told."""

    checkpoint: str
    """Run folder or checkpoint file."""
    _: KW_ONLY
    against: tuple[str, ...] = ()
    """The same with other encoders: timm:NAME, timm:local-dir:PATH, or another run."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to run on."""
    max_damaged: Share = 0.01
    """Stop when more than this share of a source's images cannot be decoded."""


@dataclass(frozen=True, kw_only=True)
class DenseConfig(EvaluationConfig):
    """What both have in common."""

    out: str = ""
    """Folder for pictures and for going on after a kill; a folder of the run's where none is given."""
    val_share: OpenShare = 0.2
    """Share of the images that is held back where no validation images are named; the seed draws them."""
    batch_size: Positive = 16
    """Images per step."""
    learning_rate: PositiveFloat | None = None
    """Peak of AdamW's learning rate; none: 1e-4 where the encoder is trained, 1e-3 where it is frozen."""
    weight_decay: NotNegativeFloat = 0.05
    """Weight decay of matrices; biases and norms have none."""
    layer_decay: ShareAboveZero = 0.75
    """Learning rate of a block of the encoder over that of the block after it."""
    flip: bool = True
    """Mirror half of the training images."""
    width: Positive = 256
    """Channels of the decoder."""
    seed: Seed = 0
    """Seed of the head's first weights, the order, the crops and the held-back images."""
    num_pictures: NotNegative = 6
    """Validation images that are drawn, spread over the set; 0: none."""
    checkpoint_minutes: PositiveFloat = 5.0
    """Time between two checkpoints of the training."""
    workers: NotNegative = 0
    """Data processes."""


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(DenseConfig):
    """Semantic segmentation: a head on the encoder's feature maps at several depths, mean IoU on held-back images."""

    images: str
    """Training images, any source; a folder in ADE20K's layout; shapes:N brings its own masks."""
    masks: str = ""
    """Folder of masks, one per image with the same name up to the ending; pixel values are classes."""
    val_images: str = ""
    """Validation images; none: ADE20K's validation folder, or a share of the training images."""
    val_masks: str = ""
    """Their masks; none: the folder of the training masks."""
    head: Literal["linear", "upernet"] = "linear"
    """linear: BatchNorm and a 1x1 convolution on a frozen encoder; upernet: a pyramid and UPerNet's decoder."""
    finetune: bool = False
    """Train the encoder as well, with layer decay; for upernet."""
    depths: tuple[Positive, ...] = ()
    """Blocks whose outputs are used, counted from 1; none: four, evenly spread, the last one included."""
    crop_size: tuple[Positive, Positive] | None = None
    """Height and width of training crops and windows in pixels; none: the run's image size."""
    short_side: NotNegative | None = None
    """Pixels to which the short side of an image is brought; 0: images stay as they are; none: the crop's."""
    binary: bool = False
    """Masks are black and white: bright is class 1, dark class 0."""
    ignore_index: Annotated[int, Field(ge=-1)] = 255
    """Pixels of this value do not count; -1: all count."""
    reduce_zero_label: bool = False
    """Pixels of value 0 do not count either, and class k has the value k + 1, as in ADE20K."""
    num_classes: Annotated[int, Field(ge=2)] | None = None
    """Number of classes; none: the largest value in the training masks and one."""
    class_names: str = ""
    """Text file, a class a line."""
    epochs: Positive = 50
    """Passes over the training images."""
    scale: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)
    """Range by which training images are enlarged before they are cropped."""
    cache: bool = False
    """Compute features once, of fixed windows instead of random crops; for a frozen encoder and linear."""
    cache_gb: PositiveFloat = 8.0
    """Refuse a larger cache."""
    window_overlap: ShareBelowOne = 1 / 3
    """Share of a window that the next one sees again."""
    untrained: bool = True
    """Do the same with the encoder's own random start."""


@dataclass(frozen=True, kw_only=True)
class DetectConfig(DenseConfig):
    """Detection and instance segmentation: Mask R-CNN on a simple feature pyramid (ViTDet), COCO AP."""

    train_images: str
    """Folder of training images, or shapes:N."""
    train_annotations: str = ""
    """COCO's JSON, or from-masks:DIR: the connected parts of bright pixels in masks of the images' names; nothing for
    shapes, which know their own."""
    val_images: str = ""
    """Folder of validation images, or shapes:N@SEED; none: a share of the training images is held back."""
    val_annotations: str = ""
    """Their annotations, in either form."""
    freeze: bool = False
    """Leave the encoder as it is."""
    size: Positive | None = None
    """Pixels of the square into which images are fitted, a multiple of 4 patches; none: the run's, rounded up."""
    epochs: Positive = 50
    """Passes over the training images."""
    scale: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)
    """Range by which training images are enlarged before they are cropped to the square."""
    anchor_scale: PositiveFloat = 8.0
    """Side of the anchors, in strides of their pyramid level."""
    samples_per_image: Positive | None = None
    """Proposals per image that the heads learn from; none: 512, or as many as pixels of a side where that is less."""
    min_pixels: Positive = 4
    """from-masks: smaller parts are no instances."""
    drop_empty_boxes: bool = False
    """Leave annotations out whose box has no area, instead of refusing the file."""
    untrained: bool = False
    """Do the same with the encoder's own random start."""
