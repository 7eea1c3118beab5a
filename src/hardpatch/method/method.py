"""Hard Patches Mining, the method, in one file.

A teacher (EMA of the student) sees the whole image and predicts for every patch how hard it is to reconstruct. The
student gets a mask that hides the hardest of them, a growing share, and learns two things from the visible rest: to
reconstruct the hidden patches, and to predict its own reconstruction loss on them. The second is what the teacher
uses in the next step.

    image (B C H W) ---> Teacher (EMA, no grad) predict_loss ---> scores (B N)
      |                                                            |
      |                           mask policy(scores, noise, ...)  v ---> hidden (B N) bool, exactly M True per image
      |---> Target(image), no grad ---> (B N P)
      v
    encoder on the K visible patches ---> tokens (B T+K D)
      |---> reconstructor  ---> prediction (B M P) ---> patch loss (B M) ---> mean = L_rec
      '---> loss predictor ---> scores     (B M)   ---> against the patch loss, detached = L_pred

Source: Wang et al., "Hard Patches Mining for Masked Image Modeling", CVPR 2023, arXiv 2304.05919.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hardpatch.method.masks import Guide, MaskPolicy, split_patches
from hardpatch.method.targets.target import Target
from hardpatch.method.vit import (
    CrossDecoder,
    Decoder,
    encode,
    encode_with_attention,
    grid_of,
    grid_size,
    initialise,
    per_view,
    resample_positions,
    sincos_positions,
    take,
    to_residual,
)
from hardpatch.runtime.seeding import more_noise

PredictorView = Literal["masked", "full", "both"]
"""On which view the loss predictor learns.

``masked``, as published: at the mask tokens of the student's masked view; its gradient trains the encoder too. But it
is *asked* on the full image, at visible patches, where it never learnt (the authors concede the mismatch).
``full``: on the teacher's encoding of the full image, exactly where it is asked; no gradient reaches the encoder.
``both``: the sum of the two.
"""

DecoderKind = Literal["self", "cross"]
"""How both decoders work: ``self``-attention over visible and mask tokens (MAE, HPM), or ``cross``-attention from mask
tokens to visible ones (CrossMAE)."""

PredictedLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(scores (B, M), patch loss (B, M), valid (B, M) or None) -> L_pred, a scalar."""

PatchHardness = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(prediction (V, M, P), target (V, M, Q), images (B, C, H, W), index (V, M)) -> how hard each patch is (V, M)."""


class StudentOutput(NamedTuple):
    """What the student says about the decoded patches: the hidden ones, or some of them, in image order."""

    prediction: Float[Tensor, "v q p"]
    """The reconstruction."""
    scores: Float[Tensor, "v q"] | None
    """Predicted loss from the masked view, higher = harder; None where the predictor does not learn there."""
    full_scores: Float[Tensor, "v q"] | None
    """Predicted loss from the teacher's encoding of the full image; None where the predictor does not learn there."""


class Answers(NamedTuple):
    """What the teacher says about the full images."""

    features: Float[Tensor, "b t d"]
    """Its encoding."""
    scores: Float[Tensor, "b n"] | None
    """Predicted loss, higher = harder; None without a loss predictor."""
    guide: Float[Tensor, "b n"] | None
    """What the mask policy is told of each patch."""


class Losses(NamedTuple):
    """The losses of one batch."""

    reconstruction: Float[Tensor, ""]
    """L_rec: mean patch loss over the hidden patches."""
    prediction: Float[Tensor, ""]
    """L_pred; 0 without a loss predictor."""
    total: Float[Tensor, ""]
    """L_rec + weight * L_pred: what is differentiated."""
    rank_correlation: Float[Tensor, ""]
    """Spearman correlation, per image, of the teacher's scores with what they predict, the true patch loss or another
    hardness: does mining see anything?"""


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
        predictor_view: Where the loss predictor learns.
        predictor_detached: Let the loss predictor learn from the decoder input without shaping it.
        reduction: Losses are predicted from the full image made this many times smaller per side.
        residual: Under autocast, what blocks add to (:func:`hardpatch.method.vit.to_residual`); None: float32, as
            autocast leaves it.
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
        predictor_view: PredictorView = "masked",
        predictor_detached: bool = False,
        reduction: int = 1,
        residual: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.predictor_view = predictor_view
        self.predictor_detached = predictor_detached
        self.reduction = reduction
        self.residual = residual
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.positions = nn.Buffer(sincos_positions(grid_size(encoder), decoder_dim).unsqueeze(0))
        kind: type[Decoder | CrossDecoder] = CrossDecoder if decoder == "cross" else Decoder
        self.reconstructor = kind(decoder_dim, depth=decoder_depth, heads=decoder_heads, out_dim=target_dim)
        self.predictor: Decoder | CrossDecoder | None = None
        if predictor_depth:
            # As published, the head is as wide as a patch's pixels and its mean is the score: the same functions as
            # a head of width 1, with other training dynamics.
            self.predictor = kind(
                decoder_dim,
                depth=predictor_depth,
                heads=decoder_heads,
                out_dim=encoder.patch_embed.proj.weight[0].numel(),
            )
        for part in (self.decoder_embed, self.reconstructor, self.predictor):
            if part is not None:
                initialise(part)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        hidden: Bool[Tensor, "v n"],
        *,
        num_hidden: int,
        decoded: Int[Tensor, "v q"] | None = None,
        full_features: Float[Tensor, "b t d"] | None = None,
        predict: bool = True,
    ) -> StudentOutput:
        """Reconstruct the hidden patches and predict how large the loss on each will be.

        Args:
            images: Normalised images.
            hidden: True = hidden; exactly ``num_hidden`` per view, one or more views of every image.
            num_hidden: M.
            decoded: Indices of the hidden patches to decode, in image order; None: all.
            full_features: The teacher's encoding of the full images, for a predictor that learns on it.
            predict: Ask the loss predictor, if there is one.
        """
        visible, masked = split_patches(hidden, num_hidden)
        decoded = masked if decoded is None else decoded
        predict = predict and self.predictor is not None
        grid = grid_of(self.encoder, images)
        features = encode(self.encoder, images, visible, residual=self.residual)
        context, queries = self.decoder_input(features, visible, decoded, grid)
        scores = full_scores = None
        if predict and self.predictor_view != "full":
            scores = self._predict(context, queries)
        if predict and self.predictor_view != "masked" and full_features is not None:
            full_scores = self.score(full_features, grid, decoded)
        return StudentOutput(self.reconstructor(context, queries), scores, full_scores)

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
        context = to_residual(context, self.residual)
        return context, queries.to(context.dtype)

    def positions_on(self, grid: tuple[int, int]) -> Float[Tensor, "1 n c"]:
        """The decoders' position table for a grid of patches."""
        return resample_positions(self.positions, grid_size(self.encoder), grid)

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
        if isinstance(self.predictor, CrossDecoder):
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
        context, queries = (to_residual(tokens, self.residual) for tokens in (context, queries))
        scores: Tensor = self.predictor(context, queries).float().mean(dim=-1)
        return scores

    def encode_full(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b t d"]:
        """Tokens of the full image, at the size at which losses are predicted."""
        smaller = images if self.reduction == 1 else F.avg_pool2d(images, self.reduction)
        return encode(self.encoder, smaller, residual=self.residual)

    def predict_loss(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
        """Predicted loss of every patch of the full image, higher = harder."""
        return self.score(self.encode_full(images), grid_of(self.encoder, images))


class Teacher(nn.Module):
    """Exponential moving average of the whole student: its reconstructor too, though only scores are asked of it."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.model = copy.deepcopy(student).eval().requires_grad_(False)

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

    def predict_loss(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
        """Predicted loss of every patch of the full image, higher = harder, without gradient."""
        return self.score(self.encode(images), grid_of(self.model.encoder, images))

    @torch.no_grad()
    def encode_with_attention(
        self, images: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b n"]]:
        """Tokens of the full image, and the attention of its class token to every patch in the last block."""
        return encode_with_attention(self.model.encoder, images, residual=self.model.residual)

    @torch.no_grad()
    def update(self, student: Student, decay: float) -> None:
        """Move every tensor to ``decay`` * teacher + (1 - ``decay``) * student."""
        mine, theirs = ([_share_here(t) for t in m.state_dict().values()] for m in (self.model, student))
        get_ema_multi_avg_fn(decay)(mine, theirs, None)


def _share_here(tensor: Tensor) -> Tensor:
    """Of a tensor that is sharded over processes, the part that this one holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def relative_loss(
    scores: Float[Tensor, "b m"], patch_loss: Float[Tensor, "b m"], valid: Bool[Tensor, "b m"] | None = None
) -> Float[Tensor, ""]:
    """Relative predicted loss: which of two patches of an image is harder? Binary cross-entropy over all pairs.

    Over ordered pairs with different losses, the cross-entropy of sigmoid(s_i - s_j) against [l_i > l_j]. Both orders
    of a pair give the same value, so the mean runs once over the pairs with l_i > l_j. The published 1e-6 inside the
    logarithm stays: it bounds the loss of one pair, and trajectories are only equal with it.

    Args:
        scores: Predicted loss s.
        patch_loss: True loss l; no gradient flows into it.
        valid: Patches that take part; None: all.
    """
    patch_loss = patch_loss.detach()
    harder = patch_loss.unsqueeze(2) > patch_loss.unsqueeze(1)  # (B, M, M): is i harder than j?
    if valid is not None:
        harder = harder & valid.unsqueeze(2) & valid.unsqueeze(1)
    margin = scores.float().unsqueeze(2) - scores.float().unsqueeze(1)
    cross_entropy = -(torch.sigmoid(margin) + 1e-6).log()
    return (cross_entropy * harder).sum() / harder.sum().clamp(min=1)


def absolute_loss(
    scores: Float[Tensor, "b m"], patch_loss: Float[Tensor, "b m"], valid: Bool[Tensor, "b m"] | None = None
) -> Float[Tensor, ""]:
    """Absolute predicted loss: mean squared error against the true loss, standardised within each image.

    Args:
        scores: Predicted loss.
        patch_loss: True loss; no gradient flows into it.
        valid: Patches that take part; None: all.
    """
    patch_loss = patch_loss.detach()
    if valid is None:
        variance, mean = torch.var_mean(patch_loss, dim=1, keepdim=True)
        return F.mse_loss(scores.float(), (patch_loss - mean) / (variance + 1e-6).sqrt())
    count = valid.sum(dim=1, keepdim=True)
    mean = (patch_loss * valid).sum(dim=1, keepdim=True) / count.clamp(min=1)
    variance = ((patch_loss - mean).square() * valid).sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
    return mean_over((scores.float() - (patch_loss - mean) / (variance + 1e-6).sqrt()).square(), valid)


PREDICTED_LOSSES: dict[str, PredictedLoss | None] = {
    "relative": relative_loss,
    "absolute": absolute_loss,
    "none": None,
}


def rank_correlation(
    a: Float[Tensor, "b m"], b: Float[Tensor, "b m"], valid: Bool[Tensor, "b m"] | None = None
) -> Float[Tensor, " b"]:
    """Spearman's rank correlation of each row; ties are ranked in the order in which they stand.

    Args:
        a: Any values.
        b: Others.
        valid: Entries that take part; None: all. A row of fewer than two is 0.
    """
    both = torch.stack([a, b])
    if valid is not None:
        both = both.masked_fill(~valid, torch.inf)  # last, so that the others keep the ranks among themselves
    ranks = both.argsort(dim=-1, stable=True).argsort(dim=-1).float()
    if valid is None:
        ranks = ranks - ranks.mean(dim=-1, keepdim=True)
    else:
        ranks = (ranks - (valid.sum(dim=-1, keepdim=True) - 1) / 2) * valid
    return (ranks[0] * ranks[1]).sum(-1) / (ranks.square().sum(-1).prod(0).sqrt() + 1e-12)


def mean_over(values: Float[Tensor, "b m"], valid: Bool[Tensor, "b m"] | None) -> Float[Tensor, ""]:
    """Mean of the values that take part, 0 of none; ``valid`` None: all do."""
    return values.mean() if valid is None else (values * valid).sum() / valid.sum().clamp(min=1)


@dataclass(frozen=True)
class Method:
    """The choices of a run, and what they make of one batch.

    Args:
        target: What is reconstructed.
        mask_policy: Which patches are hidden.
        num_hidden: M.
        predicted_loss: How the loss is predicted; None without a loss predictor.
        prediction_weight: Weight of L_pred in the total; published: 1.
        guide: What the mask policy is told of each patch.
        predictor_view: Where the loss predictor learns; as the student's.
        num_decoded: How many of the hidden patches are decoded, drawn at random; None: all, as published.
        hardness: What makes a patch hard, if not its reconstruction loss (published).
    """

    target: Target
    mask_policy: MaskPolicy
    num_hidden: int
    predicted_loss: PredictedLoss | None
    prediction_weight: float = 1.0
    guide: Guide | None = "predicted_loss"
    predictor_view: PredictorView = "masked"
    num_decoded: int | None = None
    hardness: PatchHardness | None = None

    @property
    def needs_teacher(self) -> bool:
        """Does a step ask the teacher? Random masks need not, even with a loss predictor, so they pay for none."""
        learns_on_full_view = self.predicted_loss is not None and self.predictor_view != "masked"
        return self.guide is not None or self.target.needs_teacher or learns_on_full_view

    def ask(self, teacher: Teacher, images: Float[Tensor, "b c h w"]) -> Answers:
        """Everything that the run's choices need of the teacher, from one pass over the full images."""
        attention = scores = None
        if self.guide == "attention":
            features, attention = teacher.encode_with_attention(images)
        else:
            features = teacher.encode(images)
        if self.predicted_loss is not None:
            scores = teacher.score(features, grid_of(teacher.model.encoder, images))
        guide = {"predicted_loss": scores, "attention": attention, None: None}[self.guide]
        return Answers(features, scores, guide)

    def step(
        self,
        student: Callable[..., StudentOutput],
        teacher: Teacher | None,
        images: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "v n"],
        *,
        num_hard: int | Int[Tensor, ""],
        answers: Answers | None = None,
        valid: Bool[Tensor, "b n"] | None = None,
    ) -> Losses:
        """One forward pass in the paper's order; the caller differentiates, optimises and updates the teacher.

        Args:
            student: The student, or DDP around it.
            teacher: Its EMA; None where nobody needs predicted losses.
            images: Normalised images.
            noise: Uniform in [0, 1), the randomness of the masks: a row per view. With more rows than images every
                image gets several masks (data2vec 2.0), and the teacher's one pass serves them all.
            num_hard: ``int(M * a_t)`` patches are hidden by predicted loss.
            answers: What the teacher said of these images at an earlier step, if it is not to be asked again.
            valid: Patches of pixels that are all data; None: all. The others are never chosen by predicted loss, and
                count in no loss.
        """
        # Step 1. The teacher sets the exercise.
        if answers is None and teacher is not None:
            answers = self.ask(teacher, images)
        features, scores, guide = (None, None, None) if answers is None else answers
        guide = None if guide is None else per_view(guide, len(noise))
        valid = None if valid is None else per_view(valid, len(noise))
        hidden = self.mask_policy(guide, noise, num_hidden=self.num_hidden, num_hard=num_hard, valid=valid)
        decoded = self.choose_decoded(hidden, noise, valid)
        # Step 2. The student solves it.
        output = student(
            images,
            hidden,
            num_hidden=self.num_hidden,
            decoded=decoded,
            full_features=features,
            predict=self.predicted_loss is not None,
        )
        return self.losses(output, images, decoded, scores, features, valid)

    def choose_decoded(
        self, hidden: Bool[Tensor, "v n"], noise: Float[Tensor, "v n"], valid: Bool[Tensor, "v n"] | None = None
    ) -> Int[Tensor, "v q"]:
        """The hidden patches that are decoded, in image order: all, or ``num_decoded`` of them at random, of those with
        data first."""
        _, index = split_patches(hidden, self.num_hidden)
        if self.num_decoded is None or self.num_decoded == self.num_hidden:
            return index
        lot = more_noise(noise, self.num_hidden, purpose=1)
        if valid is not None:
            lot = lot + valid.gather(1, index)
        return index.gather(1, lot.topk(self.num_decoded, dim=1).indices.sort(dim=1).values)

    def losses(
        self,
        output: StudentOutput,
        images: Float[Tensor, "b c h w"],
        decoded: Int[Tensor, "v q"],
        teacher_scores: Float[Tensor, "b n"] | None,
        teacher_features: Float[Tensor, "b t d"] | None = None,
        valid: Bool[Tensor, "v n"] | None = None,
    ) -> Losses:
        """Step 3. How well the student reconstructed, and how well it knew."""
        counted = None if valid is None else valid.gather(1, decoded)
        with torch.no_grad():
            target = take(self.target(images, teacher_features), decoded)
        patch_loss = self.target.patch_loss(output.prediction, target)
        reconstruction = mean_over(patch_loss, counted)
        hardness = patch_loss.detach()
        if self.hardness is not None:
            hardness = self.hardness(output.prediction.detach(), target, images, decoded)
        prediction = reconstruction.new_zeros(())
        for scores in (output.scores, output.full_scores):
            if self.predicted_loss is not None and scores is not None:
                prediction = prediction + self.predicted_loss(scores, hardness, counted)
        correlation = reconstruction.new_full((), torch.nan)
        if teacher_scores is not None:
            with torch.no_grad():
                expected = per_view(teacher_scores, len(decoded)).gather(1, decoded)
                correlation = rank_correlation(expected, hardness, counted).mean()
        return Losses(
            reconstruction=reconstruction,
            prediction=prediction,
            total=reconstruction + self.prediction_weight * prediction,
            rank_correlation=correlation,
        )
