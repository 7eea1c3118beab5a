"""Named runs: each recipe is a function whose docstring says where it comes from, what it costs and what to expect."""

from __future__ import annotations

from collections.abc import Callable

from hpm.config import Config, DataConfig, MethodConfig, ModelConfig, OptimisationConfig, RunConfig
from hpm.errors import InputError


def hpm() -> Config:
    """HPM as in the paper (raw pixels, relative loss, hard share 0 -> 0.5), schedules adapted to the run's length."""
    return Config()


def hpm_norm_pix() -> Config:
    """HPM on pixels normalised within each patch: the target with which MAE is strongest."""
    return Config(method=MethodConfig(target="norm_pix"))


def mae() -> Config:
    """MAE: random masks, no loss predictor, raw pixels (He et al., arXiv 2111.06377)."""
    return Config(method=MethodConfig(mask="random", predicted_loss="none"))


def mae_norm_pix() -> Config:
    """MAE with norm_pix: the honest baseline."""
    return Config(method=MethodConfig(mask="random", predicted_loss="none", target="norm_pix"))


def random_lpred() -> Config:
    """Random masks with the loss predictor: what predicting the loss is worth without mining."""
    return Config(method=MethodConfig(mask="random"))


def hpm_imagenet_200() -> Config:
    """The published ViT-B/16 run: ImageNet-1K, 200 epochs, batch 2,048; published fine-tune top-1 83.0.

    Command: ``torchrun --nproc-per-node 8 -m hpm pretrain --recipe hpm-imagenet-200 --data imagenet/train --out RUN``.
    Not run by us. Give --micro-batch-size where memory is short: the result stays the same.
    """
    return Config(
        method=MethodConfig(hard_share_unit="epoch"),
        optimisation=OptimisationConfig(
            epochs=200,
            batch_size=2048,
            warmup_epochs=40.0,
            ema_start=0.999,
            ema_end=0.9999,
            ema_ramp_epochs=100.0,
        ),
    )


def hpm_64px() -> Config:
    """Small images on small machines: 64 px, patch 8, a 6-block ViT 192 wide; minutes on two CPU cores."""
    return Config(
        data=DataConfig(image_size=(64, 64)),
        model=ModelConfig(
            encoder="vit_tiny_patch16_224",
            patch_size=8,
            encoder_depth=6,
            decoder_width=128,
            decoder_depth=2,
            decoder_heads=4,
            predictor_depth=2,
        ),
        method=MethodConfig(target="norm_pix", predictor_view="both"),
        optimisation=OptimisationConfig(epochs=10, batch_size=128, base_learning_rate=2e-3),
    )


def shapes_demo() -> Config:
    """What ``hpm demo`` runs: a 4-block ViT 128 wide on the embedded shapes, about three minutes on two CPU cores."""
    return Config(
        data=DataConfig(data="shapes:4000", image_size=(64, 64), crop_scale=(1.0, 1.0)),
        model=ModelConfig(
            encoder="vit_tiny_patch16_224",
            patch_size=8,
            encoder_width=128,
            encoder_depth=4,
            encoder_heads=4,
            decoder_width=96,
            decoder_depth=2,
            decoder_heads=4,
            predictor_depth=2,
        ),
        method=MethodConfig(predictor_view="both"),
        run=RunConfig(val="shapes:480@1", knn=False, num_figure_images=7),
        optimisation=OptimisationConfig(epochs=8, batch_size=128, base_learning_rate=2e-3),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    "hpm": hpm,
    "hpm-norm-pix": hpm_norm_pix,
    "mae": mae,
    "mae-norm-pix": mae_norm_pix,
    "random+lpred": random_lpred,
    "hpm-imagenet-200": hpm_imagenet_200,
    "hpm-64px": hpm_64px,
    "shapes-demo": shapes_demo,
}


def recipe(name: str) -> Config:
    """The config of a named recipe.

    Raises:
        InputError: There is no such recipe.
    """
    if name not in RECIPES:
        raise InputError(f"recipe: no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]()
