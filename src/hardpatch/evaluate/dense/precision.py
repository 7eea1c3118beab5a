"""Parts of a dense model that compute in bfloat16, between others that must not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


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
