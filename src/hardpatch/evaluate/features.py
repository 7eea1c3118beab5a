"""Features of a frozen encoder, of every image of a source, in order and without augmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from hardpatch.config.evaluations import Pooling
from hardpatch.data.loader.loading import Damage, Normalise, ordered_batches
from hardpatch.data.sources import Source, class_indices
from hardpatch.evaluate.classify.labelled_images import LabelledImages
from hardpatch.method.student import Teacher
from hardpatch.method.vit import encode
from hardpatch.runtime.distributed import gather_objects, is_main_of_environment, rank, world_size
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import tracked, warn


class Features(NamedTuple):
    """Features of a source."""

    values: Float[Tensor, "n d"]
    """float32, on the CPU."""
    indices: list[int]
    """Position of each row in the source."""
    damaged: list[Damage]
    """Images that could not be read; they have no row."""


class SplitFeatures(NamedTuple):
    """Features of both sides of a split."""

    train: Features
    val: Features

    def labels(self, images: LabelledImages) -> tuple[Int[Tensor, " n"], Int[Tensor, " q"]]:
        """Classes of the images that have features, as positions in ``images.classes``: of training, of validation."""
        train, val = (
            torch.from_numpy(class_indices([(source.labels or ())[i] for i in side.indices], images.classes))
            for side, source in ((self.train, images.train), (self.val, images.val))
        )
        return train, val

    def report_damage(self, images: LabelledImages, *, max_damaged: float) -> int:
        """:func:`report_damage` for both sides.

        Raises:
            InputError: More than ``max_damaged`` of one of them.
        """
        found = {"train": (self.train.damaged, len(images.train)), "val": (self.val.damaged, len(images.val))}
        return report_damage(found, max_damaged=max_damaged)


def pool(tokens: Float[Tensor, "b t d"], vit: VisionTransformer, pooling: Pooling) -> Float[Tensor, "b f"]:
    """One vector per image from the encoder's tokens.

    Raises:
        ValueError: The class token is asked of an encoder that has none.
    """
    # fc_norm is an identity, but in models that normalise after pooling.
    mean: Tensor = vit.fc_norm(tokens[:, vit.num_prefix_tokens :].mean(dim=1))
    if pooling == "mean":
        return mean
    if not vit.has_class_token:
        raise ValueError(f"pooling {pooling!r} needs a class token; this encoder has none, use 'mean'")
    first: Tensor = vit.fc_norm(tokens[:, 0])
    return first if pooling == "class" else torch.cat([F.normalize(first, dim=-1), F.normalize(mean, dim=-1)], dim=-1)


def standardised(scores: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """Predicted losses to mean 0 and deviation 1 within each image: only their differences were ever learnt."""
    scores = scores.float()
    variance, mean = torch.var_mean(scores, dim=1, keepdim=True)
    return (scores - mean) / (variance.sqrt() + 1e-12)


@torch.no_grad()
def extract_features(
    vit: VisionTransformer,
    source: Source,
    normalise: Normalise,
    *,
    size: tuple[int, int],
    pooling: Pooling,
    device: torch.device,
    bf16: bool = False,
    workers: int = 0,
    description: str = "features",
    teacher: Teacher | None = None,
) -> Features:
    """Run the encoder over a source; with several processes each takes a part and all get the whole.

    Args:
        pooling: Which tokens to keep.
        teacher: Whose predicted loss is the feature, for pooling ``hardness``.
    """
    mine = list(range(len(source)))[rank() :: world_size()]
    was_training = vit.training
    vit.eval()
    values, kept, damaged = [], [], []
    batches = ordered_batches(source, size=size, indices=mine, workers=workers)
    try:
        for batch in tracked(batches, description, total=-(-len(mine) // 128)):
            damaged += batch.damaged
            if batch.indices:
                pixels = normalise(batch.images.to(device))
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    found = encode(vit, pixels) if teacher is None else teacher.predict_loss(pixels)
                values.append((pool(found.float(), vit, pooling) if teacher is None else standardised(found)).cpu())
                kept += batch.indices
    finally:
        vit.train(was_training)
    parts = gather_objects((torch.cat(values) if values else torch.empty(0, 0), kept, damaged))
    if not any(part for _, part, _ in parts):
        raise none_readable([item for *_, part in parts for item in part])
    rows = torch.cat([part for part, _, _ in parts if len(part)])
    where = [index for _, part, _ in parts for index in part]
    order = torch.tensor(where).argsort()
    return Features(rows[order], [where[i] for i in order.tolist()], [item for _, _, part in parts for item in part])


def split_features(
    vit: VisionTransformer,
    images: LabelledImages,
    normalise: Normalise,
    *,
    size: tuple[int, int],
    pooling: Pooling,
    device: torch.device,
    bf16: bool,
    workers: int = 0,
    teacher: Teacher | None = None,
) -> SplitFeatures:
    """Features of the images that are learnt from or looked among, and of those that are classified."""
    return SplitFeatures(*(
        extract_features(
            vit, source, normalise, size=size, pooling=pooling, device=device, bf16=bf16,
            workers=workers, description=f"features of {name}", teacher=teacher,
        )
        for name, source in (("train", images.train), ("val", images.val))
    ))  # fmt: skip


def none_readable(damaged: Sequence[Damage]) -> InputError:
    """What to raise where every image is damaged."""
    return InputError(f"no readable image among {len(damaged)}; the first: {damaged[0].name}: {damaged[0].reason}")


def report_damage(found: Mapping[str, tuple[Sequence[Damage], int]], *, max_damaged: float) -> int:
    """Name every damaged image of an evaluation once, and refuse a source of which too many are.

    Args:
        found: By the field that names a source: what of it could not be read, and its number of images.
        max_damaged: Share of a source that may be damaged.

    Returns:
        How many images the evaluation has to do without.

    Raises:
        InputError: More than ``max_damaged`` of a source.
    """
    if is_main_of_environment():
        for item in dict.fromkeys(item for damaged, _ in found.values() for item in damaged):
            warn(f"damaged image left out: {item.name}: {item.reason}")
    refuse_damage(found, max_damaged=max_damaged)
    return sum(len(damaged) for damaged, _ in found.values())


def refuse_damage(found: Mapping[str, tuple[Sequence[Damage], int]], *, max_damaged: float) -> None:
    """Stop where too many images of a source are damaged.

    Raises:
        InputError: More than ``max_damaged`` of one.
    """
    for field, (damaged, num_images) in found.items():
        if len(damaged) > max_damaged * num_images:
            raise InputError(
                f"max_damaged: at most {max_damaged:.1%} of the images may be damaged, and {len(damaged)} of the "
                f"{num_images} of {field} are; the first: {damaged[0].name}: {damaged[0].reason}"
            )
