"""What ``hardpatch convert`` can be told: kept apart from what it does, so that ``--help`` need not import it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from hardpatch.config.fields import Positive, PositiveFloat, Settings


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
