"""Student and teacher: the networks of the method."""

from __future__ import annotations

import copy
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hardpatch.method.decoder import Decoder
from hardpatch.method.masks import split_patches
from hardpatch.method.scout import Scout
from hardpatch.method.vit import (
    Geometry,
    encode,
    encode_with_attention,
    grid_of,
    initialise,
    per_view,
    resample_positions,
    sincos_positions,
    take,
)

DecoderKind = Literal["self", "cross"]
"""How both decoders work: ``self``-attention over visible and mask tokens (MAE, HPM), or ``cross``-attention from mask
tokens to visible ones (CrossMAE)."""


class StudentOutput(NamedTuple):
    """What the student says about the decoded patches: the hidden ones, or some of them, in image order."""

    prediction: Float[Tensor, "v q p"]
    """The reconstruction."""
    scores: Float[Tensor, "v q"] | None
    """Predicted loss from the masked view, higher = harder; None where the predictor does not learn there."""
    full_scores: Float[Tensor, "v q"] | None
    """Predicted loss from the teacher's encoding of the full image; None where the predictor does not learn there."""
    scout_scores: Float[Tensor, "v q"] | None = None
    """The scout's, from the full image; None without one."""


class Student(nn.Module):
    """Encoder on the visible patches, and two parallel decoders on the same tokens.

    As published neither decoder is detached: L_pred trains the encoder too.

    Args:
        encoder: A stock timm ViT.
        target_dim: P, width of one patch's target.
        decoder: ``self``: decoders of self-attention over the whole sequence, as published; ``cross``: hidden patches
            attend to visible ones only, and may be decoded in part.
        decoder_dim: Token width of both decoders.
        decoder_depth: Blocks of the reconstructor.
        decoder_heads: Attention heads of both decoders.
        predictor_depth: Blocks of the loss predictor; 0 builds none (plain MAE).
        predictor_detached: Let the loss predictor learn from the decoder input without shaping it.
        reduction: Losses are predicted from the full image made this many times smaller per side.
        scout: Build a scout, which then says what is hard; its loss reaches no other part of the student.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        target_dim: int,
        decoder: DecoderKind = "self",
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        predictor_depth: int = 8,
        predictor_detached: bool = False,
        reduction: int = 1,
        scout: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.geometry = Geometry.of(encoder)
        self.predictor_detached = predictor_detached
        self.reduction = reduction
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.positions = nn.Buffer(sincos_positions(self.geometry.grid, decoder_dim).unsqueeze(0))
        kind = partial(Decoder, decoder_dim, heads=decoder_heads, cross=decoder == "cross")
        self.reconstructor = kind(depth=decoder_depth, out_dim=target_dim)
        self.predictor: Decoder | None = None
        if predictor_depth:
            # As published, the head is as wide as a patch's pixels and its mean is the score: the same functions as
            # a head of width 1, with other training dynamics.
            self.predictor = kind(depth=predictor_depth, out_dim=encoder.patch_embed.proj.weight[0].numel())
        for part in (self.decoder_embed, self.reconstructor, self.predictor):
            if part is not None:
                initialise(part)
        nn.init.normal_(self.mask_token, std=0.02)
        self.scout = Scout(self.geometry.patch, channels=self.geometry.channels) if scout else None

    @property
    def predicts_hardness(self) -> bool:
        """Is there a scout or a loss predictor, so that :meth:`predict_loss` has an answer?"""
        return self.scout is not None or self.predictor is not None

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        hidden: Bool[Tensor, "v n"],
        *,
        num_hidden: int,
        decoded: Int[Tensor, "v q"] | None = None,
        full_features: Float[Tensor, "b t d"] | None = None,
        predict: bool = True,
        valid: Bool[Tensor, "b n"] | None = None,
    ) -> StudentOutput:
        """Reconstruct the hidden patches and predict how large the loss on each will be.

        Args:
            images: Normalised images.
            hidden: True = hidden; exactly ``num_hidden`` per view, one or more views of every image.
            num_hidden: M.
            decoded: Indices of the hidden patches to decode, in image order; None: all.
            full_features: The teacher's encoding of the full images, for a predictor that learns on it; None: it
                does not.
            predict: Ask the loss predictor about the masked view; not where there is none.
            valid: Patches of pixels that are all data, for the scout; None: all.
        """
        visible, masked = split_patches(hidden, num_hidden)
        decoded = masked if decoded is None else decoded
        grid = grid_of(self.encoder, images)
        features = encode(self.encoder, images, visible)
        context, queries = self.decoder_input(features, visible, decoded, grid)
        scores = full_scores = scout_scores = None
        if predict and self.predictor is not None:
            scores = self._predict(context, queries)
        if full_features is not None:
            full_scores = self.score(full_features, grid, decoded)
        if self.scout is not None and self.training:
            scout_scores = per_view(self.scout(images, valid), len(decoded)).gather(1, decoded)
        return StudentOutput(self.reconstructor(context, queries), scores, full_scores, scout_scores)

    def decoder_input(
        self,
        features: Float[Tensor, "v t d"],
        visible: Int[Tensor, "v k"],
        decoded: Int[Tensor, "v q"],
        grid: tuple[int, int],
    ) -> tuple[Float[Tensor, "v t c"], Float[Tensor, "v q c"]]:
        """Context: prefix tokens, then visible patches + position. Queries: mask tokens + position.

        Attention does not care about the order of its tokens, so they need not be put back in image order.
        """
        positions = self.positions_on(grid)
        prefix, patches = self.decoder_embed(features).tensor_split([self.encoder.num_prefix_tokens], dim=1)
        context = torch.cat([prefix, patches + take(positions.expand(len(visible), -1, -1), visible)], dim=1)
        queries = self.mask_token + take(positions.expand(len(decoded), -1, -1), decoded)
        return context, queries.to(context.dtype)

    def positions_on(self, grid: tuple[int, int]) -> Float[Tensor, "1 n c"]:
        """The decoders' position table for a grid of patches."""
        return resample_positions(self.positions, self.geometry.grid, grid)

    def score(
        self, features: Float[Tensor, "b t d"], grid: tuple[int, int], at: Int[Tensor, "v q"] | None = None
    ) -> Float[Tensor, "v q"]:
        """Predicted loss from :meth:`encode_full`'s tokens; the reconstructor stays idle.

        A predictor of self-attention is asked at the patches themselves, as published; one of cross-attention at mask
        tokens in their places, which is what it has learnt.

        Args:
            features: Tokens of the full images.
            grid: Rows and columns of the patches whose loss is predicted.
            at: Indices of the patches, for one or more views of every image; None: all patches of every image.
        """
        r = self.reduction
        coarse = grid[0] // r, grid[1] // r
        prefix, patches = self.decoder_embed(features).tensor_split([self.encoder.num_prefix_tokens], dim=1)
        patches = patches + self.positions_on(coarse)
        if self.predictor is not None and self.predictor.cross:
            places = self.positions_on(grid).expand(len(features), -1, -1)
            if at is not None:  # the views of an image ask together: queries do not see each other
                places = take(places, at.reshape(len(features), -1))
            scores = self._predict(torch.cat([prefix, patches], dim=1), self.mask_token + places)
            return scores if at is None else scores.reshape(at.shape)
        scores = self._predict(prefix, patches)
        scores = scores.reshape(-1, coarse[0], 1, coarse[1], 1).expand(-1, -1, r, -1, r).flatten(1)
        return scores if at is None else per_view(scores, len(at)).gather(1, at)

    def _predict(self, context: Float[Tensor, "v s c"], queries: Float[Tensor, "v q c"]) -> Float[Tensor, "v q"]:
        """The loss predictor's score of each query."""
        if self.predictor is None:
            raise ValueError("this student was built without a loss predictor (predictor_depth=0)")
        if self.predictor_detached:
            context, queries = context.detach(), queries.detach()
        scores: Tensor = self.predictor(context, queries).float().mean(dim=-1)
        return scores

    def encode_full(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b t d"]:
        """Tokens of the full image, at the size at which losses are predicted."""
        smaller = images if self.reduction == 1 else F.avg_pool2d(images, self.reduction)
        return encode(self.encoder, smaller)

    def predict_loss(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
        """What is hard in the full image, higher = harder: the scout's scores, or those of the loss predictor."""
        if self.scout is not None:
            return self.scout_scores(images)
        return self.score(self.encode_full(images), grid_of(self.encoder, images))

    @torch.no_grad()
    def scout_scores(
        self, images: Float[Tensor, "b c h w"], valid: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n"]:
        """The scout's scores of every patch, without gradient; arguments as of :class:`Scout`."""
        if self.scout is None:
            raise ValueError("this student was built without a scout")
        scores: Tensor = self.scout(images, valid)
        return scores


class Teacher(nn.Module):
    """Exponential moving average of the whole student: its reconstructor too, though only scores are asked of it."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.model = copy.deepcopy(student).eval().requires_grad_(False)

    @property
    def geometry(self) -> Geometry:
        """How the images are cut into patches."""
        return self.model.geometry

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode: a teacher never drops anything."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b t d"]:
        """Tokens of the full image, at the size at which losses are predicted."""
        return self.model.encode_full(images)

    @torch.no_grad()
    def score(self, features: Float[Tensor, "b t d"], grid: tuple[int, int]) -> Float[Tensor, "b n"]:
        """Predicted loss of every patch of a grid from :meth:`encode`'s tokens, higher = harder."""
        return self.model.score(features, grid)

    @torch.no_grad()
    def predict_loss(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
        """What is hard in the full image, higher = harder, without gradient: the scout's scores, where there is one."""
        if self.model.scout is not None:
            return self.model.scout_scores(images)
        return self.score(self.encode(images), grid_of(self.model.encoder, images))

    @torch.no_grad()
    def encode_with_attention(
        self, images: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b n"]]:
        """Tokens of the full image, and the attention of its class token to every patch in the last block."""
        return encode_with_attention(self.model.encoder, images)

    @torch.no_grad()
    def update(self, student: Student, decay: float) -> None:
        """Move every tensor to ``decay`` * teacher + (1 - ``decay``) * student."""
        mine, theirs = ([_share_here(t) for t in m.state_dict().values()] for m in (self.model, student))
        get_ema_multi_avg_fn(decay)(mine, theirs, None)


def _share_here(tensor: Tensor) -> Tensor:
    """The part that this process holds of a tensor that is sharded over processes."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
