"""Weights of any origin read into one form: tensors under the names of :class:`hardpatch.method.student.Student`.

    runs/photos, step_00001234.pt, weights.safetensors    ours
    mae_pretrain_vit_base.pth, checkpoint-199.pth, ...    published HPM and MAE files, whole or the encoder alone
    folder with model.safetensors or pytorch_model.bin    Hugging Face (ViTMAE, ViT) or timm
    timm:vit_base_patch16_224.mae                         timm, downloaded where need be

A pickle can run code when it is loaded. These are read with ``weights_only=True``: tensors come out, the few harmless
objects that such files hold besides (command line arguments, numpy scalars) become inert stand-ins, and a file that
asks for anything else is refused.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.serialization import safe_globals

from hardpatch.config.config import Config
from hardpatch.config.values import validated
from hardpatch.method.choices import MASKS, TARGETS
from hardpatch.method.vit import sincos_positions
from hardpatch.runs.build import build_encoder
from hardpatch.runs.checkpoint import verify
from hardpatch.runs.kinds import WrongKind, what_it_is
from hardpatch.runs.load import locate_checkpoint
from hardpatch.runtime.errors import InputError
from hardpatch.weights.names import from_hugging_face, from_published, handful


class Weights(NamedTuple):
    """The weights of a file, and what the file says about them."""

    source: str
    """Their origin, for messages."""
    student: dict[str, Tensor]
    """float32, under the names of :class:`hardpatch.method.student.Student`; the encoder is always there."""
    teacher: dict[str, Tensor] | None
    """The same of the EMA teacher; None where there is none that has learnt."""
    config: Config | None
    """The config of a run of ours."""
    grid: tuple[int, int] | None
    """Rows and columns of the patch grid, where the file says."""
    encoder_heads: int | None
    """Attention heads of the encoder, where the file says; no tensor's shape does."""
    decoder_heads: int | None
    """Attention heads of the decoders, where the file says."""
    epoch: int
    """Epochs it was trained for, where the file says; otherwise 0."""
    left_aside: tuple[str, ...]
    """Tensors of classifiers and the like."""

    def has(self, part: str) -> bool:
        """Is a part (``decoder_embed``, ``reconstructor``, ``predictor``) there?"""
        return any(name.startswith(part + ".") for name in self.student)


def read_weights(source: str | Path, *, field: str = "weights") -> Weights:
    """Read any of the forms above.

    Args:
        source: A file, a folder, or ``timm:NAME``.
        field: Name of the setting, for messages.

    Raises:
        InputError: Nothing there, damaged, no weights of a ViT, or a pickle that wants to run code.
    """
    try:
        if str(source).startswith("timm:"):
            return _from_timm(str(source))
        path = Path(source).expanduser()
        if path.is_dir():
            if (path / "config.yaml").is_file() or (path / "checkpoints").is_dir() or any(path.glob("step_*.pt")):
                return _from_run(str(source), locate_checkpoint(path))
            names = ("model.safetensors", "pytorch_model.bin")
            found = next((path / name for name in names if (path / name).is_file()), None)
            if found is None:
                raise WrongKind(f"holds no run and none of {', '.join(names)}")
            path = found
        elif not path.exists():
            raise InputError("does not exist")
        return _from_file(str(source), path)
    except WrongKind as error:
        what = what_it_is(source) if Path(source).expanduser().exists() else ""
        raise InputError(
            f"{field}: {str(source)!r} is {what}" if what else f"{field}: {str(source)!r}: {error}"
        ) from error
    except InputError as error:
        raise InputError(f"{field}: {str(source)!r}: {error}") from error


def _from_file(source: str, path: Path) -> Weights:
    """One file; ``config.json`` beside it says what Hugging Face's tensors do not."""
    if path.suffix == ".safetensors":
        try:
            content: Any = load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"damaged, or no safetensors file: {error}") from error
    else:
        content = read_pickle(path)
    if isinstance(content, dict) and {"student", "config"} <= content.keys():
        return _from_run(source, content)
    state, teacher = _find_states(content)
    student, left_aside = _to_ours(state)
    hints: dict[str, Any] = {}
    if _is_hugging_face(_bare(state)) and path.with_name("config.json").is_file():
        hints = _hugging_face_hints(path.with_name("config.json"))
    epoch = content.get("epoch")
    return Weights(
        source, student, _to_ours(teacher)[0] if teacher else None, None, hints.get("grid"), hints.get("heads"),
        hints.get("decoder_heads"), epoch if isinstance(epoch, int) else 0, left_aside,
    )  # fmt: skip


def _from_run(source: str, saved: dict[str, Any]) -> Weights:
    """A checkpoint of ours."""
    config = validated(saved["config"])
    method = config.method
    # Where nobody asks the teacher it is never updated: what was saved is the random start.
    learnt = method.predicted_loss != "none" or MASKS[method.mask].guide or TARGETS[method.target].needs_teacher
    student = _floats(saved["student"])
    vertical, horizontal = student["encoder.patch_embed.proj.weight"].shape[-2:]
    with torch.device("meta"):
        heads = build_encoder(config).blocks[0].attn.num_heads
    return Weights(
        source, student, _floats(saved["teacher"]) if learnt else None, config,
        (config.data.size[0] // vertical, config.data.size[1] // horizontal), heads, config.model.decoder_heads,
        saved.get("epoch", 0), (),
    )  # fmt: skip


def _from_timm(source: str) -> Weights:
    """An encoder with timm's own pretrained weights."""
    vit = load_timm(source)
    rows, columns = vit.patch_embed.grid_size
    student, left_aside = _to_ours(vit.state_dict())
    heads = vit.blocks[0].attn.num_heads
    return Weights(source, student, None, None, (int(rows), int(columns)), heads, None, 0, left_aside)


def load_timm(source: str) -> VisionTransformer:
    """A timm model with its weights; its head is there and left aside.

    Args:
        source: ``timm:NAME``, ``timm:local-dir:PATH`` or ``timm:hf-hub:NAME``.

    Raises:
        InputError: No such model, no weights, or it is no ``VisionTransformer``.
    """
    try:
        vit = timm.create_model(source.removeprefix("timm:"), pretrained=True)
    except Exception as error:  # whatever looking up, downloading and building may raise
        raise InputError(f"timm cannot load it: {type(error).__name__}: {error}") from error
    if not isinstance(vit, VisionTransformer):
        raise InputError(f"must be a timm VisionTransformer, got a {type(vit).__name__}")
    return vit


class _Inert:
    """Stands in for a harmless object of a pickle that nobody here asks for: takes anything, does nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


_HARMLESS = (
    "argparse.Namespace",
    *(f"pathlib{private}.{kind}Path" for private in ("", "._local") for kind in ("", "Posix", "Windows", "PurePosix")),
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float16", "Float32", "Float64", "Int32", "Int64", "Bool", "Str")),
)


def read_pickle(path: Path) -> Any:
    """The content of a file made by ``torch.save``: tensors and plain values, no code.

    Raises:
        InputError: Damaged, or it asks for anything but tensors, plain values and known harmless objects.
    """
    try:
        verify(path, require_checksum=False)
        with safe_globals([(_Inert, name) for name in _HARMLESS]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other pickle protocols: what cannot be read is an error below
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except PermissionError as error:
        raise InputError(f"cannot be read: {error.strerror}") from error
    except Exception as error:  # whatever unpickling a damaged file may raise
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(
                f"refused: loading it would call {asked[1]}, which weights have no need of; a pickle can run any code"
            ) from None
        # PyTorch's own words are left out: to what it will not load it adds advice to load it without protection.
        raise WrongKind("damaged, cut short, or no file of torch.save; nothing in it was run") from error


def _find_states(content: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The state dict of the model, and that of its EMA, in what a training script saved."""
    if not isinstance(content, dict):
        raise WrongKind(f"holds no weights but a {type(content).__name__}")
    teacher = next((content[key] for key in ("ema_state_dict", "model_ema", "state_dict_ema") if key in content), None)
    for key in ("state_dict", "model", "module"):
        if isinstance(content.get(key), dict):
            return content[key], teacher if isinstance(teacher, dict) else None
    return content, None


_LEFT_ASIDE = re.compile(r"(head|head_dist|fc_norm|pre_logits|classifier|pooler|vit\.pooler)\.|embeddings\.mask_token$")


def _to_ours(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Rename a state dict by whoever wrote it; and what was left aside."""
    bare = _bare(state)
    left_aside = tuple(name for name in bare if _LEFT_ASIDE.match(name))
    tensors = _floats({name: value for name, value in bare.items() if name not in left_aside})
    if "encoder.patch_embed.proj.weight" in tensors:
        student = tensors
    elif _is_hugging_face(tensors):
        student = from_hugging_face(tensors)
    elif "patch_embed.proj.weight" not in tensors:
        raise WrongKind(f"holds no ViT: no patch_embed.proj.weight among {handful(list(bare)) or 'nothing'}")
    elif any(name.startswith("decoder_") for name in tensors):
        student = from_published(tensors)
    else:  # an encoder alone: MAE's release, timm's models, our weights.safetensors all have timm's names
        if "mask_token" in tensors:
            tensors.pop("mask_token")
            left_aside += ("mask_token",)
        student = {"encoder." + name: tensor for name, tensor in tensors.items()}
    if student["encoder.patch_embed.proj.weight"].ndim != 4:
        shape = tuple(student["encoder.patch_embed.proj.weight"].shape)
        raise InputError(f"patch_embed.proj.weight: must be (width, channels, height, width), got {shape}")
    return student, left_aside


def _bare(state: Mapping[str, Any]) -> dict[str, Any]:
    """Without the prefixes of DDP and ``torch.compile``."""
    named = {str(name): value for name, value in state.items()}
    while named and (prefix := next((p for p in ("module.", "_orig_mod.") if all(n.startswith(p) for n in named)), "")):
        named = {name.removeprefix(prefix): value for name, value in named.items()}
    return named


def _is_hugging_face(names: Iterable[str]) -> bool:
    return any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in names)


def _floats(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor as float32."""
    if wrong := [f"{name} ({type(value).__name__})" for name, value in state.items() if not isinstance(value, Tensor)]:
        raise WrongKind(f"holds no weights: no tensors but {handful(wrong)}")
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise InputError(f"damaged or diverged: not every value is finite in {handful(broken)}")
    return {name: tensor.detach().float() for name, tensor in state.items()}


def _hugging_face_hints(path: Path) -> dict[str, Any]:
    """Heads and grid from a ``config.json``."""
    try:
        config = json.loads(path.read_text())
        size, patch = config.get("image_size"), config.get("patch_size")
        if isinstance(size, int) and isinstance(patch, int):
            size, patch = (size, size), (patch, patch)
        hints = {
            "heads": config.get("num_attention_heads"),
            "decoder_heads": config.get("decoder_num_attention_heads"),
            "grid": (size[0] // patch[0], size[1] // patch[1]) if size and patch else None,
        }
    except (OSError, ValueError, AttributeError, TypeError, LookupError) as error:
        raise InputError(f"{path.name} beside it cannot be read: {error}") from error
    if config.get("hidden_act", "gelu") != "gelu":
        raise InputError(f"hidden_act: must be 'gelu', as in timm's ViT, got {config['hidden_act']!r}")
    return hints


def table_grid(table: Tensor) -> tuple[int, int] | None:
    """Rows and columns of a position table (N, D): a sin-cos table shows them, a learnt one is taken for square."""
    number, width = table.shape
    pairs = [(rows, number // rows) for rows in range(1, number + 1) if number % rows == 0]
    for grid in pairs if width % 4 == 0 else []:
        if torch.allclose(sincos_positions(grid, width), table, rtol=0, atol=1e-3):
            return grid
    return next((grid for grid in pairs if grid[0] == grid[1]), None)


def mismatches(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Differences of tensors from what a model wants, in the model's order: name, shape found, shape wanted."""
    lines = [
        f"{name}: {tuple(found[name].shape) if name in found else 'missing'}, wanted {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name not in found or found[name].shape != tensor.shape
    ]
    return lines + [f"{name}: {tuple(found[name].shape)}, not wanted" for name in found if name not in wanted]
