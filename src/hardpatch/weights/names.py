"""Other people's parameter names, and ours: the published HPM and MAE models, and Hugging Face's ViTMAE.

The published models keep the encoder flat (``blocks.0...``), and their two decoders under ``decoder_*`` and
``decoder_*_losspred``. Both position tables carry a first row for the class token (zero in the decoder). Hugging Face
keeps query, key and value apart; its names changed between versions, and both are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from hardpatch.runtime.errors import InputError

_PREFIXES = {  # ours, the published one
    "mask_token": "mask_token",
    "positions": "decoder_pos_embed",
    "decoder_embed.": "decoder_embed.",
    "predictor.blocks.": "decoder_blocks_losspred.",
    "predictor.norm.": "decoder_norm_losspred.",
    "predictor.head.": "decoder_pred_losspred.",
    "reconstructor.blocks.": "decoder_blocks.",
    "reconstructor.norm.": "decoder_norm.",
    "reconstructor.head.": "decoder_pred.",
}
_ENCODER = re.compile(
    r"cls_token|pos_embed|(patch_embed\.proj|norm|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12]))\.(weight|bias)"
)


def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a published HPM (or MAE) model to those of :class:`hardpatch.method.student.Student`.

    Raises:
        InputError: A name that no published model has, or a class token with a position in the decoder.
    """
    published = {theirs: ours for ours, theirs in _PREFIXES.items()}
    renamed = _renamed(
        state, lambda name: _with_prefix(name, published) or ("encoder." + name if _ENCODER.fullmatch(name) else None),
        "a published HPM or MAE model has no parameter",
    )  # fmt: skip
    return _without_class_row(renamed)


def to_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of :func:`from_published`.

    Raises:
        InputError: A tensor has no published counterpart (registers, layer scale, ...).
    """

    def encoder(name: str) -> str | None:
        bare = name.removeprefix("encoder.")
        return bare if bare != name and _ENCODER.fullmatch(bare) else None

    renamed = _renamed(
        state, lambda name: _with_prefix(name, _PREFIXES) or encoder(name),
        "the published models have no counterpart of",
    )  # fmt: skip
    if (table := renamed.get("decoder_pos_embed")) is not None:
        renamed["decoder_pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
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
    (r"attention\.(?:attention\.query|q_proj)\.(\w+)", r"attn.q.\1"),
    (r"attention\.(?:attention\.key|k_proj)\.(\w+)", r"attn.k.\1"),
    (r"attention\.(?:attention\.value|v_proj)\.(\w+)", r"attn.v.\1"),
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

    def rename(name: str) -> str | None:
        ours = _first_match(name.removeprefix("vit."), _HUGGING_FACE)
        if ours and (block := re.fullmatch(r"(\w+\.blocks\.\d+\.)(.+)", ours)):
            inside = _first_match(block[2], _HUGGING_FACE_BLOCK)
            return inside and block[1] + inside
        return ours

    renamed = _renamed(state, rename, "a ViTMAE of transformers has no parameter")
    for name in [name for name in renamed if ".q." in name or ".k." in name or ".v." in name]:
        joined = re.sub(r"\.[qkv]\.", ".qkv.", name)
        if joined not in renamed:
            parts = {part: renamed.get(joined.replace(".qkv.", f".{part}.")) for part in "qkv"}
            if missing := [part for part, tensor in parts.items() if tensor is None]:
                raise InputError(f"{joined}: has no {', '.join(missing)} of query, key and value")
            renamed[joined] = torch.cat([tensor for tensor in parts.values() if tensor is not None])
    return _without_class_row({name: tensor for name, tensor in renamed.items() if not re.search(r"\.[qkv]\.", name)})


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
    renamed = _renamed(
        state, lambda name: _first_match(name, _TO_HUGGING_FACE), "a ViT of transformers has no counterpart of"
    )
    split: dict[str, Tensor] = {}
    for name, tensor in renamed.items():
        pieces = zip(("query", "key", "value"), tensor.chunk(3)) if "{part}" in name else [("", tensor)]
        split |= {name.format(part=part): piece.clone() for part, piece in pieces}
    return split


def _renamed(state: Mapping[str, Tensor], rename: Callable[[str], str | None], complaint: str) -> dict[str, Tensor]:
    """The tensors under their new names."""
    names = {name: rename(name) for name in state}
    if unknown := [name for name, new in names.items() if new is None]:
        raise InputError(f"{complaint} {handful(unknown)}")
    return {new: state[name] for name, new in names.items() if new is not None}


def _with_prefix(name: str, prefixes: Mapping[str, str]) -> str | None:
    """The name with its prefix exchanged; None where it has none of these."""
    return next((new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old)), None)


def _first_match(name: str, patterns: Iterable[tuple[str, str]]) -> str | None:
    """The name after the first pattern that fits the whole of it."""
    for pattern, replacement in patterns:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return None


def _without_class_row(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's position table without its first row, in which nothing may stand: ours has none."""
    if (table := state.get("positions")) is None:
        return state
    if table.ndim != 3 or table[:, :1].any():
        raise InputError(
            f"decoder_pos_embed: must be (1, 1 + N, width) with zeros for the class token, got {tuple(table.shape)}"
            + (" with a class token that has a position" if table.ndim == 3 else "")
        )
    return {**state, "positions": table[:, 1:]}


def handful(items: list[str], *, most: int = 5, separator: str = ", ") -> str:
    """The first few, and how many more there are."""
    more = len(items) - most
    return separator.join([*items[:most], *([f"and {more} more"] if more > 0 else [])])
