"""What ``hardpatch export`` can be told: kept apart from what it does, so that ``--help`` need not import it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hardpatch.config.fields import Settings

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
