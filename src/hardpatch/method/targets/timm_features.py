"""Features of a frozen timm model as the target: DINO, DINOv2, DINOv3, CLIP, SigLIP, or any CNN.

The model is a teacher that never changes. It belongs to no student, no optimizer and no checkpoint: a run that is
resumed loads it again by its name.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hardpatch.method.targets.target import TargetContext, feature_loss
from hardpatch.runtime.errors import InputError, suggest
from hardpatch.runtime.log import say


class FrozenModel(NamedTuple):
    """A timm model and the image size that it is fed."""

    model: Any
    """timm's models share their methods, not a class."""
    input_size: tuple[int, int]
    """Height and width in pixels."""


class TimmFeatureTarget(nn.Module):
    """Patch features of a frozen timm model, brought to the student's patch grid, with :func:`feature_loss`.

    Args:
        frozen: The model, from :func:`load_frozen`.
        grid: Rows and columns of the student's patches.
        mean: Channel means by which the run normalises its images, of values in 0..1.
        std: Channel standard deviations, likewise.

    Raises:
        InputError: The model cannot take images of this size, or its features are no map of the image.
    """

    needs_teacher = False
    model: Any

    def __init__(
        self, frozen: FrozenModel, *, grid: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.model = frozen.model.eval().requires_grad_(False)
        self.input_size = frozen.input_size
        self.grid = grid
        config = frozen.model.pretrained_cfg
        ours, its = (torch.tensor((mean, std)), torch.tensor((config["mean"], config["std"])))
        if ours.shape != its.shape:
            say(
                f"target_model: was trained on {its.shape[1]} channels and gets {ours.shape[1]}; its first layer is "
                "adapted by timm, and its images keep the run's own normalisation"
            )
            its = ours
        scale = ours[1] / its[1]
        self.scale = nn.Buffer(scale.view(-1, 1, 1))
        self.shift = nn.Buffer(((ours[0] - its[0]) / its[1]).view(-1, 1, 1))
        self.channels_last, self.dim = self._probe(len(mean))

    def _probe(self, channels: int) -> tuple[bool, int]:
        """Run one image of noise: are the features channels-last, and how wide are they?"""
        noise = torch.rand(1, channels, *self.input_size, generator=torch.Generator().manual_seed(0))
        size = f"{self.input_size[0]}x{self.input_size[1]}"
        try:
            with torch.no_grad():
                features = self.model.forward_features(noise)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise InputError(f"target_model: it cannot take images of {size} pixels: {error}") from error
        width = int(self.model.num_features)
        if not isinstance(features, Tensor) or features.ndim not in (3, 4) or width not in features.shape[1:]:
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise InputError(f"target_model: its features must be tokens or a map of width {width}, got {found}")
        channels_last = features.shape[1] != width or getattr(self.model, "output_fmt", None) == "NHWC"
        rows, columns = self._as_map(features, channels_last).shape[2:]
        if rows * columns == 1 and math.prod(self.grid) > 1:
            raise InputError(
                f"target_model: its features of {size}-pixel images are a single vector, so that all "
                f"{self.grid[0]}x{self.grid[1]} patches would have the same target; use larger images or another model"
            )
        return channels_last, width

    @torch.no_grad()
    def forward(
        self, images: Float[Tensor, "b c h w"], features: Float[Tensor, "b t d"] | None = None
    ) -> Float[Tensor, "b n p"]:
        """The model's features at every patch of the student; the teacher's ``features`` are not used."""
        images = images.float() * self.scale + self.shift
        if images.shape[2:] != self.input_size:
            images = F.interpolate(images, self.input_size, mode="bicubic", antialias=True)
        found = self._as_map(self.model.forward_features(images), self.channels_last).float()
        return resample(found, self.grid).flatten(2).transpose(1, 2)

    def _as_map(self, features: Tensor, channels_last: bool) -> Float[Tensor, "b p r s"]:
        """Tokens or a map, channels first or last, as a map with channels first.

        Raises:
            InputError: The tokens do not cover the image in rows and columns.
        """
        if features.ndim == 4:
            return features.permute(0, 3, 1, 2) if channels_last else features
        patches = features[:, getattr(self.model, "num_prefix_tokens", 0) :]  # timm: models without have no attribute
        count = patches.shape[1]
        side = math.sqrt(count / math.prod(self.input_size))  # patches per pixel, along each axis
        rows, columns = (round(length * side) for length in self.input_size)
        if rows * columns != count:
            raise InputError(
                f"target_model: its {count} tokens of an image of {self.input_size[0]}x{self.input_size[1]} pixels are "
                "no grid of square patches"
            )
        found: Tensor = patches.transpose(1, 2).unflatten(2, (rows, columns))
        return found

    def patch_loss(self, prediction: Float[Tensor, "b m p"], target: Float[Tensor, "b m p"]) -> Float[Tensor, "b m"]:
        """Distance of the directions of two features."""
        return feature_loss(prediction, target)


def build(context: TargetContext) -> TimmFeatureTarget:
    """The target ``timm_features``.

    Raises:
        InputError: The model cannot be loaded, or does not suit the images.
    """
    grid, image_size = context.geometry.grid, context.geometry.image_size
    frozen = load_frozen(context.target_model, grid=grid, image_size=image_size, channels=context.geometry.channels)
    return TimmFeatureTarget(frozen, grid=grid, mean=context.mean, std=context.std)


def resample(features: Float[Tensor, "b p r s"], grid: tuple[int, int]) -> Float[Tensor, "b p i j"]:
    """A feature map on another grid: the mean over each patch where it is finer, bilinear where it is coarser."""
    rows, columns = features.shape[2:]
    if (rows, columns) == grid:
        return features
    if rows >= grid[0] and columns >= grid[1]:
        return F.interpolate(features, grid, mode="area")
    return F.interpolate(features, grid, mode="bilinear", antialias=True)


def load_frozen(name: str, *, grid: tuple[int, int], image_size: tuple[int, int], channels: int) -> FrozenModel:
    """Load a timm model with its weights, and choose the size of the images that it is fed.

    A ViT is built for the image size at which its patch grid is ours. Other models get the run's images as they are,
    or at the one size that they can take.

    Args:
        name: Of a timm model with weights, e.g. ``vit_base_patch16_224.dino``; ``local-dir:PATH`` or ``hf-hub:NAME``.
        grid: Rows and columns of the student's patches.
        image_size: Height and width of the run's images.
        channels: Channels of the run's images; timm inflates the first layer where the model has others.

    Raises:
        InputError: Unknown name, no weights, or weights that cannot be fetched or do not fit.
    """
    try:
        with torch.device("meta"):  # its class and patch size, without any work
            sketch = timm.create_model(name)
    except Exception as error:  # whatever a damaged description, or a hub's client, may raise
        if name.startswith(("local-dir:", "hf-hub:")):
            raise InputError(f"target_model: cannot read the description of {name!r}: {_of(error)}") from error
        known = [*timm.list_models(), *timm.list_models(pretrained=True)]
        raise InputError(f"target_model: timm has no model {name!r}: {error}{suggest(name, known)}") from error
    config: dict[str, Any] = sketch.pretrained_cfg
    if not any(config.get(place) for place in ("file", "url", "hf_hub_id")):
        raise InputError(
            f"target_model: there are no weights for {name!r}; choose one of timm.list_models(pretrained=True), or "
            "local-dir:PATH"
        )
    options: dict[str, Any] = {"in_chans": channels}
    if isinstance(sketch, VisionTransformer | Eva):
        patch = sketch.patch_embed.feat_ratio(as_scalar=False)
        input_size = (grid[0] * patch[0], grid[1] * patch[1])
        options["img_size"] = input_size
    else:
        input_size = tuple(config["input_size"][1:]) if config.get("fixed_input_size") else image_size
    try:
        # The classifier stays: without it timm would pass over weights that are missing in the file.
        return FrozenModel(timm.create_model(name, pretrained=True, **options), input_size)
    except Exception as error:  # whatever reading a damaged file, or a hub's client, may raise
        if name.startswith("local-dir:") or "loading state_dict" in str(error):
            problem = f"the weights of {name!r} cannot be loaded"
        else:
            problem = (
                f"the weights of {name!r} cannot be fetched (they need a network once; local-dir:PATH reads saved ones)"
            )
        raise InputError(f"target_model: {problem}: {_of(error)}") from error


def _of(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
