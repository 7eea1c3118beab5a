"""Everything a run can be told, as typed frozen dataclasses: written once here, shown by ``--help``, read from YAML.

Sections keep apart what decides the result (data, model, method, optimisation) from what cannot change it (run).
Field names are unique over all sections, so that every field is a flag of its own name on the command line and a
keyword of :func:`hardpatch.pretrain`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro
from pydantic import AfterValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from hardpatch.config.fields import NotNegative, OpenShare, Positive, PositiveFloat, Share
from hardpatch.method.choices import MASKS, TARGETS, Guide, guide_of, listed
from hardpatch.runtime.errors import suggest


def named_in(table: Mapping[str, Any]) -> AfterValidator:
    """The check of a field that names a row of a table, also a row that is added later."""

    def check(name: str) -> str:
        if name not in table:
            known = ", ".join(map(repr, table)) + suggest(name, table)
            raise PydanticCustomError("unknown_name", "must be one of {known}", {"known": known})
        return name

    return AfterValidator(check)


TargetName = Annotated[
    str,
    named_in(TARGETS),
    tyro.conf.arg(metavar="{" + ",".join(TARGETS) + "}", help=f"What is reconstructed. {listed(TARGETS)}."),
]
MaskName = Annotated[
    str,
    named_in(MASKS),
    tyro.conf.arg(metavar="{" + ",".join(MASKS) + "}", help=f"Which patches are hidden. {listed(MASKS)}."),
]

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are cut."""

    __pydantic_config__ = _STRICT

    data: str = ""
    """Images to learn from: a folder, list.txt, table.csv, table.parquet, 'shards-{000..009}.tar', a URL of one of
    these (https://, s3://, gs://), hf:NAME[@split], hf-stream:NAME[@split], a folder saved by datasets, or shapes:N.
    Each data process unpacks .tar.gz shards into its memory; .tar is read in place and better for large sets."""
    image_size: tuple[Positive, ...] = (224, 224)
    """Height and width of the crops, pixels (one number: square); the patch size must divide both."""
    channels: Positive = 3
    """Channels of the images."""
    value_range: tuple[float, ...] = ()
    """Lowest and highest value of images that are not 8-bit: what becomes 0 and 1 (nothing is clipped); empty: found
    in the data. 8-bit values are always 0 to 255."""
    no_data: float | None = None
    """Value of pixels without data, as stored in the files (in all bands); their patches are left out of loss, ranking
    and mask choice, as fully transparent ones are. NaN never counts as data."""
    download_gigabytes: PositiveFloat = 100.0
    """Disk space for shards from far away. A set that fits is fetched first and shuffled as a whole; of a larger one
    shards are shuffled and half of this space at a time is shuffled together, so this decides the order."""
    crop_scale: tuple[Share, Share] = (0.2, 1.0)
    """Area of the random resized crop, share of the image (1 1: no crop, only resize)."""
    flip: bool = True
    """Mirror half of the images."""
    crops_per_image: Positive = 1
    """Crops of every decoded image in a batch, each seen with masks_per_image masks; batch_size and epochs count
    views."""
    jpeg_scaling: bool = True
    """Decode a JPEG at a half, a quarter or an eighth of its size where the crop is at least so many times larger than
    image_size: many times quicker for large photographs; crops shift by at most half a pixel."""
    mean: tuple[float, ...] = ()
    """Channel means, of values in 0..1; empty: ImageNet's for 3 channels of 8 bits, measured on the data otherwise."""
    std: tuple[PositiveFloat, ...] = ()
    """Channel standard deviations; empty as for mean."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the crops."""
        return self.image_size[0], self.image_size[-1]


@dataclass(frozen=True)
class ModelConfig:
    """Encoder and decoders."""

    __pydantic_config__ = _STRICT

    encoder: str = "vit_base_patch16_224"
    """Any timm VisionTransformer."""
    init_from: str = ""
    """Weights to continue from: a run folder, a published HPM or MAE file, a Hugging Face MAE folder, or timm:NAME;
    none: a random start. Other image sizes and channels are adapted."""
    patch_size: Positive | None = None
    """Side of a patch, pixels; none: the encoder's own."""
    encoder_width: Positive | None = None
    """Token width of the encoder; none: its own."""
    encoder_depth: Positive | None = None
    """Blocks of the encoder; none: its own."""
    encoder_heads: Positive | None = None
    """Attention heads of the encoder; none: its own."""
    decoder_width: Positive = 512
    """Token width of reconstructor and loss predictor."""
    decoder: Literal["self", "cross"] = "self"
    """Reconstructor and loss predictor: self-attention over visible and mask tokens (published), or cross-attention
    from mask tokens to visible ones (CrossMAE), several times cheaper."""
    decoder_depth: Positive = 8
    """Blocks of the reconstructor."""
    decoder_heads: Positive = 16
    """Attention heads of reconstructor and loss predictor."""
    predictor_depth: Positive = 8
    """Blocks of the loss predictor."""
    teacher_reduction: Positive = 1
    """The teacher looks at the image this many times smaller per side (published: 1); 2 costs it a quarter."""


@dataclass(frozen=True)
class MethodConfig:
    """What is hidden, what is reconstructed, how the loss is predicted."""

    __pydantic_config__ = _STRICT

    target: TargetName = "pixels"
    target_model: str = ""
    """timm model behind target timm_features, e.g. vit_base_patch16_224.dino, or local-dir:PATH for saved weights."""
    tokenizer: str = ""
    """Behind target tokens, module:function that returns a torch module images (B C H W) -> integers (B, N) with an
    attribute vocabulary; none: the embedded k-means codebook."""
    num_tokens: Annotated[int, Field(ge=2)] = 1024
    """Entries of the embedded k-means codebook."""
    mask: MaskName = "hard"
    guide: Literal["scout", "variance"] | None = None
    """What tells masks hard, easy and proportional which patches are hard, in place of the teacher's predicted loss
    (published; none): a scout, a tiny network that looks at the pixels and needs no teacher, or each patch's
    variance."""
    mask_ratio: OpenShare = 0.75
    """Share of the patches that is hidden."""
    decoded_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the hidden patches that is decoded, drawn at random (published: all)."""
    masks_per_image: Positive = 1
    """Masks of every image in a batch: its views. One pass of the teacher, and one decoded file, serve them all;
    batch_size and epochs count views."""
    hard_share_start: Share = 0.0
    """a_0, share of the hidden patches chosen by predicted loss (or attention) at the start; the rest is random."""
    hard_share_end: Share = 0.5
    """a_T, the same at the end."""
    hard_share_unit: Literal["step", "epoch"] = "step"
    """How the share grows: every step (paper) or every epoch (published code)."""
    predicted_loss: Literal["relative", "absolute", "none"] = "relative"
    """Loss predictor: ranks pairs of patches, regresses the loss, or none (MAE)."""
    predictor_view: Literal["masked", "full", "both"] = "masked"
    """View on which the loss predictor learns: masked view (published), full view (where it is asked), or both."""
    predictor_detached: bool = False
    """Cut the gradient of the predictor's loss before the encoder and the shared decoder input (published: do not)."""
    prediction_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the predictor's loss in the total."""
    hardness_block: Positive = 1
    """The loss predictor learns, and patches are mined by, the error of the means of blocks of this many pixels a side
    (published: 1, every pixel): fine texture and noise, which nobody can predict, no longer count as hard."""
    hardness_in_pixels: bool = False
    """With norm_pix: the loss predictor learns, and patches are mined by, the error in pixels, as where HPM was
    published, so that flat patches do not count as hard (published with target pixels only)."""
    mining_threshold: Share | None = None
    """Masks stay random while the running rank correlation of predicted and true loss is below this; none: 0.3 with a
    scout and for a run that starts from weights (init_from), else 0, which is never wait (published)."""

    @property
    def guided_by(self) -> Guide | None:
        """What guides the masks; None: nothing."""
        return guide_of(self.mask, self.guide)

    @property
    def learns_hardness(self) -> bool:
        """Does anything learn what is hard: a loss predictor, or a scout?"""
        return self.predicted_loss != "none" or self.guided_by == "scout"

    @property
    def largest_hard_share(self) -> float:
        """The share that figures show: what the run asks at its hardest."""
        return max(self.hard_share_start, self.hard_share_end)


@dataclass(frozen=True)
class OptimisationConfig:
    """Length of the run, optimizer, schedules."""

    __pydantic_config__ = _STRICT

    epochs: Positive = 200
    """Passes over the data."""
    batch_size: Positive = 256
    """Images per optimizer step over all processes."""
    base_learning_rate: PositiveFloat = 1.5e-4
    """Peak learning rate per 256 images of batch."""
    learning_rate_schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: half a cosine down to 0 (published), or constant and only in the last cooldown_epochs down to
    0. A run with a constant rate can be made longer or shorter afterwards (hardpatch pretrain --branch-from)."""
    cooldown_epochs: PositiveFloat | None = None
    """Last epochs of a constant learning rate, in which it falls to 0; none: a fifth of the run."""
    schedule_epochs: Positive | None = None
    """Length that warm-up, EMA and hard share are adapted to, epochs; none: epochs. In a longer
    run they stay at their ends."""
    warmup_epochs: Annotated[float, Field(ge=0)] | None = None
    """Linear warm-up, epochs; none: a tenth of the run, at most the published 25,000 steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """AdamW's weight decay, not on biases and one-dimensional tensors."""
    betas: tuple[OpenShare, OpenShare] = (0.9, 0.95)
    """AdamW's betas."""
    gradient_clip: PositiveFloat | None = 5.0
    """Clip the global gradient norm; none: do not."""
    ema_start: Share | None = None
    """Teacher's EMA decay at the start; none: adapted to the length of the run."""
    ema_end: Share | None = None
    """Teacher's EMA decay after the ramp; none: adapted."""
    ema_ramp_epochs: Annotated[float, Field(ge=0)] | None = None
    """Length of the ramp, epochs; none: adapted."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of initialisation, order, crops and masks."""


@dataclass(frozen=True)
class RunConfig:
    """The machine, and how the run goes; nothing here changes what is learnt (beyond rounding)."""

    __pydantic_config__ = _STRICT

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device; auto: CUDA, then MPS, then CPU."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Autocast precision; auto: bf16 where the hardware has it."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the transformer blocks; auto: on CUDA (on a CPU it gains a twentieth and costs a minute)."""
    sharding: Literal["none", "full"] = "none"
    """Across processes: none: each holds the whole model (DDP); full: each holds a share of student, teacher, gradients
    and optimizer (fully_shard), for models that one device cannot hold. Checkpoints are the same."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the transformer blocks for the backward pass and compute the rest again: about a quarter
    more time for a fraction of the memory."""
    micro_batch_size: Positive | None = None
    """Images per process and forward pass; gradients are accumulated up to batch_size. None: all at once."""
    workers: NotNegative | None = None
    """Data processes per training process; none: 1 per core beyond the first, at most 8."""
    download_dir: str = ""
    """Folder for shards from far away, shared by all runs; empty: ~/.cache/hardpatch."""
    cache: Literal["auto", "ram", "device", "none"] = "auto"
    """Keep decoded images for later epochs: in RAM shared by all processes of the machine, or on the device, where they
    are cropped, too (other processes do nothing; needs no_jpeg_scaling or images under twice image_size). auto: RAM if
    they fit into half of what is free. JPEGs that jpeg_scaling decodes at a fraction are not kept."""
    augmentation: Literal["workers", "device"] = "workers"
    """Who crops the images: the data processes, or whole JPEGs are decoded (CUDA) and all images cropped on the
    device; the same crops, up to the rounding of decoders (a few grey levels)."""
    deterministic: bool = False
    """Use only deterministic kernels (slower on CUDA; a CPU is deterministic anyway)."""
    max_damaged: Share = 0.01
    """Stop when more than this share of all images turns out to be damaged."""
    log_steps: Positive = 20
    """Steps between two records in metrics.jsonl."""
    trackers: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Also send metrics, figures and config there; their packages are yours to install and configure. A run that goes
    on continues its run there."""
    tracker_project: str = "hardpatch"
    """Project (wandb, trackio) or experiment (mlflow) of the trackers."""
    checkpoint_steps: Positive | None = None
    """Steps between two checkpoints with figures; none: a tenth of the run."""
    checkpoint_minutes: PositiveFloat = 10.0
    """Save at least this often, minutes."""
    keep_last: Positive = 3
    """Keep this many of the newest checkpoints."""
    keep_steps: Positive | None = None
    """Keep checkpoints of every multiple of this step for good."""
    val: str = ""
    """Labelled images for kNN accuracy; without them, labelled training images are split during training."""
    knn: bool = True
    """Measure kNN accuracy at every checkpoint where labels exist."""
    knn_images: Positive = 2000
    """Labelled images that the neighbours are looked for among, during training."""
    figures: bool = True
    """Draw hardness figures at every checkpoint and the report at the end."""
    num_figure_images: Positive = 6
    """Images in the hardness figures."""
    display_channels: tuple[NotNegative, ...] = ()
    """Channels shown as red, green and blue in figures, counted from 0 (one: grey); empty: grey and colour as they are,
    of more channels the first three principal components."""


@dataclass(frozen=True)
class Config:
    """A whole pre-training run."""

    __pydantic_config__ = _STRICT

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optimisation: OptimisationConfig = field(default_factory=OptimisationConfig)
    run: RunConfig = field(default_factory=RunConfig)
