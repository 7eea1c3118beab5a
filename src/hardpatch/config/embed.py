"""What ``hardpatch embed`` can be told: kept apart from what it does, so that ``--help`` need not import it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hardpatch.config.fields import NotNegative, Positive, Seed, Settings, Share

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
