"""Hugging Face: an ordinary ``ViTModel`` of transformers, and the image processor that prepares its images.

The weights are written under the names that the hub's ViTs have; every version of transformers reads those. The
pooler, which an hardpatch encoder does not have, is the identity: ``pooler_output`` is the class token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from hardpatch.export.backbone import Backbone, Computed
from hardpatch.runtime.errors import InputError
from hardpatch.weights.names import to_hugging_face

_BICUBIC = 3


def check(backbone: Backbone) -> None:
    """Can transformers' ``ViTModel`` compute what this encoder computes?

    Raises:
        InputError: It cannot; says what it has no place for.
    """
    vit = backbone.vit
    if vit.num_classes:
        _refuse(backbone, "it is a fine-tuned classifier, which averages patch tokens and normalises afterwards")
    if not vit.has_class_token:
        _refuse(backbone, "it has no class token")
    if vit.num_prefix_tokens != 1:
        _refuse(backbone, f"it has {vit.num_prefix_tokens - 1} register tokens")
    if vit.no_embed_class:
        _refuse(backbone, "its class token has no place in the position table")
    if not isinstance(vit.norm_pre, nn.Identity) or not isinstance(vit.patch_embed.norm, nn.Identity):
        _refuse(backbone, "it normalises tokens before the first block")
    for block in vit.blocks:
        _check_block(backbone, block)
    norms = [vit.norm, *(norm for block in vit.blocks for norm in (block.norm1, block.norm2))]
    if wrong := next((norm for norm in norms if not isinstance(norm, nn.LayerNorm) or norm.weight is None), None):
        _refuse(backbone, f"it normalises by {type(wrong).__name__}")
    if len(eps := {norm.eps for norm in norms}) > 1:
        _refuse(backbone, f"its norms have different eps {sorted(eps)}")


def _check_block(backbone: Backbone, block: nn.Module) -> None:
    """The same for one block."""
    attention: Any = getattr(block, "attn", None)
    mlp: Any = getattr(block, "mlp", None)
    if type(block) is not Block or type(attention) is not Attention or type(mlp) is not Mlp:
        parts = f"{type(attention).__name__} and {type(mlp).__name__}"
        _refuse(backbone, f"its blocks are of another kind ({type(block).__name__} of {parts})")
    if not isinstance(block.ls1, nn.Identity) or not isinstance(block.ls2, nn.Identity):
        _refuse(backbone, "its blocks scale their outputs (layer scale)")
    if not isinstance(attention.q_norm, nn.Identity) or not isinstance(attention.k_norm, nn.Identity):
        _refuse(backbone, "it normalises queries and keys")
    if not isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity):
        _refuse(backbone, "it normalises inside the attention")
    if not isinstance(mlp.norm, nn.Identity):
        _refuse(backbone, "it normalises inside the MLP")
    if getattr(attention, "gate", None) is not None:
        _refuse(backbone, "its attention is gated")
    if _activation(mlp.act) is None:
        _refuse(backbone, f"its activation is {mlp.act}")


def _activation(act: nn.Module) -> str | None:
    """transformers' name of an activation."""
    if isinstance(act, nn.GELU):
        return "gelu" if act.approximate == "none" else "gelu_pytorch_tanh"
    return {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh", "SiLU": "silu", "ReLU": "relu"}.get(
        type(act).__name__
    )


def _refuse(backbone: Backbone, reason: str) -> NoReturn:
    raise InputError(
        f"format: 'hf' writes an ordinary ViT of transformers, and {backbone.arguments['model_name']!r} is none: "
        f"{reason}; use timm, onnx or torch"
    )


def write_folder(backbone: Backbone, to: Path) -> None:
    """``config.json``, ``model.safetensors`` and ``preprocessor_config.json``."""
    from transformers import ViTConfig

    vit = backbone.vit
    to.mkdir()
    config = ViTConfig(**_model_config(backbone), architectures=["ViTModel"])
    config.save_pretrained(to)
    save_file(_with_identity_pooler(to_hugging_face(vit.state_dict()), vit), to / "model.safetensors", {"format": "pt"})
    (to / "preprocessor_config.json").write_text(json.dumps(processor_config(backbone), indent=2) + "\n")


def _model_config(backbone: Backbone) -> dict[str, Any]:
    """The fields of ``ViTConfig``."""
    vit = backbone.vit
    block, (channels, height, width) = vit.blocks[0], backbone.image_shape
    patch_height, patch_width = map(int, vit.patch_embed.patch_size)
    return {
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": _activation(block.mlp.act),
        "layer_norm_eps": vit.norm.eps,
        "image_size": height if height == width else [height, width],
        "patch_size": patch_height if patch_height == patch_width else [patch_height, patch_width],
        "num_channels": channels,
        "qkv_bias": block.attn.qkv.bias is not None,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pooler_output_size": vit.embed_dim,
        "pooler_act": "linear",
    }


def _with_identity_pooler(state: dict[str, Tensor], vit: VisionTransformer) -> dict[str, Tensor]:
    width = vit.embed_dim
    return {**state, "pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}


def processor_config(backbone: Backbone) -> dict[str, Any]:
    """Resize and normalise as in the run.

    Square images are resized to cover and cut to their centre, as hardpatch does; transformers has no processor that
    does so for a rectangle: there the whole image is squeezed into it.
    """
    _, height, width = backbone.image_shape
    square = height == width
    return {
        "image_processor_type": "BitImageProcessor" if square else "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": height} if square else {"height": height, "width": width},
        "resample": _BICUBIC,
        **({"do_center_crop": True, "crop_size": {"height": height, "width": width}} if square else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(backbone.input["mean"]),
        "image_std": list(backbone.input["std"]),
        "do_convert_rgb": backbone.image_shape[0] == 3,
    }


def read_folder(path: Path, backbone: Backbone) -> Computed:
    """Read it as a user of transformers who knows nothing but the folder."""
    from transformers import AutoModel
    from transformers.utils import logging

    del backbone
    shows_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, found = AutoModel.from_pretrained(path, output_loading_info=True)
    finally:
        if shows_bar:
            logging.enable_progress_bar()
    wrong = {kind: names for kind, names in found.items() if names}
    if wrong:
        raise AssertionError(f"transformers does not find what was written: {wrong}")
    model.eval()

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        tokens: Tensor = model(pixel_values=images).last_hidden_state
        return tokens

    return run
