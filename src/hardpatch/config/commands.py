"""What the commands can be told, but evaluations, benchmarks, plans and ablations, which have a module of their own.

Kept apart from what the commands do, so that ``--help`` need not import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from pydantic import Field
from tyro.conf import Positional

from hardpatch.config.fields import NotNegative, Positive, PositiveFloat, Seed, Settings, Share


@dataclass(frozen=True)
class PretrainCommand(Settings):
    """Pre-train a ViT with Hard Patches Mining, or go on with a run that was stopped.

    Without --recipe, --config and --branch-from the method, sizes and length are chosen from the images and the
    machine. The fields below are the config; a recipe or a YAML file gives them other defaults, flags override both.
    """

    out: str
    """Run folder."""
    recipe: str | None = None
    """Named starting point, see hardpatch recipes; none: chosen from the images and the machine."""
    budget: str | None = None
    """How long the run may take, e.g. 30m, 8h, 2d: sizes and length are chosen for it; none: 8 minutes on a CPU, 2
    hours on a GPU, for a run without a recipe."""
    config: str | None = None
    """YAML file instead of a recipe."""
    branch_from: str | None = None
    """Run instead of a recipe, with a constant learning rate: go on in --out from where it had not yet fallen, with
    other --epochs (longer or shorter); the run stays as it is."""
    resume: Literal["auto", "never", "restart"] = "auto"
    """auto: go on with an unfinished run in the folder; never: refuse to; restart: start over."""


@dataclass(frozen=True)
class DemoCommand(Settings):
    """Pre-train on the embedded shapes, evaluate, draw, write a report: a few minutes on two CPU cores."""

    out: str = "runs/demo"
    """Run folder."""
    epochs: Positive | None = None
    """Passes over the 4,000 images; none: as in the recipe shapes-demo."""


@dataclass(frozen=True)
class VisualizeCommand(Settings):
    """Draw images, their loss under ten masks, the predicted loss, the mask it leads to, and the reconstruction."""

    checkpoint: str
    """Run folder or checkpoint file."""
    images: str
    """Images, any source."""
    out: str
    """Figure to write, .png."""
    count: Positive = 8
    """How many images, spread over the source."""


@dataclass(frozen=True)
class DoctorConfig(Settings):
    """Look whether hardpatch will run well here: packages, device, a training step, memory, data processes, disk.

    Takes half a minute. Under torchrun also whether the processes find each other and have the same versions. The exit
    code is 0 if nothing will keep hardpatch from running (there may be warnings), 2 otherwise.
    """

    data: str = ""
    """Also look at these images: any source of hardpatch pretrain --data."""
    out: str = "runs"
    """Folder that runs will be written to; looked at, and left as it is."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device; auto: CUDA, then MPS, then CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Also compile the blocks of a model, as --compile does; auto: on CUDA."""
    seconds: PositiveFloat = 120.0
    """Whatever may hang is ended after so long."""


@dataclass(frozen=True)
class CheckConfig(Settings):
    """Read every file of a source and say what is there: sizes, channels, depths, damage, duplicates.

    Nothing is changed. Damaged files are listed, the exit code is 0 all the same.
    """

    data: Positional[str]
    """Images, any source."""
    out: str = ""
    """Folder for the tables, a list of the good files and a contact sheet; none: only print."""
    channels: Positive | None = None
    """Read every image as so many channels, as a run would; none: as many as it has."""
    no_data: float | None = None
    """Value of pixels without data, as stored; none: what a file itself names."""
    near_bits: Annotated[int, Field(ge=0, le=16)] = 6
    """Images whose perceptual hashes differ in so many of 64 bits at most are near duplicates."""
    sheet_images: Positive = 24
    """Images on the contact sheet that stand for all."""
    timeout: PositiveFloat = 60.0
    """Seconds after which a file that is still not decoded counts as damaged."""
    workers: NotNegative | None = None
    """Processes; none: one per core."""


@dataclass(frozen=True)
class StatsConfig(Settings):
    """Mean and standard deviation per channel over all pixels of all images, exactly, and the flags to use them."""

    data: Positional[str]
    """Images, any source."""
    channels: Positive | None = None
    """Read every image as so many channels; none: found in the data."""
    value_range: tuple[float, ...] = ()
    """Lowest and highest value of images that are not 8-bit; empty: found in the data."""
    no_data: float | None = None
    """Value of pixels without data, as stored, which are left out; none: what a file itself names."""
    workers: NotNegative | None = None
    """Processes; none: one per core."""


@dataclass(frozen=True)
class PackConfig(Settings):
    """Write images, made smaller once, to tar shards that are quick to read; verified, and resumed after a kill.

    Images whose shorter side is at most --size are taken as they are, byte for byte. Larger ones are resized: 8-bit
    grey and colour become JPEGs, with transparency PNGs, all others .npy arrays of their own type. Damaged images are
    left out and listed.
    """

    data: Positional[str]
    """Images, any source; labels become .cls members."""
    out: str
    """Folder for the shards and index.json."""
    size: Positive = 256
    """Shorter side at most, pixels."""
    tile: Positive | None = None
    """Cut large scenes into square tiles of so many pixels, lossless and not resized; none: images stay whole."""
    overlap: NotNegative = 0
    """Pixels that neighbouring tiles have in common."""
    quality: Annotated[int, Field(ge=1, le=100)] = 90
    """Quality of JPEGs, 1 to 100."""
    shard_bytes: Positive = 500_000_000
    """A shard is closed when it has so many bytes."""
    channels: Positive | None = None
    """Channels of images that have more than one way to be read, .npy arrays above all; none: found in the data."""
    no_data: float | None = None
    """Value of pixels without data, as stored, which must not blend into others; none: what a file itself names."""
    workers: NotNegative | None = None
    """Processes; none: one per core."""


Kept = Literal["class", "mean", "both", "tokens"]
"""Columns ``class_token``, ``patch_mean``, these two, or ``patch_tokens``; none is brought to a length."""


@dataclass(frozen=True)
class EmbedConfig(Settings):
    """Features of every image of a source, in its order, unmasked and unaugmented, with paths and labels where known.

    Stopped or killed, the same command goes on: finished parts lie in OUT.parts until they are joined.
    """

    checkpoint: str
    """Run folder or checkpoint file."""
    data: str
    """Images, any source."""
    out: str
    """Table to write, .parquet or .npz."""
    features: Kept = "mean"
    """What is kept of an image: the class token, the mean of its patch tokens, both as two columns, or all patch
    tokens."""
    dtype: Literal["float32", "float16"] = "float32"
    """How features are stored; float16 halves the size of patch tokens."""
    precision: Literal["float32", "bf16"] = "float32"
    """How features are computed; bf16 is faster on a GPU and less exact."""
    hardness: bool = False
    """Add how difficult each image is, and where: the student's reconstruction error and the teacher's predicted
    loss."""
    contact_sheet: str = ""
    """Picture of the easiest and hardest images, .png; needs --hardness."""
    sheet_images: Positive = 32
    """Images on the sheet from either end."""
    seed: Seed = 0
    """Seed of the masks under which difficulty is measured; the same for every image."""
    batch_size: Positive = 128
    """Images per pass."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to run on."""
    workers: NotNegative = 0
    """Data processes."""
    max_damaged: Share = 0.01
    """Stop when more than this share of the images cannot be decoded."""


ExportFormat = Literal["timm", "hf", "safetensors", "onnx", "torch"]

Output = Literal["tokens", "class", "mean"]
"""What a graph puts out: all tokens (prefix tokens, then patches), the class token, the mean of the patch tokens."""


@dataclass(frozen=True)
class ExportConfig(Settings):
    """Write the pre-trained backbone in the form of another library, and check that it computes the same there.

    timm: folder for timm.create_model("local-dir:PATH"). hf: folder of an ordinary ViTModel of transformers.
    safetensors: one file under timm's names. onnx: one graph, batch of any size. torch: the same for torch.export.load.
    Each brings a model card. Images go in normalised as in the run.
    """

    checkpoint: str
    """Run folder, checkpoint file or weights.safetensors."""
    format: ExportFormat
    """Who shall load it."""
    out: str
    """What to write: a folder (timm, hf), or a file that ends in .safetensors, .onnx or .pt2 (torch)."""
    pooling: Output | None = None
    """Output of onnx and torch: all tokens, the class token, or the mean of the patch tokens; none: tokens."""


@dataclass(frozen=True)
class ConvertConfig(Settings):
    """Convert published HPM and MAE checkpoints to ours and back; what is written depends on the ending of --to.

    FILE.pt: ours, for visualize, evaluate and load_teacher. FILE.safetensors: the encoder alone, timm's names.
    FILE.pth: published names.
    """

    source: Annotated[str, tyro.conf.arg(name="from")]
    """What to read: a published HPM or MAE file, a Hugging Face or timm folder, timm:NAME, or a run folder or .pt."""
    to: str
    """File to write: .pt, .safetensors or .pth."""
    target: Literal["pixels", "norm_pix"] = "pixels"
    """What the model was trained to reconstruct; published files do not say."""
    encoder_heads: Positive | None = None
    """Attention heads of the encoder, which no tensor shows; none: width / 64 (16 for 1280)."""
    decoder_heads: Positive | None = None
    """Attention heads of the decoders; none: 16 for width 512."""
    image_size: tuple[Positive, ...] = ()
    """Height and width in pixels, for a learnt position table that is not square."""
    mean: tuple[float, ...] = ()
    """Channel means that the model's images were normalised with; empty: ImageNet's."""
    std: tuple[PositiveFloat, ...] = ()
    """Channel standard deviations; empty as for mean."""
    force: bool = False
    """Replace the file if it exists."""
