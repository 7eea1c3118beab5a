"""Student, teacher and the choices of the method put together: all that a training loop needs.

model = HPM.create("vit_small_patch16_224", target="norm_pix")
optimizer = torch.optim.AdamW(model.student.parameters(), lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05)
for step, images in enumerate(batches):                      # normalised, (B, 3, 224, 224)
    losses = model.step(images, share=0.5 * step / total_steps)
    losses.total.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.update_teacher(decay=0.999)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hardpatch.method.choices import MASKS, TARGETS, Guide, guide_of, resolve, row_of
from hardpatch.method.losses import PREDICTED_LOSSES, PredictedLoss
from hardpatch.method.masks import num_hidden_patches
from hardpatch.method.method import Losses, Method, PredictorView
from hardpatch.method.student import DecoderKind, Student, StudentOutput, Teacher
from hardpatch.method.targets.pixels import PixelHardness, PixelTarget
from hardpatch.method.targets.target import Target, TargetContext
from hardpatch.method.vit import Geometry, create_encoder, has_class_attention
from hardpatch.runtime.errors import InputError


class HPM:
    """A student, its teacher and the method by which they learn.

    Args:
        student: The networks that are trained.
        method: The choices of the run.
        teacher: The student's moving average; None copies the student as it is, where a teacher is used at all.
    """

    def __init__(self, student: Student, method: Method, teacher: Teacher | None = None) -> None:
        self.student = student
        self.method = method
        self.teacher = Teacher(student) if teacher is None and self.keeps_teacher else teacher

    @classmethod
    def create(
        cls,
        encoder: str | VisionTransformer,
        *,
        image_size: tuple[int, int] = (224, 224),
        channels: int = 3,
        patch_size: int | None = None,
        target: str | Target = "pixels",
        target_model: str = "",
        mask: str = "hard",
        guide: Guide | None = None,
        mask_ratio: float = 0.75,
        decoded_share: float = 1.0,
        predicted_loss: Literal["relative", "absolute", "none"] = "relative",
        predictor_view: PredictorView = "masked",
        decoder: DecoderKind = "self",
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        predictor_depth: int = 8,
        teacher_reduction: int = 1,
    ) -> HPM:
        """Build all of it in one line; what is not given is the published run's.

        Args:
            encoder: Name of a timm ViT, or a ViT that is there already.
            image_size: Height and width in pixels, for an encoder by name.
            channels: Channels of the images, likewise.
            patch_size: Side of a patch, likewise; None keeps the model's own.
            target: A name in :data:`hardpatch.method.choices.TARGETS`, or a target of your own.
            target_model: timm model behind ``timm_features``.
            mask: A name in :data:`hardpatch.method.choices.MASKS`.
            guide: What guides the mask; None: what the table says. A ``scout`` needs no teacher.
            mask_ratio: Share of the patches that is hidden.
            decoded_share: Share of the hidden patches that is decoded, drawn at random.
            predicted_loss: How the loss is predicted; ``none`` with random masks is plain MAE.
            predictor_view: Where the loss predictor learns.
            decoder: Kind of both decoders.
            decoder_dim: Token width of both decoders.
            decoder_depth: Blocks of the reconstructor.
            decoder_heads: Attention heads of both decoders.
            predictor_depth: Blocks of the loss predictor.
            teacher_reduction: The teacher sees images this many times smaller per side.

        Raises:
            InputError: A name is unknown, or a size does not fit.
        """
        if isinstance(encoder, str):
            encoder = create_encoder(encoder, image_size=image_size, channels=channels, patch_size=patch_size)
        if isinstance(target, str):
            target = make_target(target, default_context(encoder, target_model))
        student = Student(
            encoder, target_dim=target.dim, decoder=decoder, decoder_dim=decoder_dim, decoder_depth=decoder_depth,
            decoder_heads=decoder_heads, predictor_depth=0 if predicted_loss == "none" else predictor_depth,
            reduction=teacher_reduction, scout=guide == "scout",
        )  # fmt: skip
        method = make_method(
            encoder, target, mask=mask, guide=guide, mask_ratio=mask_ratio, decoded_share=decoded_share,
            predicted_loss=predicted_loss, predictor_view=predictor_view,
        )  # fmt: skip
        return cls(student, method)

    def to(self, device: torch.device) -> HPM:
        """Move everything to a device, in place."""
        for part in (*self.networks, self.method.target):
            if isinstance(part, nn.Module):
                part.to(device)
        return self

    @property
    def networks(self) -> tuple[Student | Teacher, ...]:
        """The student, and the teacher if there is one."""
        return (self.student,) if self.teacher is None else (self.student, self.teacher)

    @property
    def geometry(self) -> Geometry:
        """How the images are cut into patches."""
        return self.student.geometry

    @property
    def keeps_teacher(self) -> bool:
        """Is there a teacher? Where steps use it, and where the losses that it predicts are shown."""
        return self.method.needs_teacher or (self.student.predictor is not None and self.student.scout is None)

    def step(
        self,
        images: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "v n"] | None = None,
        *,
        share: float | None = None,
        num_hard: int | Int[Tensor, ""] = 0,
        valid: Bool[Tensor, "b n"] | None = None,
        student: Callable[..., StudentOutput] | None = None,
    ) -> Losses:
        """One forward pass; the caller differentiates ``total``.

        Args:
            images: Normalised images.
            noise: Uniform in [0, 1), a row for each view; None draws one view of every image.
            share: a_t, the share of the hidden patches that the guide's scores choose.
            num_hard: Or their number, ``int(M * a_t)``.
            valid: Patches of pixels that are all data; None: all.
            student: DDP around the student; None: the student itself.
        """
        if noise is None:
            noise = torch.rand(len(images), self.geometry.num_patches, device=images.device)
        if share is not None:
            num_hard = int(self.method.num_hidden * share)
        teacher = self.teacher if self.method.needs_teacher else None
        batch = self.method.mask(self.student, teacher, images, noise, num_hard=num_hard, valid=valid)
        return self.method.learn(student or self.student, batch)

    def update_teacher(self, *, decay: float) -> None:
        """After an optimizer step: let the teacher follow the student, if there is one."""
        if self.teacher is not None:
            self.teacher.update(self.student, decay)

    def predict_loss(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
        """How hard every patch of the full image is expected to be, higher = harder, without gradient."""
        with torch.no_grad():
            return (self.student if self.teacher is None else self.teacher).predict_loss(images)


def default_context(encoder: VisionTransformer, target_model: str = "") -> TargetContext:
    """What a target is built from where images are normalised by ImageNet's statistics, or to -1..1."""
    geometry = Geometry.of(encoder)
    if geometry.channels == len(IMAGENET_DEFAULT_MEAN):
        return TargetContext(geometry, encoder, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, target_model)
    half = (0.5,) * geometry.channels
    return TargetContext(geometry, encoder, half, half, target_model)


def make_target(name: str, context: TargetContext) -> Target:
    """Build a target of the table.

    Raises:
        InputError: The name is unknown, or a model or tokenizer cannot be loaded or does not fit.
    """
    target: Target = resolve(row_of(TARGETS, name, field="target").build)(context)
    return target


def make_method(
    encoder: VisionTransformer,
    target: Target,
    *,
    mask: str,
    guide: Guide | None = None,
    mask_ratio: float,
    decoded_share: float = 1.0,
    predicted_loss: str = "relative",
    prediction_weight: float = 1.0,
    predictor_view: PredictorView = "masked",
    hardness_block: int = 1,
    hardness_in_pixels: bool = False,
) -> Method:
    """The choices of a run, checked against the encoder's patches; arguments are the config's fields.

    Raises:
        InputError: A name is unknown, the mask ratio leaves nothing hidden or nothing visible on this grid, or the mask
            is guided by what is not there: attention, or a predicted loss.
    """
    guide, geometry = guide_of(mask, guide), Geometry.of(encoder)
    predict = row_of(PREDICTED_LOSSES, predicted_loss, field="predicted_loss")
    (rows, columns), patch = geometry.grid, geometry.patch
    num_hidden = num_hidden_patches(rows * columns, mask_ratio)
    if not 0 < num_hidden < rows * columns:
        raise InputError(
            f"mask_ratio: must hide at least one and leave at least one of the {rows}x{columns} patches, "
            f"got {mask_ratio}"
        )
    if predicted_loss == "absolute" and num_hidden < 2:
        raise InputError("predicted_loss: 'absolute' standardises within an image and needs at least 2 hidden patches")
    num_decoded = max(1, round(num_hidden * decoded_share))
    if num_decoded < 2 and (predicted_loss != "none" or guide == "scout"):
        raise InputError(
            f"decoded_share: must leave at least 2 of the {num_hidden} hidden patches, which are compared to "
            f"learn what is hard, got {decoded_share}"
        )
    _check_guide(mask, guide, predict, encoder)
    if any(side % hardness_block for side in patch):
        raise InputError(f"hardness_block: must divide a patch of {patch[0]}x{patch[1]} pixels, got {hardness_block}")
    if patch == (hardness_block, hardness_block) and isinstance(target, PixelTarget) and target.normalise:
        raise InputError(
            f"hardness_block: must be smaller than a patch ({hardness_block}x{hardness_block} pixels) with target "
            f"'norm_pix', which takes the mean of every patch away; got {hardness_block}"
        )
    own = hardness_block > 1 or hardness_in_pixels
    return Method(
        target=target,
        mask_policy=resolve(MASKS[mask].policy),
        grid=geometry.grid,
        num_hidden=num_hidden,
        predicted_loss=predict,
        prediction_weight=prediction_weight,
        guide=guide,
        predictor_view=predictor_view,
        num_decoded=num_decoded,
        hardness=PixelHardness(patch, block=hardness_block, in_pixels=hardness_in_pixels) if own else None,
    )


def _check_guide(mask: str, guide: Guide | None, predict: PredictedLoss | None, encoder: VisionTransformer) -> None:
    """Refuse a mask that is guided by what is not there: attention, or a predicted loss."""
    if guide == "predicted_loss" and predict is None:
        raise InputError(f"mask: {mask!r} chooses by predicted loss, so predicted_loss must not be 'none'")
    if guide == "attention" and not has_class_attention(encoder):
        name = (getattr(encoder, "pretrained_cfg", None) or {}).get("architecture", type(encoder).__name__)
        raise InputError(f"mask: {mask!r} needs an encoder with a class token and plain attention blocks, got {name!r}")
