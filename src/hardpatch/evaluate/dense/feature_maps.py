"""A ViT as the backbone of a dense task: feature maps at several depths, on images of any size."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hardpatch.method.vit import patch_size
from hardpatch.runs.build import choose_attention
from hardpatch.runtime.errors import InputError


def choose_depths(given: tuple[int, ...], num_blocks: int, *, count: int = 4) -> tuple[int, ...]:
    """Blocks whose outputs are used, counted from 1.

    Args:
        given: What the user asked for; empty: ``count`` of them, evenly spread (3, 6, 9 and 12 of 12 blocks; a
            shallow encoder's blocks are used more than once).

    Raises:
        InputError: Another number of them, one that is not there, or not in order.
    """
    if not given:
        return tuple(max(1, round(num_blocks * (i + 1) / count)) for i in range(count))
    if len(given) != count:
        raise InputError(f"depths: this head needs {count} of them, got {given}")
    if list(given) != sorted(given) or not 1 <= given[0] <= given[-1] <= num_blocks:
        raise InputError(f"depths: must go up from 1 to at most the encoder's {num_blocks} blocks, got {given}")
    return given


def check_size(size: tuple[int, int], vit: VisionTransformer, *, field: str) -> None:
    """Refuse a size that cannot be cut into patches.

    Raises:
        InputError: Not above 0, or not divisible by the patch size.
    """
    patch = patch_size(vit)
    if min(size) < 1 or size[0] % patch[0] or size[1] % patch[1]:
        raise InputError(
            f"{field}: must be divisible by the encoder's patch size {patch[0]}x{patch[1]}, got {size[0]}x{size[1]}"
        )


class DenseEncoder(nn.Module):
    """Feature maps of a ViT after some of its blocks, through its final norm.

    Args:
        vit: The encoder; a copy is made, with its position table resampled where ``size`` is another than its own.
        size: Height and width of the images in pixels.
        depths: Blocks whose outputs are wanted, counted from 1; one may be named twice.
        trained: Whether the encoder learns; a frozen one stays in evaluation mode and gives no gradient.
        bf16: Autocast inside the encoder; what comes out is float32.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        *,
        size: tuple[int, int],
        depths: tuple[int, ...],
        trained: bool,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.vit = copy.deepcopy(vit)
        if tuple(self.vit.patch_embed.img_size) != size:
            self.vit.set_input_size(size)
        if not trained:
            self.vit.requires_grad_(False)
        self.vit.blocks[max(depths) :].requires_grad_(False)  # never run
        self.dim = int(self.vit.embed_dim)
        self.depths = depths
        self.trained = trained
        self.bf16 = bf16
        self._taken = sorted({depth - 1 for depth in depths})
        choose_attention(self.vit, next(self.vit.parameters()).device, bf16=bf16)
        self.train(False)

    def train(self, mode: bool = True) -> DenseEncoder:
        """Training mode, for an encoder that learns."""
        super().train(mode and self.trained)
        return self

    def forward(self, images: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b d y x"]]:
        """One map per depth, a pixel per patch."""
        device = images.device.type
        with (
            torch.set_grad_enabled(self.trained and torch.is_grad_enabled()),
            torch.autocast(device, torch.bfloat16, enabled=self.bf16),
        ):
            maps = self.vit.forward_intermediates(
                images, indices=self._taken, norm=True, stop_early=True, intermediates_only=True
            )
        by_block = dict(zip(self._taken, maps))
        return [by_block[depth - 1].float() for depth in self.depths]


def parameter_groups(
    encoder: DenseEncoder, rest: nn.Module, *, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Groups for AdamW: the encoder's by layer decay (timm), everything else at the full learning rate."""
    groups: list[dict[str, Any]] = param_groups_weight_decay(rest, weight_decay)
    if encoder.trained:
        # To timm the head is a layer of its own, after the last block and the norm. Ours stands outside of the model.
        found = param_groups_layer_decay(encoder.vit, weight_decay, layer_decay=layer_decay)
        groups += [{**group, "lr_scale": layer_decay * group["lr_scale"]} for group in found]
    return groups


class Bf16(nn.Module):
    """A module under autocast to bfloat16 that gives float32 back.

    What comes after it (box coordinates, RoIAlign, losses) stays float32: in bfloat16 a box at pixel 500 would be off
    by up to two.

    Args:
        module: Takes tensors on the device that it lies on; gives tensors, also in lists and dictionaries.
        enabled: False leaves everything as it is.
    """

    def __init__(self, module: nn.Module, *, enabled: bool) -> None:
        super().__init__()
        self.module = module
        self.enabled = enabled

    def forward(self, *inputs: Any) -> Any:
        """What the module gives, in float32."""
        if not self.enabled:
            return self.module(*inputs)
        device = next(self.module.parameters()).device.type
        with torch.autocast(device, torch.bfloat16):
            found = self.module(*inputs)
        return tree_map_only(Tensor, Tensor.float, found)
