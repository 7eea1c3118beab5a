"""The light decoders beside the encoder: the reconstructor and the loss predictor."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hardpatch.method.vit import LAYER_NORM_EPS, run_blocks


class Decoder(nn.Module):
    """Blocks, norm and a linear head.

    As published, blocks of self-attention on the whole sequence. With ``cross``, blocks in which queries attend to the
    context and not to each other: only what is asked for is decoded, so its price is that of its queries.

    Args:
        dim: Token width.
        depth: Number of blocks.
        heads: Attention heads; must divide ``dim``.
        out_dim: Width of the head's output.
        cross: Of cross-attention?
    """

    def __init__(self, dim: int, *, depth: int, heads: int, out_dim: int, cross: bool = False) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
        kind = CrossBlock if cross else partial(Block, qkv_bias=True, norm_layer=norm)
        self.cross = cross
        self.grad_checkpointing = False
        self.blocks = nn.Sequential(*(kind(dim, heads) for _ in range(depth)))
        self.norm = norm(dim)
        self.head = nn.Linear(dim, out_dim)

    def forward(self, context: Float[Tensor, "b s d"], queries: Float[Tensor, "b q d"]) -> Float[Tensor, "b q p"]:
        """The head's output for every query."""
        if self.cross:
            tokens = run_blocks(self, queries, context)
        else:
            tokens = run_blocks(self, torch.cat([context, queries], dim=1))[:, context.shape[1] :]
        decoded: Tensor = self.head(self.norm(tokens))
        return decoded


class CrossBlock(nn.Module):
    """A block whose queries attend to a context and not to each other: cross-attention and MLP, both pre-norm.

    Args:
        dim: Token width.
        heads: Attention heads; must divide ``dim``.

    Source: Fu et al., "Rethinking Patch Dependence for Masked Autoencoders" (CrossMAE), arXiv 2401.14391, section 3.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = CrossAttention(dim, num_heads=heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, queries: Float[Tensor, "b q d"], context: Float[Tensor, "b s d"]) -> Float[Tensor, "b q d"]:
        """Queries, each with what it found in the context."""
        queries = queries + self.attn(self.norm1(queries), context)
        decoded: Tensor = queries + self.mlp(self.norm2(queries))
        return decoded


class CrossAttention(nn.Module):
    """Multi-head attention of queries to a context.

    ``fused_attn`` chooses between PyTorch's fused attention and the same written out, as in timm's ``Attention``.

    Args:
        dim: Token width.
        num_heads: Attention heads; must divide ``dim``.
    """

    def __init__(self, dim: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = True
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, queries: Float[Tensor, "b q d"], context: Float[Tensor, "b s d"]) -> Float[Tensor, "b q d"]:
        """One vector per query."""
        query = self.q(queries).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        key, value = self.kv(context).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused_attn:
            found = F.scaled_dot_product_attention(query, key, value)
        else:
            found = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1) @ value
        projected: Tensor = self.proj(found.transpose(1, 2).flatten(2))
        return projected
