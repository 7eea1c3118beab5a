"""``hardpatch convert``: published HPM and MAE files into ours, and ours into theirs.

    --to FILE.pt             ours: student, teacher and config, for hardpatch visualize, evaluate and load_teacher
    --to FILE.safetensors    the encoder alone under timm's names, for hardpatch.load_encoder and timm
    --to FILE.pth            published names: {"state_dict", "model", "epoch"}, and "ema_state_dict" for a teacher

In a published file "state_dict" and "model" are the same tensors (stored once): HPM's and MAE's loaders ask for one or
the other. Without a loss predictor this is the layout of MAE. The names carry no DDP prefix. The optimizer is left out.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hardpatch.config.commands import ConvertConfig
from hardpatch.config.config import Config
from hardpatch.config.values import with_fields
from hardpatch.method.vit import LAYER_NORM_EPS
from hardpatch.runs.build import build_encoder, build_student, input_config, timm_arguments
from hardpatch.runs.checkpoint import save_pickle, save_weights
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.files import write_atomically
from hardpatch.runtime.log import read_metrics
from hardpatch.weights.adapt import PIXEL_TARGETS
from hardpatch.weights.names import handful, to_published
from hardpatch.weights.read import Weights, mismatches, read_weights, table_grid

Kind = Literal["checkpoint", "encoder", "published"]

_NAMED = {  # width, depth, patch size, heads
    (192, 12, 16, 3): "vit_tiny_patch16_224",
    (384, 12, 16, 6): "vit_small_patch16_224",
    (768, 12, 16, 12): "vit_base_patch16_224",
    (1024, 24, 16, 16): "vit_large_patch16_224",
    (1280, 32, 14, 16): "vit_huge_patch14_224",
}


class Converted(NamedTuple):
    """What was written."""

    to: str
    """The file."""
    kind: Kind
    """Ours, the encoder alone, or published names."""
    parts: list[str]
    """encoder, reconstructor, predictor: what it holds."""
    teacher: Literal["moving average", "copy of the student"] | None
    """Origin of the teacher in it; None: it holds none."""
    encoder: str
    """timm's name of the encoder."""
    encoder_heads: int
    """Attention heads of the encoder."""
    decoder_heads: int | None
    """Attention heads of the decoders."""
    image_size: tuple[int, int]
    """Height and width, pixels."""
    patch_size: int
    """Side of a patch, pixels."""
    tensors: int
    """Tensors of the student in it."""
    left_aside: tuple[str, ...]
    """Tensors of the source that are not in it."""


def run(config: ConvertConfig) -> Converted:
    """Read, check that everything fits together, write.

    Raises:
        InputError: Nothing to read, something without a counterpart, or a file in the way.
    """
    to, kind = _destination(config)
    weights = read_weights(config.source, field="from")
    whole = kind != "encoder"
    if kind == "checkpoint" and weights.config is not None:
        raise InputError(
            f"to: {config.source!r} is hardpatch's own already; write .pth or .safetensors, got {config.to!r}"
        )
    if whole and not weights.has("reconstructor"):
        raise InputError(
            f"from: {config.source!r} holds an encoder without reconstructor; write its encoder "
            f"(--to FILE.safetensors), or start a run from it (hardpatch pretrain --init-from {config.source})"
        )
    resolved = weights.config or inferred_config(weights, config)
    if kind == "published" and resolved.method.target not in PIXEL_TARGETS:
        raise InputError(
            f"from: {config.source!r} has no published counterpart: its reconstructor's target is "
            f"{resolved.method.target!r}, not pixels"
        )
    _check(weights, resolved, whole=whole)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        if kind == "encoder":
            save_weights(to, _part(weights.student, "encoder."), timm_arguments(resolved), input_config(resolved))
        else:
            content = _as_ours(weights, resolved) if kind == "checkpoint" else as_published(weights, resolved)
            write_atomically(to, lambda temporary: save_pickle(temporary, content))
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise InputError(f"to: cannot write {config.to!r}: {error.strerror}") from error
    teacher: Literal["moving average", "copy of the student"] | None = None
    if whole and weights.teacher is not None:
        teacher = "moving average"
    elif kind == "checkpoint":
        teacher = "copy of the student"
    return Converted(
        to=config.to,
        kind=kind,
        parts=["encoder", *(part for part in ("reconstructor", "predictor") if whole and weights.has(part))],
        teacher=teacher,
        encoder=resolved.model.encoder,
        encoder_heads=_heads(resolved),
        decoder_heads=resolved.model.decoder_heads if whole else None,
        image_size=resolved.data.size,
        patch_size=weights.student["encoder.patch_embed.proj.weight"].shape[-1],
        tensors=len(weights.student if whole else _part(weights.student, "encoder.")),
        left_aside=weights.left_aside,
    )


def _destination(config: ConvertConfig) -> tuple[Path, Kind]:
    """The file to write and what it will be.

    Raises:
        InputError: Another ending, or it exists.
    """
    kinds: dict[str, Kind] = {".pt": "checkpoint", ".safetensors": "encoder", ".pth": "published"}
    to = Path(config.to).expanduser()
    if to.suffix not in kinds:
        raise InputError(f"to: must end in {', '.join(kinds)}, got {config.to!r}")
    if to.is_dir() or (to.exists() and not config.force):
        raise InputError(f"to: {config.to!r} exists" + (", a folder" if to.is_dir() else "; --force replaces it"))
    return to, kinds[to.suffix]


def inferred_config(weights: Weights, given: ConvertConfig) -> Config:
    """The config that fits weights which bring none: read off the shapes, heads by convention or as given.

    Raises:
        InputError: Something cannot be told and was not given.
    """
    state = weights.student
    width, channels, *patch = state["encoder.patch_embed.proj.weight"].shape
    if patch[0] != patch[1]:
        raise InputError(f"from: patches must be square, got {patch[0]}x{patch[1]} pixels")
    depth = _depth(state, "encoder")
    heads = given.encoder_heads or weights.encoder_heads or (16 if width == 1280 else width // 64)
    if not heads or (width % 64 and width != 1280 and not (given.encoder_heads or weights.encoder_heads)):
        raise InputError(f"encoder_heads: cannot be told for an encoder of width {width}; give --encoder-heads")
    if not channels == 3 and not given.mean:
        raise InputError(
            f"mean, std: how images of {channels} channels were normalised is not in the file; give --mean and --std"
        )
    name = _NAMED.get((width, depth, patch[0], heads))
    fields: dict[str, Any] = {
        "image_size": _image_size(weights, given, patch[0]),
        "channels": channels,
        "mean": given.mean,
        "std": given.std,
        "encoder": name or "vit_base_patch16_224",
        "target": given.target,
    }
    if name is None:
        fields |= {"patch_size": patch[0], "encoder_width": width, "encoder_depth": depth, "encoder_heads": heads}
    if weights.has("decoder_embed") and not given.to.endswith(".safetensors"):  # there the encoder goes alone
        decoder_width = len(state["decoder_embed.weight"])
        decoder_heads = given.decoder_heads or weights.decoder_heads or (16 if decoder_width == 512 else None)
        if decoder_heads is None:
            raise InputError(f"decoder_heads: cannot be told for decoders {decoder_width} wide; give --decoder-heads")
        fields |= {
            "decoder_width": decoder_width,
            "decoder_heads": decoder_heads,
            "decoder_depth": max(1, _depth(state, "reconstructor")),
        }
    if weights.has("predictor"):
        fields["predictor_depth"] = _depth(state, "predictor")
    else:
        fields |= {"mask": "random", "predicted_loss": "none"}
    return with_fields(Config(), fields)


def _image_size(weights: Weights, given: ConvertConfig, patch: int) -> tuple[int, int]:
    """Height and width in pixels from the position table, or as given."""
    table = weights.student.get("encoder.pos_embed")
    if table is None or table.ndim != 3:
        raise InputError("from: has no position table (pos_embed)")
    if given.image_size:
        return given.image_size[0], given.image_size[-1]  # held against the table by the shapes
    grid = weights.grid or table_grid(table[0, 1:])
    if grid is None:
        raise InputError(
            f"image_size: cannot be told from a learnt table of {table.shape[1] - 1} positions; "
            "give --image-size HEIGHT WIDTH"
        )
    return grid[0] * patch, grid[1] * patch


def _check(weights: Weights, config: Config, *, whole: bool) -> None:
    """Do all tensors have the shapes of the model that the config builds?

    Raises:
        InputError: Names the first that have not.
    """
    with torch.device("meta"):
        wanted = build_student(config).state_dict() if whole else _encoder_state(config)
    for owner, state in (("its ", weights.student), ("its teacher's ", weights.teacher)):
        if state is None:
            continue
        width = len(state.get("reconstructor.head.bias", ()))
        if whole and width != len(wanted["reconstructor.head.bias"]):
            raise InputError(
                f"from: the reconstructor of {weights.source!r} puts out {width} values a patch where its pixels are "
                f"{len(wanted['reconstructor.head.bias'])}: it was trained on another target, such as features"
            )
        found = state if whole else {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}
        if different := mismatches(found, wanted):
            raise InputError(
                f"from: {weights.source!r} is damaged or no such model; of {owner}tensors\n  "
                + handful(different, separator="\n  ")
            )


def _encoder_state(config: Config) -> dict[str, Tensor]:
    return {f"encoder.{name}": tensor for name, tensor in build_encoder(config).state_dict().items()}


def _as_ours(weights: Weights, config: Config) -> dict[str, Any]:
    """What :class:`hardpatch.runs.load.LoadedRun` reads."""
    return {
        "images": "",
        "step": 0,
        "seconds": 0.0,
        "epoch": weights.epoch,
        "student": weights.student,
        "teacher": weights.teacher or weights.student,
        "config": asdict(config),
    }


def as_published(weights: Weights, config: Config) -> dict[str, Any]:
    """The content of a published file.

    Raises:
        InputError: The published model has no place for something.
    """
    refuse = f"from: {weights.source!r} has no published counterpart: "
    with torch.device("meta"):
        encoder = build_encoder(config)
    if not encoder.has_class_token or encoder.num_prefix_tokens != 1 or encoder.no_embed_class:
        raise InputError(
            f"{refuse}{config.model.encoder!r} has {encoder.num_prefix_tokens} prefix tokens, not one class token with "
            "a place in the position table"
        )
    if config.model.decoder != "self":
        raise InputError(f"{refuse}its decoders are of self-attention, and these of decoder {config.model.decoder!r}")
    block = encoder.blocks[0]
    if type(block.mlp.act) is not nn.GELU or block.norm1.eps != LAYER_NORM_EPS:
        raise InputError(f"{refuse}{config.model.encoder!r} computes with {block.mlp.act} and {block.norm1}")
    try:
        student = to_published(weights.student)
        teacher = None if weights.teacher is None else to_published(weights.teacher)
    except InputError as error:
        raise InputError(refuse + str(error)) from error
    epoch = weights.epoch
    if not epoch and (records := read_metrics(Path(weights.source).expanduser())):
        epoch = int(records[-1].get("epoch", 0))
    content: dict[str, Any] = {"state_dict": student, "model": student, "epoch": epoch}
    return content if teacher is None else {**content, "ema_state_dict": teacher}


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _depth(state: dict[str, Tensor], part: str) -> int:
    return len({match[1] for name in state if (match := re.match(rf"{part}\.blocks\.(\d+)\.", name))})


def _heads(config: Config) -> int:
    with torch.device("meta"):
        return int(build_encoder(config).blocks[0].attn.num_heads)
