"""Hard Patches Mining, the method: what one step does with a batch.

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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from hardpatch.method.choices import Guide
from hardpatch.method.losses import PredictedLoss, mean_over, num_pairs, num_patches, rank_correlation, relative_loss
from hardpatch.method.masks import MaskInput, MaskPolicy, hide_top, split_patches
from hardpatch.method.student import Student, StudentOutput, Teacher
from hardpatch.method.targets.target import Target
from hardpatch.method.vit import grid_of, patch_variance, per_view, take
from hardpatch.runtime.seeding import more_noise

PredictorView = Literal["masked", "full", "both"]
"""On which view the loss predictor learns.

``masked``, as published: at the mask tokens of the student's masked view; its gradient trains the encoder too. But it
is *asked* on the full image, at visible patches, where it never learnt (the authors concede the mismatch).
``full``: on the teacher's encoding of the full image, exactly where it is asked; no gradient reaches the encoder.
``both``: the sum of the two.
"""


PatchHardness = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(prediction (V, M, P), target (V, M, Q), images (B, C, H, W), index (V, M)) -> how hard each patch is (V, M)."""


class FullView(NamedTuple):
    """What is known of the full images before anything is hidden."""

    features: Float[Tensor, "b t d"] | None
    """The teacher's encoding; None where the teacher is not asked."""
    scores: Float[Tensor, "b n"] | None
    """How hard each patch is expected to be, higher = harder; None where nothing says so."""
    guide: Float[Tensor, "b n"] | None
    """What the mask policy is told of each patch."""


class MaskedBatch(NamedTuple):
    """A batch with its masks: what the student is asked."""

    images: Float[Tensor, "b c h w"]
    """Normalised images."""
    hidden: Bool[Tensor, "v n"]
    """True = hidden; a row for each view."""
    decoded: Int[Tensor, "v q"]
    """The hidden patches that are decoded, in image order."""
    counted: Bool[Tensor, "v q"] | None
    """Which of those count in the losses: patches of pixels that are all data; None: all."""
    full: FullView
    """What is known of the full images."""
    valid: Bool[Tensor, "b n"] | None = None
    """Patches of pixels that are all data; None: all."""


class Losses(NamedTuple):
    """The losses of one batch."""

    reconstruction: Float[Tensor, ""]
    """L_rec: mean patch loss over the hidden patches."""
    prediction: Float[Tensor, ""]
    """L_pred; 0 without a loss predictor."""
    total: Float[Tensor, ""]
    """L_rec + weight * L_pred, and the scout's loss: what is differentiated."""
    rank_correlation: Float[Tensor, ""]
    """Spearman correlation, per image, of the scores of the full view with what they predict, the true patch loss or
    another hardness: does mining see anything?"""


@dataclass(frozen=True)
class Method:
    """The choices of a run, and what they make of one batch.

    Args:
        target: What is reconstructed.
        mask_policy: Which patches are hidden.
        grid: Rows and columns of patches.
        num_hidden: M.
        predicted_loss: How the loss is predicted; None without a loss predictor.
        prediction_weight: Weight of L_pred in the total; published: 1.
        guide: What the mask policy is told of each patch; None: nothing.
        predictor_view: Where the loss predictor learns.
        num_decoded: How many of the hidden patches are decoded, drawn at random; None: all, as published.
        hardness: What makes a patch hard, if not its reconstruction loss (published).
    """

    target: Target
    mask_policy: MaskPolicy
    grid: tuple[int, int]
    num_hidden: int
    predicted_loss: PredictedLoss | None
    prediction_weight: float = 1.0
    guide: Guide | None = "predicted_loss"
    predictor_view: PredictorView = "masked"
    num_decoded: int | None = None
    hardness: PatchHardness | None = None

    @property
    def learns_on_full_view(self) -> bool:
        """Does the loss predictor learn on the teacher's encoding of the full images?"""
        return self.predicted_loss is not None and self.predictor_view != "masked"

    @property
    def needs_teacher(self) -> bool:
        """Does a step use the teacher? Random masks do not, even with a loss predictor, and so do not pay for one."""
        return self.guide in ("predicted_loss", "attention") or self.target.needs_teacher or self.learns_on_full_view

    def step(
        self,
        student: Callable[..., StudentOutput],
        teacher: Teacher | None,
        images: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "v n"],
        *,
        num_hard: int | Int[Tensor, ""],
        valid: Bool[Tensor, "b n"] | None = None,
    ) -> Losses:
        """One forward pass in the paper's order; the caller differentiates, optimises and updates the teacher.

        Args:
            student: The student, or DDP around it.
            teacher: Its EMA; None where no step uses it.
            images: Normalised images.
            noise: Uniform in [0, 1), the randomness of the masks: a row per view. With more rows than images every
                image gets several masks (data2vec 2.0), and the teacher's one pass serves them all.
            num_hard: ``int(M * a_t)`` patches are hidden by the guide's scores.
            valid: Patches of pixels that are all data; None: all. The others are never chosen by score, and count in
                no loss.
        """
        inner = student.module if isinstance(student, DistributedDataParallel) else student
        asked = inner if isinstance(inner, Student) else None
        return self.learn(student, self.mask(asked, teacher, images, noise, num_hard=num_hard, valid=valid))

    def mask(
        self,
        student: Student | None,
        teacher: Teacher | None,
        images: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "v n"],
        *,
        num_hard: int | Int[Tensor, ""],
        valid: Bool[Tensor, "b n"] | None = None,
    ) -> MaskedBatch:
        """Steps 1 and 2. Teacher or scout look at the full images, which decides what is hidden. As :meth:`step`, but
        for the student, which is no DDP, and is asked only where it has a scout."""
        full = self.look(student, teacher, images, valid)
        scores = None if full.guide is None else per_view(full.guide, len(noise))
        known = None if valid is None else per_view(valid, len(noise))
        hidden = self.hide(scores, noise, num_hard=num_hard, valid=known)
        decoded = self.choose_decoded(hidden, noise, known)
        return MaskedBatch(
            images, hidden, decoded, None if known is None else known.gather(1, decoded), full, valid
        )  # fmt: skip

    def hide(
        self,
        scores: Float[Tensor, "v n"] | None,
        noise: Float[Tensor, "v n"],
        *,
        num_hard: int | Int[Tensor, ""],
        valid: Bool[Tensor, "v n"] | None = None,
    ) -> Bool[Tensor, "v n"]:
        """Priorities, then top-M: exactly M True in each row; arguments as in :class:`MaskInput`."""
        priorities = self.mask_policy(MaskInput(scores, noise, self.grid, self.num_hidden, num_hard, valid))
        return hide_top(priorities, self.num_hidden)

    def look(
        self,
        student: Student | None,
        teacher: Teacher | None,
        images: Float[Tensor, "b c h w"],
        valid: Bool[Tensor, "b n"] | None = None,
    ) -> FullView:
        """What the run's choices need to know of the full images: at most one pass of the teacher, one of the scout.

        Args:
            student: Has the scout; not asked without one.
            teacher: Its EMA; None: it is not asked.
            images: Normalised images.
            valid: Patches of pixels that are all data; None: all.
        """
        features = attention = scores = None
        if teacher is not None and self.guide == "attention":
            features, attention = teacher.encode_with_attention(images)
        elif teacher is not None and (
            self.needs_teacher or (self.predicted_loss is not None and self.guide != "scout")
        ):
            features = teacher.encode(images)
        if self.guide == "scout":
            if student is None:
                raise ValueError("masks that a scout guides need the student that has it, got None")
            scores = student.scout_scores(images, valid)
        elif teacher is not None and features is not None and self.predicted_loss is not None:
            scores = teacher.score(features, grid_of(teacher.model.encoder, images))
        if self.guide == "variance":
            patch = images.shape[2] // self.grid[0], images.shape[3] // self.grid[1]
            return FullView(features, scores, patch_variance(images, patch))
        return FullView(features, scores, attention if self.guide == "attention" else scores)

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

    def learn(
        self, student: Callable[..., StudentOutput], batch: MaskedBatch, weights: Float[Tensor, " 3"] | None = None
    ) -> Losses:
        """Step 3. The student reconstructs the hidden patches, and predicts how wrong it is on each.

        Args:
            student: The student, or DDP around it.
            batch: From :meth:`mask`.
            weights: Of L_rec, of L_pred and of the scout's loss in the total, for a part of a larger batch
                (:meth:`num_counted`); None: 1.
        """
        features = batch.full.features
        output = student(
            batch.images,
            batch.hidden,
            num_hidden=self.num_hidden,
            decoded=batch.decoded,
            full_features=features if self.learns_on_full_view else None,
            predict=self.predicted_loss is not None and self.predictor_view != "full",
            valid=batch.valid,
        )
        return self.losses(output, batch, weights)

    def num_counted(self, batch: MaskedBatch) -> Float[Tensor, " 3"]:
        """What L_rec, L_pred and the scout's loss are means of: patches or, for a relative loss, pairs that count.

        The loss of a batch that is computed in parts is the sum of the parts' losses, each weighted by its share of
        these numbers. (Of pairs with equal losses, which the relative loss leaves out, nothing is known before; so the
        weights are exact up to the share of such pairs, which are next to none.)
        """
        counted = torch.ones_like(batch.decoded, dtype=torch.bool) if batch.counted is None else batch.counted
        predicted = num_pairs if self.predicted_loss is relative_loss else num_patches
        return torch.stack([num_patches(counted), predicted(counted), num_pairs(counted)])

    def losses(self, output: StudentOutput, batch: MaskedBatch, weights: Float[Tensor, " 3"] | None = None) -> Losses:
        """Step 4. How well the student reconstructed, and how well it knew; as :meth:`learn`."""
        full, decoded, counted = batch.full, batch.decoded, batch.counted
        with torch.no_grad():
            target = take(self.target(batch.images, full.features), decoded)
        patch_loss = self.target.patch_loss(output.prediction, target)
        reconstruction = mean_over(patch_loss, counted)
        hardness = patch_loss.detach()
        if self.hardness is not None:
            hardness = self.hardness(output.prediction.detach(), target, batch.images, decoded)
        prediction = reconstruction.new_zeros(())
        for scores in (output.scores, output.full_scores):
            if self.predicted_loss is not None and scores is not None:
                prediction = prediction + self.predicted_loss(scores, hardness, counted)
        correlation = reconstruction.new_full((), torch.nan)
        if full.scores is not None:
            with torch.no_grad():
                expected = per_view(full.scores, len(decoded)).gather(1, decoded)
                correlation = rank_correlation(expected, hardness, counted).mean()
        ranking = None if output.scout_scores is None else relative_loss(output.scout_scores, hardness, counted)
        if weights is not None:
            reconstruction, prediction = weights[0] * reconstruction, weights[1] * prediction
            ranking = None if ranking is None else weights[2] * ranking
        total = reconstruction + self.prediction_weight * prediction
        return Losses(
            reconstruction=reconstruction,
            prediction=prediction,
            total=total if ranking is None else total + ranking,
            rank_correlation=correlation,
        )
