"""Other people's parameter names, and ours: the published HPM and MAE models, and Hugging Face's ViTMAE.

The published models keep the encoder flat (``blocks.0...``), and their two decoders under ``decoder_*`` and
``decoder_*_losspred``. Both position tables carry a first row for the class token (zero in the decoder). Hugging Face
keeps query, key and value apart; its names changed between versions, and both are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from hardpatch.runtime.errors import InputError

_PREFIXES = (  # published prefix, ours; the order matters: the first that fits is taken
    ("decoder_embed.", "decoder_embed."),
    ("decoder_blocks_losspred.", "predictor.blocks."),
    ("decoder_norm_losspred.", "predictor.norm."),
    ("decoder_pred_losspred.", "predictor.head."),
    ("decoder_blocks.", "reconstructor.blocks."),
    ("decoder_norm.", "reconstructor.norm."),
    ("decoder_pred.", "reconstructor.head."),
)
_ENCODER = re.compile(
    r"cls_token|pos_embed|(patch_embed\.proj|norm|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12]))\.(weight|bias)"
)


def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a published HPM (or MAE) model to those of :class:`hardpatch.method.student.Student`.

    Args:
        state: Tensors under the published parameter names.

    Raises:
        InputError: A name that no published model has, or a class token with a position in the decoder.
    """
    renamed, unknown = {}, []
    for name, tensor in state.items():
        if name == "mask_token":
            renamed[name] = tensor
        elif name == "decoder_pos_embed":
            renamed["positions"] = _without_class_row(tensor)
        elif prefix := next(((a, b) for a, b in _PREFIXES if name.startswith(a)), None):
            renamed[prefix[1] + name.removeprefix(prefix[0])] = tensor
        elif _ENCODER.fullmatch(name):
            renamed["encoder." + name] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise InputError(f"a published HPM or MAE model has no parameter {handful(unknown)}")
    return renamed


def to_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of :func:`from_published`.

    Raises:
        InputError: A tensor has no published counterpart (registers, layer scale, ...).
    """
    renamed, unknown = {}, []
    for name, tensor in state.items():
        if name == "mask_token":
            renamed[name] = tensor
        elif name == "positions":
            renamed["decoder_pos_embed"] = torch.cat([torch.zeros_like(tensor[:, :1]), tensor], dim=1)
        elif prefix := next(((a, b) for a, b in _PREFIXES if name.startswith(b)), None):
            renamed[prefix[0] + name.removeprefix(prefix[1])] = tensor
        elif name.startswith("encoder.") and _ENCODER.fullmatch(name.removeprefix("encoder.")):
            renamed[name.removeprefix("encoder.")] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise InputError(f"the published models have no counterpart of {handful(unknown)}")
    return renamed


_HUGGING_FACE = (  # pattern of a whole name, ours; the order matters: the first that fits is taken
    (r"embeddings\.cls_token", "encoder.cls_token"),
    (r"embeddings\.position_embeddings", "encoder.pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"encoder.patch_embed.proj.\1"),
    (r"(?:encoder\.layer|layers)\.(\d+)\.(.+)", r"encoder.blocks.\1.\2"),
    (r"layernorm\.(\w+)", r"encoder.norm.\1"),
    (r"decoder\.mask_token", "mask_token"),
    (r"decoder\.decoder_pos_embed", "positions"),
    (r"decoder\.decoder_embed\.(\w+)", r"decoder_embed.\1"),
    (r"decoder\.(?:decoder_encoder\.layer|decoder_layers)\.(\d+)\.(.+)", r"reconstructor.blocks.\1.\2"),
    (r"decoder\.decoder_norm\.(\w+)", r"reconstructor.norm.\1"),
    (r"decoder\.decoder_pred\.(\w+)", r"reconstructor.head.\1"),
)
_HUGGING_FACE_BLOCK = (  # inside a block
    (r"attention\.(?:attention\.(q)uery|(q)_proj)\.(\w+)", r"attn.qkv.\3"),
    (r"attention\.(?:attention\.(k)ey|(k)_proj)\.(\w+)", r"attn.qkv.\3"),
    (r"attention\.(?:attention\.(v)alue|(v)_proj)\.(\w+)", r"attn.qkv.\3"),
    (r"attention\.(?:output\.dense|o_proj)\.(\w+)", r"attn.proj.\1"),
    (r"layernorm_before\.(\w+)", r"norm1.\1"),
    (r"layernorm_after\.(\w+)", r"norm2.\1"),
    (r"(?:intermediate\.dense|mlp\.fc1)\.(\w+)", r"mlp.fc1.\1"),
    (r"(?:output\.dense|mlp\.fc2)\.(\w+)", r"mlp.fc2.\1"),
)


def from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a ViTMAE or ViT of transformers to those of :class:`hardpatch.method.student.Student`.

    Args:
        state: Tensors of ``ViTMAEForPreTraining``, or of an encoder alone; query, key and value are joined.

    Raises:
        InputError: A name that no such model has, or a class token with a position in the decoder.
    """
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in state.items():
        ours = _first_match(name.removeprefix("vit."), _HUGGING_FACE)
        if ours and (block := re.fullmatch(r"(\w+\.blocks\.\d+\.)(.+)", ours)):
            inside = _first_match(block[2], _HUGGING_FACE_BLOCK)
            ours = inside and block[1] + inside
            if inside and inside.startswith("attn.qkv."):
                parts.setdefault(block[1] + inside, {})[re.sub(r".*\.([qkv])\w*\.\w+", r"\1", block[2])] = tensor
                continue
        if ours is None:
            unknown.append(name)
        elif ours == "positions":
            renamed[ours] = _without_class_row(tensor)
        else:
            renamed[ours] = tensor
    if unknown:
        raise InputError(f"a ViTMAE of transformers has no parameter {handful(unknown)}")
    for name, qkv in parts.items():
        if qkv.keys() != set("qkv"):
            raise InputError(f"{name}: has only {', '.join(sorted(qkv))} of query, key and value")
        renamed[name] = torch.cat([qkv[part] for part in "qkv"])
    return renamed


_TO_HUGGING_FACE = (  # pattern of a whole name of timm's ViT, and that of the hub's ViTs
    (r"cls_token", "embeddings.cls_token"),
    (r"pos_embed", "embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(\w+)", r"embeddings.patch_embeddings.projection.\1"),
    (r"norm\.(\w+)", r"layernorm.\1"),
    (r"blocks\.(\d+)\.norm1\.(\w+)", r"encoder.layer.\1.layernorm_before.\2"),
    (r"blocks\.(\d+)\.norm2\.(\w+)", r"encoder.layer.\1.layernorm_after.\2"),
    (r"blocks\.(\d+)\.attn\.qkv\.(\w+)", r"encoder.layer.\1.attention.attention.{part}.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"encoder.layer.\1.attention.output.dense.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"encoder.layer.\1.intermediate.dense.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"encoder.layer.\1.output.dense.\2"),
)


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an encoder (timm's names) to those of the hub's ViTs; query, key and value are split.

    Raises:
        InputError: A tensor has no counterpart there (registers, layer scale, ...).
    """
    renamed, unknown = {}, []
    for name, tensor in state.items():
        theirs = _first_match(name, _TO_HUGGING_FACE)
        if theirs is None:
            unknown.append(name)
        elif "{part}" in theirs:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3)):
                renamed[theirs.format(part=part)] = piece.clone()
        else:
            renamed[theirs] = tensor.clone()
    if unknown:
        raise InputError(f"a ViT of transformers has no counterpart of {handful(unknown)}")
    return renamed


def _first_match(name: str, patterns: Iterable[tuple[str, str]]) -> str | None:
    """The name after the first pattern that fits the whole of it."""
    for pattern, replacement in patterns:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return None


def _without_class_row(table: Tensor) -> Tensor:
    """The decoder's position table without its first row, in which nothing may stand: ours has none."""
    if table.ndim != 3 or table[:, :1].any():
        raise InputError(
            f"decoder_pos_embed: must be (1, 1 + N, width) with zeros for the class token, got {tuple(table.shape)}"
            + (" with a class token that has a position" if table.ndim == 3 else "")
        )
    return table[:, 1:]


def handful(items: list[str], *, most: int = 5, separator: str = ", ") -> str:
    """The first few, and how many more there are."""
    more = len(items) - most
    return separator.join([*items[:most], *([f"and {more} more"] if more > 0 else [])])
