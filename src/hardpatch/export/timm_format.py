"""timm: a folder for ``local-dir:`` (and for the hub), or one file of weights under timm's names."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from hardpatch.export.backbone import Backbone, Computed
from hardpatch.runs.checkpoint import save_weights

_OF_OTHER_WEIGHTS = ("url", "file", "hf_hub_id", "license", "origin_url", "paper_name", "paper_ids", "notes")
"""What timm says of the weights that an architecture usually comes with; these are others."""


def write_folder(backbone: Backbone, to: Path) -> None:
    """``config.json`` and ``model.safetensors``; of a classifier with its head and the names of its classes."""
    cfg = backbone.vit.pretrained_cfg
    for key in _OF_OTHER_WEIGHTS:
        cfg.pop(key, None)
    cfg["tag"] = "hardpatch"
    arguments = {key: value for key, value in backbone.arguments.items() if key not in ("model_name", "num_classes")}
    named = {"label_names": backbone.classes} if backbone.classes else {}
    save_for_hf(backbone.vit, str(to), model_config=named, model_args=arguments, safe_serialization=True)


def read_folder(path: Path, backbone: Backbone) -> Computed:
    """Read it as a user of timm who knows nothing but the folder."""
    del backbone
    return _computed(timm.create_model(f"local-dir:{path}", pretrained=True))


def write_file(backbone: Backbone, to: Path) -> None:
    """The encoder's tensors; what builds it stands in the file's metadata, for ``hardpatch.load_encoder``."""
    save_weights(to, backbone.vit.state_dict(), backbone.arguments, backbone.input)


def read_file(path: Path, backbone: Backbone) -> Computed:
    """Read it as a user of timm who has the arguments from the model card."""
    return _computed(timm.create_model(**backbone.arguments, checkpoint_path=str(path)))


def _computed(vit: VisionTransformer) -> Computed:
    vit.eval()

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        found: Tensor = vit(images) if vit.num_classes else vit.forward_features(images)
        return found

    return run
