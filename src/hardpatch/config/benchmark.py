"""What ``hardpatch benchmark`` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hardpatch.config.fields import NotNegative, Positive, PositiveFloat, Settings, Share


class Variant(NamedTuple):
    """A training step that can be measured."""

    about: str
    """What it is, for the table."""
    recipe: str
    """The recipe that it is a step of."""
    fields: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    """Fields of the config that it sets beside its recipe."""


EXACT = "hpm-norm-pix"

VARIANTS: dict[str, Variant] = {
    "reference": Variant("the published way: whole EMA model, mask loop, float32 (fp16 on CUDA)", EXACT),
    "mae": Variant("MAE mode: random masks, no loss predictor, no teacher", "mae-norm-pix"),
    "exact": Variant("HPM as published, our step", EXACT),
    "random+lpred": Variant("random masks with the loss predictor", "random+lpred-norm-pix"),
    "mae-third": Variant("MAE that decodes a third of the hidden patches", "mae-third-norm-pix"),
    "crossmae": Variant("MAE with cross-attention decoders, a third decoded", "crossmae"),
    "fast": Variant("recipe hpm-fast", "hpm-fast-norm-pix"),
    "fast-in-pixels": Variant("recipe hpm-fast-in-pixels", "hpm-fast-in-pixels"),
    "random+lpred-fast": Variant(
        "recipe random+lpred-fast: fast without teacher and mining", "random+lpred-fast-norm-pix"
    ),
    "shared": Variant("recipe hpm-shared", "hpm-shared-norm-pix"),
    "cross": Variant("recipe hpm-cross", "hpm-cross-norm-pix"),
    "exact+third": Variant("exact, a third of the hidden patches decoded", EXACT, {"decoded_share": 1 / 3}),
    "exact+cross": Variant("exact with cross-attention decoders", EXACT, {"decoder": "cross"}),
    "exact+shallow": Variant("exact with a loss predictor of one block", EXACT, {"predictor_depth": 1}),
    "exact+half-teacher": Variant("exact with a teacher on images of half the side", EXACT, {"teacher_reduction": 2}),
    "exact+4-masks": Variant("exact with one pass of the teacher for four masks", EXACT, {"masks_per_image": 4}),
}
"""What ``hardpatch benchmark step`` can measure, in the order of the table."""

LOADERS: dict[str, str] = {
    "plain": "Pillow opens, crops, resizes; ToTensor, Normalize: the loader of most research code",
    "files": "hardpatch from image files",
    "shards": "hardpatch from tar shards written by hardpatch data pack",
    "cache": "hardpatch with cache ram, after the first epoch",
    "device-decode": "hardpatch with augmentation device: decoded and cropped on the GPU",
    "device-cache": "hardpatch with cache device, after the first epoch",
}
"""What ``hardpatch benchmark data`` can measure, in the order of the table."""

if TYPE_CHECKING:
    VariantName = str
    LoaderName = str
else:  # the choices that --help lists and that values are checked against are the names in the tables
    VariantName = Literal[tuple(VARIANTS)]
    LoaderName = Literal[tuple(LOADERS)]


@dataclass(frozen=True)
class BenchmarkConfig(Settings):
    """Sizes and conditions that everything measured has in common."""

    encoder: str = "vit_base_patch16_224"
    """Any timm VisionTransformer."""
    image_size: Positive = 224
    """Side of the images, pixels."""
    patch_size: Positive | None = None
    """Side of a patch, pixels; none: the encoder's own."""
    decoder_width: Positive = 512
    """Token width of the decoders."""
    decoder_depth: Positive = 8
    """Blocks of the reconstructor (and of the loss predictor, where the variant does not say otherwise)."""
    batch_size: Positive | None = None
    """Student views a step; none: 256 on CUDA, 16 elsewhere."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device; auto: CUDA, then MPS, then CPU."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Autocast precision of all but the reference step; auto: bf16 where the hardware has it."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the blocks; auto: on CUDA. The reference step and peers are never compiled."""
    seconds: PositiveFloat = 10.0
    """Timed seconds for each, over all rounds."""
    rounds: Positive = 5
    """Turns of each; the spread is over them."""
    out: str = ""
    """JSON file to write; a figure is drawn beside it."""


@dataclass(frozen=True)
class StepConfig(BenchmarkConfig):
    """Images per second of one training step: ours, the fast presets, MAE, and a plain step as published, in turns.

    Images are random bytes that lie on the device. images/s counts student views.
    """

    variants: tuple[VariantName, ...] = (
        "reference", "mae", "exact", "fast", "fast-in-pixels", "random+lpred-fast", "shared",
    )  # fmt: skip
    """What to measure: the plain reference step, recipes, and every means of the fast mode alone on the exact one."""


@dataclass(frozen=True)
class LoadingConfig(Settings):
    """Images per second and core of each way to the same batches, in turns, and what a training step needs.

    Everything runs in this process on one thread, and what counts is processor time: other work on the machine does not
    make a path look slow. The device's paths are timed by the clock. All but the plain loader give uint8, which is
    normalised on the device.
    """

    data: str = "shapes:200"
    """Images, any source; the first of them are taken."""
    images: Positive = 200
    """How many."""
    enlarge: tuple[NotNegative, NotNegative] = (500, 400)
    """Width and height to which the images are resized before they are saved as JPEGs (quality 90, 4:2:0), as no
    source of photographs of that size is at hand everywhere; 0 0: the files are taken as they are."""
    loaders: tuple[LoaderName, ...] = ()
    """What to measure beside the plain loader; none: all that this machine can."""
    image_size: Positive = 224
    """Side of the crops, pixels."""
    crop_scale: tuple[Share, Share] = (0.2, 1.0)
    """Area of the random resized crop, share of the image."""
    packed_size: Positive = 256
    """Shorter side of the images in the shards, pixels."""
    batch_size: Positive = 64
    """Images of a batch."""
    seconds: PositiveFloat = 20.0
    """Processor seconds for all paths together."""
    rounds: Positive = 5
    """Turns of each; the spread is over them."""
    step: VariantName | Literal["none"] = "none"
    """Also time this training step of hardpatch benchmark step on the device, to see which of the two limits."""
    encoder: str = "vit_base_patch16_224"
    """Its encoder, any timm VisionTransformer."""
    step_images_per_second: PositiveFloat | None = None
    """Or: what the step is known to need, images per second."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device of the step and of the device's paths."""
    out: str = ""
    """JSON file to write; a figure is drawn beside it."""
