"""The features of the teacher as the target."""

from __future__ import annotations

from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from hardpatch.method.targets.target import TargetContext, feature_loss


class EmaFeatureTarget:
    """The teacher's own features of each patch, after the final norm, with :func:`feature_loss`.

    Args:
        encoder: The student's encoder, of which the teacher is the average.
    """

    needs_teacher = True

    def __init__(self, encoder: VisionTransformer) -> None:
        self.dim = int(encoder.embed_dim)
        self.num_prefix_tokens = int(encoder.num_prefix_tokens)

    def __call__(
        self, images: Float[Tensor, "b c h w"], features: Float[Tensor, "b t d"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """The teacher's patch tokens.

        Raises:
            ValueError: There are no ``features``.
        """
        if features is None:
            raise ValueError("this target is made of the teacher's features, got features=None")
        return features[:, self.num_prefix_tokens :].float()

    def patch_loss(self, prediction: Float[Tensor, "b m d"], target: Float[Tensor, "b m d"]) -> Float[Tensor, "b m"]:
        """Distance of the directions of two features."""
        return feature_loss(prediction, target)


def build(context: TargetContext) -> EmaFeatureTarget:
    """The target ``ema_features``."""
    return EmaFeatureTarget(context.encoder)
