"""A stock timm ViT, run on the visible patches only.

Nothing here subclasses or patches timm: the encoder that is trained *is* the ``timm`` model, so its weights load
anywhere that timm weights load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num, Shaped
from timm.layers import Attention, PatchEmbed, build_sincos2d_pos_embed, resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hardpatch.runtime.errors import InputError, suggest

LAYER_NORM_EPS = 1e-6


def create_encoder(
    name: str,
    *,
    image_size: tuple[int, int],
    channels: int = 3,
    patch_size: int | None = None,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
) -> VisionTransformer:
    """Build a timm ``VisionTransformer`` without a head, with fixed sin-cos positions.

    Args:
        name: Name of any timm model of class ``VisionTransformer``, e.g. ``vit_base_patch16_224``.
        image_size: Height and width in pixels; the patch size must divide both.
        channels: Channels of the images.
        patch_size: Side of a patch in pixels; ``None`` keeps the model's own.
        width: Token width; ``None`` keeps the model's own.
        depth: Number of blocks; ``None`` keeps the model's own.
        heads: Attention heads; ``None`` keeps the model's own.

    Returns:
        The encoder with MAE's initialisation and a frozen position table.

    Raises:
        InputError: The name is unknown, is no ViT with absolute positions, or a size does not fit.
    """
    if not timm.is_model(name):
        hint = suggest(name, timm.list_models(module="vision_transformer")) or "; see timm.list_models('vit_*')"
        raise InputError(f"encoder: timm has no model named {name!r}{hint}")
    sizes = {"patch_size": patch_size, "embed_dim": width, "depth": depth, "num_heads": heads}
    options = {key: value for key, value in sizes.items() if value is not None}
    try:
        vit = timm.create_model(name, img_size=image_size, in_chans=channels, num_classes=0, fc_norm=False, **options)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        # Models of other families do not take these arguments; a size that does not fit fails an assert of timm's.
        kind = "" if name in timm.list_models(module="vision_transformer") else "; it is no VisionTransformer"
        raise InputError(f"encoder: timm cannot build {name!r} as a ViT of image size {image_size} "
                         f"with {options or 'its own sizes'}{kind}: {error}") from error  # fmt: skip
    if not isinstance(vit, VisionTransformer):
        raise InputError(f"encoder: must be a timm VisionTransformer, got {name!r}, a {type(vit).__name__}")
    if type(vit.patch_embed) is not PatchEmbed:
        raise InputError(
            f"encoder: {name!r} cuts patches with a {type(vit.patch_embed).__name__}, a convolutional stem through "
            "which visible patches would see hidden ones; choose a ViT with a plain patch embedding"
        )
    patch = vit.patch_embed.patch_size
    if image_size[0] % patch[0] or image_size[1] % patch[1]:
        raise InputError(f"image_size: must be divisible by the patch size {patch[0]}x{patch[1]}, "
                         f"got {image_size[0]}x{image_size[1]}")  # fmt: skip
    if vit.pos_embed is None:
        raise InputError(f"encoder: {name!r} has no absolute position table; choose one that has")
    initialise(vit)
    fix_positions(vit)
    if vit.attn_pool is not None:  # pools for a head that is not there: never run, so never trained
        vit.attn_pool.requires_grad_(False)
    return vit


def grid_size(vit: VisionTransformer) -> tuple[int, int]:
    """Rows and columns of the encoder's patch grid."""
    rows, columns = vit.patch_embed.grid_size
    return int(rows), int(columns)


def patch_size(vit: VisionTransformer) -> tuple[int, int]:
    """Height and width of one patch in pixels."""
    height, width = vit.patch_embed.patch_size
    return int(height), int(width)


class Geometry(NamedTuple):
    """How images are cut into patches: what encoder, target and masks have to agree on."""

    grid: tuple[int, int]
    """Rows and columns of patches."""
    patch: tuple[int, int]
    """Height and width of a patch in pixels."""
    channels: int
    """Channels of the images."""

    @property
    def num_patches(self) -> int:
        """N, the patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.grid[0] * self.patch[0], self.grid[1] * self.patch[1]

    @classmethod
    def of(cls, vit: VisionTransformer) -> Geometry:
        """The geometry of the images that an encoder was built for."""
        return cls(grid_size(vit), patch_size(vit), int(vit.patch_embed.proj.in_channels))


def sincos_positions(grid: Sequence[int], dim: int) -> Float[Tensor, "n d"]:
    """The fixed 2-D sin-cos position table of MAE for a grid of any height and width.

    timm's table has the rows' features first, MAE's has the columns' first: the channel halves are swapped.

    Args:
        grid: Rows and columns.
        dim: Width of a position; divisible by 4.

    Returns:
        One row per patch, in image order.

    Raises:
        InputError: ``dim`` is not divisible by 4.
    """
    if dim % 4:
        raise InputError(f"width: sin-cos positions need a width divisible by 4, got {dim}")
    table: Tensor = build_sincos2d_pos_embed(list(grid), dim, interleave_sin_cos=True)
    halves_swapped: Tensor = torch.roll(table, dim // 2, dims=1)
    return halves_swapped


def fix_positions(vit: VisionTransformer) -> None:
    """Set the encoder's position table to sin-cos (zero for prefix tokens) and freeze it."""
    table = sincos_positions(grid_size(vit), vit.embed_dim)
    with torch.no_grad():
        vit.pos_embed.zero_()
        vit.pos_embed[0, -len(table) :] = table
    vit.pos_embed.requires_grad_(False)


def initialise(module: nn.Module) -> None:
    """MAE's initialisation: Xavier-uniform linear layers and patch embedding, normal(0.02) tokens."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    if isinstance(module, VisionTransformer):
        weight = module.patch_embed.proj.weight
        nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
        for token in (module.cls_token, module.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)


def take(tokens: Num[Tensor, "b n d"], index: Int[Tensor, "v k"]) -> Num[Tensor, "v k d"]:
    """Per view, the tokens at ``index``; the views of an image stand together, V = B x views per image."""
    index_by_image = index.reshape(len(tokens), -1)
    taken = tokens.gather(1, index_by_image.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    return taken.reshape(*index.shape, tokens.shape[-1])


def per_view(values: Shaped[Tensor, "b ..."], num_views: int) -> Shaped[Tensor, "v ..."]:
    """Repeat what belongs to an image for each of its views, V = ``num_views`` in all."""
    return values if len(values) == num_views else values.repeat_interleave(num_views // len(values), dim=0)


def encode(
    vit: VisionTransformer,
    images: Float[Tensor, "b c h w"],
    visible: Int[Tensor, "v k"] | None = None,
) -> Float[Tensor, "v t d"]:
    """Run a stock timm ViT on the visible patches only (``forward_features`` with a choice of patches).

    Args:
        vit: The encoder.
        images: Normalised images, of the encoder's size or any other that the patch size divides.
        visible: Indices of the visible patches in image order, for one or more views of every image; ``None`` means
            one view of all.

    Returns:
        Normalised tokens: the prefix tokens (class, registers), then the visible patches.
    """
    tokens: Tensor = vit.norm_pre(embed(vit, images, visible))
    encoded: Tensor = vit.norm(run_blocks(vit, tokens))
    return encoded


def run_blocks(model: Any, tokens: Float[Tensor, "b t d"], *context: Tensor) -> Tensor:
    """The model's blocks one after another; where it says ``grad_checkpointing``, for a backward pass that computes
    them again."""
    recompute = model.grad_checkpointing and torch.is_grad_enabled()
    for block in model.blocks:
        tokens = checkpoint(block, tokens, *context, use_reentrant=False) if recompute else block(tokens, *context)
    return tokens


def embed(
    vit: VisionTransformer, images: Float[Tensor, "b c h w"], visible: Int[Tensor, "v k"] | None = None
) -> Float[Tensor, "v t d"]:
    """Prefix tokens and those of all or the visible patches, with positions.

    For images of another size the encoder's table is resampled. Hidden patches are left out before they are projected:
    they would take three quarters of that, forward and backward.
    """
    grid = grid_of(vit, images)
    if visible is None and grid == grid_size(vit):
        embedded: Tensor = vit._pos_embed(vit.patch_embed(images))
        return embedded
    # What timm makes of empty patches: prefix tokens of every kind, and positions.
    places = grid_size(vit) if vit.dynamic_img_size else (vit.patch_embed.num_patches,)
    # Of two, or the gradient of the class token would be a view of a larger tensor, which DDP has to copy.
    blank = vit._pos_embed(images.new_zeros(2, *places, vit.embed_dim))[:1]
    prefix, positions = blank.tensor_split([vit.num_prefix_tokens], dim=1)
    positions = resample_positions(positions.detach(), grid_size(vit), grid)  # a fixed table
    if visible is None:
        patches = vit.patch_embed.proj(images).flatten(2).transpose(1, 2)
    else:
        patches = project(vit.patch_embed.proj, take(patchify(images, patch_size(vit)), visible))
        positions = take(positions.expand(len(visible), -1, -1), visible)
    patches = vit.patch_embed.norm(patches) + positions
    return torch.cat([prefix.expand(len(patches), -1, -1), patches], dim=1)


def project(convolution: nn.Conv2d, patches: Float[Tensor, "v k p"]) -> Float[Tensor, "v k d"]:
    """What a patch embedding's convolution makes of some patches.

    As a matrix product, the quickest; but in float32 on a CPU as the convolution of as many images of one patch, which
    sums in the same order there as that of whole images: trajectories stay those of the published code.
    """
    if patches.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return F.linear(patches, convolution.weight.permute(0, 2, 3, 1).flatten(1), convolution.bias)
    height, width = convolution.weight.shape[2:]
    alone = patches.flatten(0, 1).unflatten(-1, (height, width, -1)).permute(0, 3, 1, 2)
    projected: Tensor = convolution(alone.contiguous()).reshape(*patches.shape[:2], -1)
    return projected


def grid_of(vit: VisionTransformer, images: Float[Tensor, "b c h w"]) -> tuple[int, int]:
    """Rows and columns of the patches of these images."""
    height, width = patch_size(vit)
    return images.shape[-2] // height, images.shape[-1] // width


def resample_positions(
    table: Float[Tensor, "1 n d"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "1 k d"]:
    """Positions of a grid of ``new`` patches that covers the same image as one of ``old``.

    Where one patch covers several whole ones it gets the mean of theirs; else bicubic and antialiased, as in timm.
    """
    if old == new:
        return table
    if old[0] % new[0] == 0 and old[1] % new[1] == 0:
        kernel = (old[0] // new[0], old[1] // new[1])
        return F.avg_pool2d(table.transpose(1, 2).unflatten(2, old), kernel).flatten(2).transpose(1, 2)
    resampled: Tensor = resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=0)
    return resampled


def has_class_attention(vit: VisionTransformer) -> bool:
    """Does :func:`class_attention` know this encoder: a class token, and a last block of timm's plain kind?

    Other blocks (parallel, post-norm, differential attention) keep their queries and keys elsewhere.
    """
    last = vit.blocks[-1]
    return bool(vit.has_class_token) and type(last) is Block and type(last.attn) is Attention


def encode_with_attention(
    vit: VisionTransformer, images: Float[Tensor, "b c h w"]
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b n"]]:
    """:func:`encode` of the full image and :func:`class_attention` from one pass; the tokens are the very same.

    Only queries and keys of the last block are computed a second time, about 2 % of a ViT-B.

    Args:
        vit: An encoder for which :func:`has_class_attention` is true.
        images: Normalised images.

    Raises:
        ValueError: The encoder has no class token, or its last block is of another kind.
    """
    if not has_class_attention(vit):
        raise ValueError(f"no class attention in this encoder: it needs a class token and a plain last block, "
                         f"got a {type(vit.blocks[-1]).__name__}")  # fmt: skip
    tokens = vit.norm_pre(embed(vit, images))
    *blocks, last = vit.blocks
    for block in blocks:
        tokens = block(tokens)
    b, t, _ = tokens.shape
    attention = last.attn
    qkv = attention.qkv(last.norm1(tokens)).reshape(b, t, 3, attention.num_heads, -1)
    query, key = attention.q_norm(qkv[:, :1, 0]), attention.k_norm(qkv[:, :, 1])
    weights = torch.einsum("bqhd,bkhd->bhqk", query * attention.scale, key).softmax(dim=-1)
    encoded: Tensor = vit.norm(last(tokens))
    return encoded, weights.mean(dim=1)[:, 0, vit.num_prefix_tokens :]


@torch.no_grad()
def class_attention(vit: VisionTransformer, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
    """Attention of the class token to the patches in the last block, mean over heads.

    Args:
        vit: An encoder for which :func:`has_class_attention` is true.
        images: Normalised images.

    Raises:
        ValueError: The encoder has no class token, or its last block is of another kind.
    """
    return encode_with_attention(vit, images)[1]


def patchify(images: Float[Tensor, "b c h w"], patch: tuple[int, int]) -> Float[Tensor, "b n p"]:
    """Cut images into flattened patches in image order, channel last inside a patch (MAE's layout).

    Args:
        images: Any number of channels, any height and width that ``patch`` divides.
        patch: Height and width of a patch in pixels.

    Returns:
        P = patch height × patch width × channels.
    """
    b, c, h, w = images.shape
    rows, columns = h // patch[0], w // patch[1]
    cut = images.reshape(b, c, rows, patch[0], columns, patch[1])
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(b, rows * columns, -1)


def patch_variance(images: Float[Tensor, "b c h w"], patch: tuple[int, int]) -> Float[Tensor, "b n"]:
    """Variance of the pixels of each patch, mean over channels."""
    cut = patchify(images, patch)
    return cut.reshape(*cut.shape[:2], -1, images.shape[1]).var(dim=2).mean(dim=-1)


def unpatchify(
    patches: Float[Tensor, "b n p"], patch: tuple[int, int], grid: tuple[int, int]
) -> Float[Tensor, "b c h w"]:
    """Inverse of :func:`patchify` for a grid of ``grid`` = (rows, columns) patches."""
    b = patches.shape[0]
    cut = patches.reshape(b, grid[0], grid[1], patch[0], patch[1], -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, grid[0] * patch[0], grid[1] * patch[1])


def resize(images: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c y x"]:
    """Bilinear and antialiased, on the device; images of that size as they are."""
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)


def whole_patches(valid: Bool[Tensor, "b h w"], size: tuple[int, int], patch: tuple[int, int]) -> Bool[Tensor, "b n"]:
    """Which patches of the images, brought to ``size``, are made of valid pixels only.

    Args:
        valid: Of the pixels.
        size: Height and width of the images as they are learnt from.
        patch: Height and width of a patch.
    """
    shares = resize(valid.unsqueeze(1).float(), size)
    return patchify(shares, patch).amin(dim=-1) > 1 - 1e-4  # of a shrunk image: rounding of the weights
