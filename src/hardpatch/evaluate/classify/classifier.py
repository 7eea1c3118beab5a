"""A classifier on a pre-trained encoder: built as a stock timm model, saved so that timm loads it again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn

from hardpatch.runs.checkpoint import save_weights
from hardpatch.runs.kinds import CLASSIFIER_FILE, what_it_is
from hardpatch.runs.load import load_timm_weights
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.seeding import Stream, derive_seed

HEAD_DEVIATION = 2e-5
INPUT = ("input_size", "mean", "std", "interpolation", "crop_pct")
"""How a model wants its images, in ``pretrained_cfg``."""


def classifier_arguments(encoder: dict[str, Any], num_classes: int) -> dict[str, Any]:
    """Arguments for ``timm.create_model`` to build the classifier: mean of the patch tokens, norm, linear layer."""
    return {**encoder, "num_classes": num_classes, "global_pool": "avg", "fc_norm": True}


def build_classifier(
    arguments: dict[str, Any], encoder: VisionTransformer, *, num_classes: int, drop_path: float, seed: int
) -> VisionTransformer:
    """A classifier that starts from an encoder; norm and head start fresh, positions are trained, as published.

    Args:
        encoder: With its weights; a head of its own is left aside.
        drop_path: Rate of the last block.
        seed: Of the head.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, Stream.INITIALISATION))
        model: VisionTransformer = timm.create_model(
            **classifier_arguments(arguments, num_classes), drop_path_rate=drop_path
        )
        nn.init.trunc_normal_(model.head.weight, std=HEAD_DEVIATION)
        nn.init.zeros_(model.head.bias)
    body = {name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith(("head.", "fc_norm."))}
    missing, unexpected = model.load_state_dict(body, strict=False)
    assert all(name.startswith(("fc_norm.", "head.")) for name in missing), missing
    assert all(name.startswith(("norm.", "attn_pool.")) for name in unexpected), unexpected
    model.pretrained_cfg.update({key: encoder.pretrained_cfg[key] for key in INPUT if key in encoder.pretrained_cfg})
    return model


def layer_groups(model: VisionTransformer, *, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Parameter groups with their share of the learning rate in ``lr_scale``: 1 for the head, less for layers below."""
    groups: list[dict[str, Any]] = param_groups_layer_decay(
        model, weight_decay=weight_decay, layer_decay=layer_decay, no_weight_decay_list=model.no_weight_decay()
    )
    return groups


def save_classifier(path: Path, model: VisionTransformer, arguments: dict[str, Any], classes: Sequence[str]) -> None:
    """Write a classifier with what timm needs to build it, its classes and how it wants its images."""
    wanted = {key: model.pretrained_cfg[key] for key in INPUT if key in model.pretrained_cfg}
    wanted |= {"num_classes": len(classes), "label_names": list(classes)}
    save_weights(path, model.state_dict(), classifier_arguments(arguments, len(classes)), wanted)


def load_classifier(path: str | Path) -> VisionTransformer:
    """A fine-tuned classifier as a plain timm model in evaluation mode.

    Its classes stand in ``pretrained_cfg["label_names"]``, how it wants its images stands where timm looks:
    ``timm.data.create_transform(**timm.data.resolve_model_data_config(model))``.

    Args:
        path: The folder of a fine-tuning, its ``classifier.safetensors``, or the run folder it lies in.

    Raises:
        InputError: Nothing there, or damaged.
    """
    given = Path(path).expanduser()
    candidates = [given / CLASSIFIER_FILE, given / "finetune" / CLASSIFIER_FILE] if given.is_dir() else [given]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        what = f", which is {found}" if given.exists() and (found := what_it_is(given)) else ""
        raise InputError(
            f"classifier: no {CLASSIFIER_FILE} in {str(given)!r}{what}; hardpatch evaluate finetune makes one"
        )
    model = load_timm_weights(file, field="classifier")
    if not model.num_classes:
        raise InputError(f"classifier: {str(file)!r} is {what_it_is(file)}, and no classifier")
    return model
