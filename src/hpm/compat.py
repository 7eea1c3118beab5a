"""Published checkpoints: the parameter names of the released HPM code, and ours.

The published model keeps the encoder flat (``blocks.0...``), and its two decoders under ``decoder_*`` and
``decoder_*_losspred``. Both position tables carry a first row for the class token (zero in the decoder).
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

_PREFIXES = (  # published prefix, ours; the order matters: the first that fits is taken
    ("decoder_embed.", "decoder_embed."),
    ("decoder_blocks_losspred.", "predictor.blocks."),
    ("decoder_norm_losspred.", "predictor.norm."),
    ("decoder_pred_losspred.", "predictor.head."),
    ("decoder_blocks.", "reconstructor.blocks."),
    ("decoder_norm.", "reconstructor.norm."),
    ("decoder_pred.", "reconstructor.head."),
)
_ENCODER = re.compile(r"(cls_token$|pos_embed$|patch_embed\.|blocks\.|norm\.)")


def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a published HPM (or MAE) model to those of :class:`hpm.method.Student`.

    Args:
        state: Tensors under the published parameter names.

    Raises:
        KeyError: A name that no published model has.
    """
    renamed = {}
    for name, tensor in state.items():
        if name == "mask_token":
            renamed[name] = tensor
        elif name == "decoder_pos_embed":
            renamed["positions"] = tensor[:, 1:]
        elif prefix := next(((a, b) for a, b in _PREFIXES if name.startswith(a)), None):
            renamed[prefix[1] + name.removeprefix(prefix[0])] = tensor
        elif _ENCODER.match(name):
            renamed["encoder." + name] = tensor
        else:
            raise KeyError(f"{name!r} is no parameter of a published HPM or MAE model")
    return renamed


def to_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of :func:`from_published`, for encoders with a class token and no registers."""
    renamed = {}
    for name, tensor in state.items():
        if name == "mask_token":
            renamed[name] = tensor
        elif name == "positions":
            renamed["decoder_pos_embed"] = torch.cat([torch.zeros_like(tensor[:, :1]), tensor], dim=1)
        elif name.startswith("encoder."):
            renamed[name.removeprefix("encoder.")] = tensor
        else:
            published, ours = next((a, b) for a, b in _PREFIXES if name.startswith(b))
            renamed[published + name.removeprefix(ours)] = tensor
    return renamed
