"""Starting a run from weights: what fits is taken, what only differs in size is adapted, the rest starts fresh.

Other image sizes resample the position tables in 2-D, other numbers of channels and other patch sizes change the patch
embedding and the pixels that the reconstructor puts out; everything between is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from hardpatch.config.config import Config
from hardpatch.method.choices import TARGETS
from hardpatch.method.student import Student, Teacher
from hardpatch.method.vit import grid_size, patch_size
from hardpatch.runtime.errors import InputError
from hardpatch.weights.names import handful
from hardpatch.weights.read import Weights, mismatches, read_weights, table_grid

PARTS = {"reconstructor": "reconstructor", "predictor": "loss predictor"}
"""The two decoders: prefix of their parameters, and their name to the user."""


class Fitted(NamedTuple):
    """Weights in the shapes of a student."""

    state: dict[str, Tensor]
    """What is taken, under the student's names."""
    taken: list[str]
    """Parts that are taken."""
    adapted: list[str]
    """What was changed to fit."""
    fresh: list[str]
    """Parts that keep their random start, each with the reason."""


def start_from(config: Config, student: Student, teacher: Teacher | None) -> str:
    """Load ``init_from`` into a fresh student and teacher.

    Both go on where they were: the student from the student's weights, the teacher from the teacher's, adapted in the
    same way. Where the file has no teacher that learnt anything (MAE, encoders), the teacher is a copy of the student.

    Returns:
        What was taken, what was changed and what starts fresh, to say to the user.

    Raises:
        InputError: The file cannot be read, or its encoder is another one.
    """
    weights = read_weights(config.model.init_from, field="init_from")
    try:
        fitted = fit(weights, weights.student, student, config)
        averaged = None if weights.teacher is None else fit(weights, weights.teacher, student, config)
    except InputError as error:
        raise InputError(f"init_from: {config.model.init_from!r}: {error}") from error
    student.load_state_dict(fitted.state, strict=False)
    lines = [f"starting from {config.model.init_from}: {', '.join(fitted.taken)}"]
    if teacher is not None:
        teacher.model.load_state_dict(student.state_dict())
        if averaged is not None:
            teacher.model.load_state_dict(averaged.state, strict=False)
        lines.append("  teacher: " + ("a copy of the student" if averaged is None else "the file's moving average"))
    lines += [f"  {change}" for change in fitted.adapted]
    lines += [f"  fresh: {part}" for part in fitted.fresh]
    if weights.left_aside:
        lines.append(f"  left aside: {handful(list(weights.left_aside))}")
    return "\n".join(lines)


def fit(weights: Weights, state: Mapping[str, Tensor], student: Student, config: Config) -> Fitted:
    """Bring weights into the shapes of a student.

    Raises:
        InputError: The encoder has another width, depth or number of heads, or other parts.
    """
    wanted = student.state_dict()
    fitted = Fitted({}, [], [], [])
    _fit_encoder(weights, state, student, fitted)

    names = ("decoder_embed.weight", "decoder_embed.bias", "mask_token", "positions")
    found = {name: state[name] for name in names if name in state}
    if (table := _table(found, "positions")) is not None:
        grid = _source_grid(weights, table[0])
        wanted_grid = list(grid_size(student.encoder))
        found["positions"] = resample_abs_pos_embed(table, wanted_grid, list(grid), num_prefix_tokens=0)
    input_taken = _take(fitted, "decoder input", found, {name: wanted[name] for name in names})
    for name, part in PARTS.items():
        decoder = getattr(student, name)
        if decoder is None:
            if weights.has(name):
                fitted.adapted.append(f"{part}: not in this run, left aside")
            continue
        body = {key: tensor for key, tensor in wanted.items() if key.startswith((f"{name}.blocks.", f"{name}.norm."))}
        found = {key: tensor for key, tensor in state.items() if key in body or key.startswith(f"{name}.blocks.")}
        heads = decoder.blocks[0].attn.num_heads
        if not input_taken:
            fitted.fresh.append(f"{part} (the decoder input is)")
        elif found and weights.decoder_heads not in (None, heads):
            fitted.fresh.append(f"{part} ({weights.decoder_heads} attention heads in the file, {heads} here)")
        elif _take(fitted, part, found, body):
            _fit_head(weights, state, student, config, name, fitted)
    return fitted


def _take(fitted: Fitted, part: str, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Take a part if all of it fits, otherwise say why not."""
    if different := mismatches(found, wanted):
        reason = "not in the file" if not found else handful(different, most=1)
        fitted.fresh.append(f"{part} ({reason})")
        return False
    fitted.state.update(found)
    fitted.taken.append(part)
    return True


def _fit_encoder(weights: Weights, state: Mapping[str, Tensor], student: Student, fitted: Fitted) -> None:
    encoder = student.encoder
    found = {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}
    wanted = {name: tensor for name, tensor in student.state_dict().items() if name.startswith("encoder.")}
    name = "encoder.patch_embed.proj.weight"
    before, channels, patch = found[name], wanted[name].shape[1], patch_size(encoder)
    if before.shape[1] != channels:
        found[name] = inflate_channels(found[name], channels)
        fitted.adapted.append(f"patch embedding: {before.shape[1]} channels -> {channels}")
    if tuple(before.shape[-2:]) != patch:
        found[name] = resample_patch_embed(found[name], list(patch))
        fitted.adapted.append(f"patch embedding: {_by(before.shape[-2:])} pixels -> {_by(patch)}")
    table = _table(found, "encoder.pos_embed")
    tokens = ("encoder.cls_token", "encoder.dist_token", "encoder.reg_token")
    if table is not None and all((token in found) == (token in wanted) for token in tokens):
        grid, old = grid_size(encoder), table[0]
        prefix = encoder.pos_embed.shape[1] - grid[0] * grid[1]
        old_grid = _source_grid(weights, old[prefix:])
        found["encoder.pos_embed"] = resample_abs_pos_embed(table, list(grid), list(old_grid), num_prefix_tokens=prefix)
        if old_grid != grid:
            fitted.adapted.append(f"position tables: {_by(old_grid)} -> {_by(grid)} patches, resampled in 2-D")
    if any(name.startswith("fc_norm.") for name in weights.left_aside) and "encoder.norm.weight" not in found:
        # A model that normalises after pooling, as a fine-tuned classifier does, has no last norm.
        wanted = {name: tensor for name, tensor in wanted.items() if not name.startswith("encoder.norm.")}
        fitted.fresh.append("encoder's last norm (the file's model normalises after pooling)")
    if mismatches(found, wanted):
        wrong = {key for key in found.keys() | wanted.keys() if mismatches(_only(found, key), _only(wanted, key))}
        raise InputError(
            "holds another encoder than the run's; choose that one (encoder, encoder_width, encoder_depth):\n  "
            + handful(mismatches(_only(state, *wrong), _only(wanted, *wrong)), separator="\n  ")
        )
    if weights.encoder_heads not in (None, heads := encoder.blocks[0].attn.num_heads):
        raise InputError(f"encoder_heads: the file's encoder has {weights.encoder_heads}, the run's {heads}")
    fitted.state.update(found)
    fitted.taken.append("encoder")


def _only(state: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    """Some tensors, in the order in which they are."""
    return {name: tensor for name, tensor in state.items() if name in names}


def _table(state: Mapping[str, Tensor], name: str) -> Tensor | None:
    """A position table, if it is one."""
    table = state.get(name)
    return table if table is not None and table.ndim == 3 and len(table) == 1 else None


def _source_grid(weights: Weights, table: Float[Tensor, "n d"]) -> tuple[int, int]:
    """Rows and columns of the grid that a table was made for."""
    if weights.grid is not None and weights.grid[0] * weights.grid[1] == len(table):
        return weights.grid
    grid = table_grid(table)
    if grid is None:
        raise InputError(f"cannot tell rows and columns of a learnt table of {len(table)} positions")
    return grid


def inflate_channels(weight: Float[Tensor, "d c h w"], channels: int) -> Float[Tensor, "d k h w"]:
    """A patch embedding for another number of channels, by timm's rule: to one, the sum; to others, the channels
    repeated in turn and scaled by old / new number, so that the size of the output stays.
    """
    old = weight.shape[1]
    if channels == old:
        return weight
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight[:, torch.arange(channels) % old] * (old / channels)


def resample_pixel_head(
    head: Float[Tensor, "p e"],
    *,
    channels: tuple[int, int],
    patch: tuple[tuple[int, int], tuple[int, int]],
) -> Float[Tensor, "q e"]:
    """A head that puts out pixels, for other patches: the same picture, resized, its channels repeated in turn.

    It answers :func:`inflate_channels`: channel k is taken for a copy of channel k modulo the old number, and is
    reconstructed as that. To one channel: the mean.

    Args:
        head: Weight, with the bias as its last column; rows are pixels, channel last.
        channels: Old and new number of channels.
        patch: Old and new height and width of a patch.
    """
    (old, new), (before, after) = channels, patch
    pictures = head.reshape(*before, old, -1).permute(3, 2, 0, 1)
    if before != after:
        pictures = F.interpolate(pictures, size=after, mode="bicubic", antialias=True)
    if new == 1:
        pictures = pictures.mean(dim=1, keepdim=True)
    elif new != old:
        pictures = pictures[:, torch.arange(new) % old]
    return pictures.permute(2, 3, 1, 0).reshape(after[0] * after[1] * new, -1)


def _fit_head(
    weights: Weights, state: Mapping[str, Tensor], student: Student, config: Config, name: str, fitted: Fitted
) -> None:
    """The last layer of a decoder whose body is taken."""
    weight, bias = f"{name}.head.weight", f"{name}.head.bias"
    proj = state["encoder.patch_embed.proj.weight"]
    found = {key: state[key] for key in (weight, bias) if key in state}
    wanted = {key: student.state_dict()[key] for key in (weight, bias)}
    if len(found) == 2 and name == "predictor":
        if found[weight].shape[:1] != wanted[weight].shape[:1]:  # its mean is the score: any width can say the same
            found = {key: value.mean(dim=0, keepdim=True).expand_as(wanted[key]) for key, value in found.items()}
            fitted.adapted.append("loss predictor's head: every output is the mean of the old ones, same scores")
    elif len(found) == 2 and not _same_kind_of_target(weights, found[bias], proj, config):
        fitted.fresh.append("reconstructor's head (the file's is for another target)")
        return
    elif len(found) == 2 and found[bias].shape != wanted[bias].shape and TARGETS[config.method.target].of_pixels:
        vertical, horizontal = proj.shape[-2:]
        joined = resample_pixel_head(
            torch.cat([found[weight], found[bias].unsqueeze(1)], dim=1),
            channels=(proj.shape[1], config.data.channels),
            patch=((vertical, horizontal), patch_size(student.encoder)),
        )
        found = {weight: joined[:, :-1], bias: joined[:, -1]}
        fitted.adapted.append("reconstructor's head: resized to this run's patches and channels")
    if different := mismatches(found, wanted):
        fitted.fresh.append(f"{PARTS[name]}'s head ({different[0]})")
        return
    fitted.state.update(found)


def _same_kind_of_target(weights: Weights, bias: Tensor, proj: Tensor, config: Config) -> bool:
    """Does the file's reconstructor put out what this run wants? A width alone does not say: 768 is ViT-B's features
    and 16 x 16 x 3 pixels. A published file with the width of its patches' pixels is taken for a pixel target."""
    here, there = config.method, weights.config.method if weights.config else None
    if there is None or TARGETS[there.target].of_pixels:
        return len(bias) == proj[0].numel() and TARGETS[here.target].of_pixels
    if here.target == "tokens" and not here.tokenizer:  # another codebook numbers its entries otherwise
        return False
    return all(getattr(here, name) == getattr(there, name) for name in ("target", "target_model", "tokenizer"))


def _by(pair: tuple[int, ...]) -> str:
    return "x".join(str(int(number)) for number in pair)
