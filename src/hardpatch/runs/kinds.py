"""What a file or folder of weights is, said to the user who gave it to a command that cannot use it.

Nothing here is asked where all is well: whoever reads weights says with :func:`what_it_is` what it got instead.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open

from hardpatch.runtime.errors import InputError

CLASSIFIER_FILE = "classifier.safetensors"
"""Where a fine-tuning keeps its classifier, in its folder."""
_GRAPHS = {".onnx": "an ONNX graph", ".pt2": "a program of torch.export"}
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


class WrongKind(InputError):  # noqa: N818  (as Interrupted: it says what happened)
    """Weights that are whole, and of another kind than was asked for."""


def what_it_is(path: str | Path) -> str:
    """What lies there and what can be done with it, as the end of a sentence; empty: nobody knows.

    Args:
        path: A file or a folder that exists.
    """
    path = Path(path).expanduser()
    try:
        return _folder(path) if path.is_dir() else _file(path)
    except (OSError, ValueError, yaml.YAMLError, SafetensorError):
        return ""


def _folder(path: Path) -> str:
    if (path / CLASSIFIER_FILE).is_file() or "finetune" in _yaml(path / "config.yaml"):
        return (
            "the folder of a fine-tuning: give the run that it started from. Its classifier is for hardpatch.load_"
            f"classifier and hardpatch export --checkpoint {path / CLASSIFIER_FILE}"
        )
    if any(name.is_file() for name in (path / hub for hub in _HUB_FILES)):
        return _of_hub(path)
    if steps := sorted(path.glob("step_*.pt")):
        return _file(steps[-1]).replace("a checkpoint", "a folder of checkpoints", 1)
    if inside := sorted(child.name for child in path.iterdir() if (child / "checkpoints").is_dir()):
        return f"a folder of {len(inside)} run(s): give one of them, as {path / inside[0]}"
    if (path / "config.yaml").is_file() or (path / "checkpoints").is_dir():
        return "a run folder without a checkpoint yet: hardpatch pretrain --out with it makes the first one"
    return f"no run folder: it has no checkpoints; nor does it hold {' or '.join(_HUB_FILES)}"


def _of_hub(folder: Path) -> str:
    about = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    if "architecture" in about:
        return (
            f"a folder of timm: timm.create_model('local-dir:{folder}', pretrained=True) builds it, and "
            f"timm:local-dir:{folder} names it for --against and --init-from"
        )
    return (
        "a folder of Hugging Face: transformers.AutoModel.from_pretrained reads it, hardpatch pretrain --init-from "
        "starts from it, and hardpatch convert --from makes an encoder of it"
    )


def _file(path: Path) -> str:
    if path.suffix in _GRAPHS:
        return f"{_GRAPHS[path.suffix]}: an export, which nothing reads back; give the run that it was made from"
    if path.suffix == ".safetensors":
        return _of_safetensors(path)
    content = _pickle(path)
    if not isinstance(content, dict):
        return "" if content is None else f"a file of torch.save with a {type(content).__name__} in it, no weights"
    if {"student", "config"} <= content.keys():
        return "a checkpoint of a run: student, teacher and config"
    if {"model", "optimizer", "identity"} <= content.keys():
        return (
            "a checkpoint of a training of an evaluation (fine-tuning, segmentation or detection), for going on with "
            "it: give the run that was evaluated"
        )
    inside = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    if not any(str(name).endswith("patch_embed.proj.weight") for name in inside):
        return ""
    return (
        "a file of weights of another origin: hardpatch convert makes a checkpoint of hardpatch's of published HPM and "
        "MAE files, and hardpatch pretrain --init-from starts from one"
    )


def _of_safetensors(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        about, names = file.metadata() or {}, set(file.keys())
    about = json.loads(about.get("hardpatch") or about.get("hpm") or "{}")
    if not about:
        return _of_hub(path.parent) if path.name in _HUB_FILES else "weights without a description of their model"
    if is_classifier(about["timm"]):
        return (
            "a fine-tuned classifier: it is for hardpatch.load_classifier, hardpatch export and --against; give the "
            "run that it was fine-tuned from"
        )
    assert "patch_embed.proj.weight" in names or not names
    return "an encoder alone, without decoders and loss predictor: give the run folder or a .pt of its checkpoints"


def is_classifier(timm_arguments: dict[str, object]) -> bool:
    """Do these arguments of ``timm.create_model`` build a model with a classifier?"""
    return timm_arguments.get("num_classes") not in (None, 0)


def _yaml(path: Path) -> dict[str, object]:
    content = yaml.safe_load(path.read_text()) if path.is_file() else None
    return content if isinstance(content, dict) else {}


def _pickle(path: Path) -> object:
    """The content of a file of ``torch.save``, without its tensors' data; None: it is none."""
    try:
        return torch.load(path, map_location="meta", weights_only=True)
    except Exception:  # whatever unpickling of any file may raise: then it is not known what it is
        return None
