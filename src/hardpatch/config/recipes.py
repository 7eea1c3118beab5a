"""Named runs: METHOD, METHOD-TARGET, METHOD-SCALE or METHOD-TARGET-SCALE, e.g. ``hpm``, ``mae-norm-pix-64px``.

A method is a row of a table of the paper or one of its rivals: where masks lie, how the loss is predicted. A target is
what is reconstructed; without one, the method's own, which is raw pixels if it does not say otherwise. A scale is
everything else: image size, model, length of the run; without one, the config's own (ViT-B/16, 224 px, 200 epochs).
Any method runs on any target at any scale, so rows can be compared. Each is a function that returns the fields it sets
and whose docstring says where it comes from and what to expect.

``docs/recipes.md`` has the commands, the published numbers and ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

from hardpatch.config.config import Config
from hardpatch.config.values import with_fields
from hardpatch.runtime.errors import InputError, suggest

Fields = dict[str, Any]
"""Fields of the config by name."""

# Methods: baselines, and the paper's own


def mae() -> Fields:
    """MAE: random masks, no loss predictor (He et al., arXiv 2111.06377); mae-norm-pix is the honest baseline."""
    return {"mask": "random", "predicted_loss": "none"}


def random_lpred() -> Fields:
    """Random masks with the loss predictor: what predicting the loss is worth without mining."""
    return {"mask": "random", "predicted_loss": "relative"}


def hpm() -> Fields:
    """HPM as published: relative loss, hard share 0 -> 0.5 (Wang et al., arXiv 2304.05919)."""
    return {"mask": "hard", "predicted_loss": "relative", "predictor_view": "masked"}


def colormae() -> Fields:
    """ColorMAE-G: masks from band-passed noise, on norm_pix, the strong free baseline (Hinojosa et al., ECCV 2024)."""
    return green_noise() | {"target": "norm_pix"}


def crossmae() -> Fields:
    """CrossMAE: a third of the hidden patches decoded by cross-attention, on norm_pix (Fu et al., arXiv 2401.14391)."""
    return mae() | {"target": "norm_pix", "decoder": "cross", "decoded_share": 1 / 3}


# Methods: mining at the price of MAE


def hpm_fast() -> Fields:
    """HPM below the price of MAE: a third of what is hidden is decoded, one-block predictor, teacher at half size."""
    return hpm() | {
        "predictor_view": "both",
        "decoded_share": 1 / 3,
        "predictor_depth": 1,
        "teacher_reduction": 2,
    }


def hpm_shared() -> Fields:
    """hpm-fast with the teacher at full size instead, one pass of it for four masks of an image (data2vec 2.0)."""
    return hpm_fast() | {"teacher_reduction": 1, "masks_per_image": 4}


def hpm_cross() -> Fields:
    """hpm-fast with CrossMAE's decoders: cheaper still, but worse in 20-NN in our short ablation."""
    return hpm_fast() | {"decoder": "cross"}


def random_lpred_fast() -> Fields:
    """hpm-fast without teacher and mining, the control: random masks, a third decoded, a one-block predictor."""
    return random_lpred() | {"decoded_share": 1 / 3, "predictor_depth": 1}


def mae_third() -> Fields:
    """MAE that decodes a third of the hidden patches: what hpm-fast is without mining, and what it costs on top."""
    return mae() | {"decoded_share": 1 / 3}


# Methods: how the loss is predicted


def hpm_both() -> Fields:
    """HPM whose predictor also learns on the full image, where it is asked: mining sees far better."""
    return hpm() | {"predictor_view": "both"}


def hpm_full() -> Fields:
    """HPM whose predictor learns on the full image alone: no gradient of L_pred in the encoder."""
    return hpm() | {"predictor_view": "full"}


# Methods: hardness that ignores noise


def hpm_coarse() -> Fields:
    """HPM whose hardness is the error of means over 4x4 pixels: fine texture does not count as hard."""
    return hpm() | {"hardness_block": 4}


def hpm_fast_coarse() -> Fields:
    """hpm-fast with the hardness of hpm-coarse."""
    return hpm_fast() | {"hardness_block": 4}


def random_lpred_fast_coarse() -> Fields:
    """random+lpred-fast with the hardness of hpm-coarse: what predicting it is worth without mining."""
    return random_lpred_fast() | {"hardness_block": 4}


def hpm_fast_in_pixels() -> Fields:
    """hpm-fast on norm_pix whose hardness is the error in pixels, as where HPM was published."""
    return hpm_fast() | {"target": "norm_pix", "hardness_in_pixels": True}


# Methods: where masks lie


def hpm_0_to_1() -> Fields:
    """HPM with the hard share growing 0 -> 1."""
    return hpm() | {"hard_share_start": 0.0, "hard_share_end": 1.0}


def hpm_constant() -> Fields:
    """HPM with a constant hard share of 0.5."""
    return hpm() | {"hard_share_start": 0.5, "hard_share_end": 0.5}


def hpm_hardest() -> Fields:
    """Always the hardest patches (hard share 1 -> 1); worse than random in the paper: 81.40 against 82.49."""
    return hpm() | {"hard_share_start": 1.0, "hard_share_end": 1.0}


def hpm_hard_to_easy() -> Fields:
    """The curriculum reversed (hard share 0.5 -> 0); worse than random in the paper: 81.71 against 82.49."""
    return hpm() | {"hard_share_start": 0.5, "hard_share_end": 0.0}


def hpm_easiest() -> Fields:
    """The easiest patches instead of the hardest (argmin, 0 -> 0.5); 82.36 in the paper against 82.49 for random."""
    return hpm() | {"mask": "easy"}


def hpm_proportional() -> Fields:
    """Hard patches sampled in proportion to predicted loss instead of the hardest taken."""
    return hpm() | {"mask": "proportional"}


def attmask() -> Fields:
    """AttMask: the patches with the highest attention of the teacher's class token (Kakogeorgiou et al., ECCV 2022)."""
    return mae() | {"mask": "attention", "hard_share_start": 1.0, "hard_share_end": 1.0}


def block() -> Fields:
    """MAE with block-wise masks (BEiT, arXiv 2106.08254)."""
    return mae() | {"mask": "block"}


def inverse_block() -> Fields:
    """MAE with a block left visible (data2vec 2.0, arXiv 2212.07525)."""
    return mae() | {"mask": "inverse_block"}


def uniform_grid() -> Fields:
    """MAE with one visible patch in every 2x2 (UM-MAE, arXiv 2205.10063)."""
    return mae() | {"mask": "uniform_grid"}


def green_noise() -> Fields:
    """MAE with masks from band-passed noise (ColorMAE, Hinojosa et al., ECCV 2024)."""
    return mae() | {"mask": "green_noise"}


def red_noise() -> Fields:
    """MAE with masks from low-passed noise: blobs (ColorMAE)."""
    return mae() | {"mask": "red_noise"}


def blue_noise() -> Fields:
    """MAE with masks from high-passed noise: evenly spread (ColorMAE)."""
    return mae() | {"mask": "blue_noise"}


def purple_noise() -> Fields:
    """MAE with masks from band-stopped noise (ColorMAE)."""
    return mae() | {"mask": "purple_noise"}


# Methods: variants of the predictor


def hpm_absolute() -> Fields:
    """HPM whose predictor regresses the loss (MSE) instead of ranking it."""
    return hpm() | {"predicted_loss": "absolute"}


def hpm_detached() -> Fields:
    """HPM whose predictor does not shape the encoder."""
    return hpm() | {"predictor_detached": True}


def hpm_shallow() -> Fields:
    """HPM with a predictor of one block."""
    return hpm() | {"predictor_depth": 1}


# Methods: hpm-fast taken apart


def hpm_third() -> Fields:
    """HPM that decodes a third of the hidden patches; pairs are ranked among those."""
    return hpm() | {"decoded_share": 1 / 3}


def hpm_half_teacher() -> Fields:
    """HPM whose teacher sees the image at half size, where its predictor (learning on the masked view) never was."""
    return hpm() | {"teacher_reduction": 2}


# Methods with targets and masks of their own


def maskfeat() -> Fields:
    """MaskFeat's target and masks: HOG, 40 % in blocks (Wei et al., arXiv 2112.09133); encoder sees visible patches."""
    return mae() | {"target": "hog", "mask": "block", "mask_ratio": 0.4}


def beit_tokens() -> Fields:
    """BEiT's target and masks: discrete tokens (k-means codebook), 40 % in blocks; encoder sees visible patches."""
    return mae() | {"target": "tokens", "mask": "block", "mask_ratio": 0.4}


METHODS: dict[str, Callable[[], Fields]] = {
    "hpm": hpm,
    "mae": mae,
    "random+lpred": random_lpred,
    "random+lpred-fast": random_lpred_fast,
    "colormae": colormae,
    "crossmae": crossmae,
    "hpm-fast": hpm_fast,
    "hpm-shared": hpm_shared,
    "hpm-cross": hpm_cross,
    "mae-third": mae_third,
    "hpm-both": hpm_both,
    "hpm-full": hpm_full,
    "hpm-coarse": hpm_coarse,
    "hpm-fast-coarse": hpm_fast_coarse,
    "random+lpred-fast-coarse": random_lpred_fast_coarse,
    "hpm-fast-in-pixels": hpm_fast_in_pixels,
    "hpm-absolute": hpm_absolute,
    "hpm-detached": hpm_detached,
    "hpm-shallow": hpm_shallow,
    "hpm-third": hpm_third,
    "hpm-half-teacher": hpm_half_teacher,
    "hpm-0-to-1": hpm_0_to_1,
    "hpm-constant": hpm_constant,
    "hpm-hardest": hpm_hardest,
    "hpm-hard-to-easy": hpm_hard_to_easy,
    "hpm-easiest": hpm_easiest,
    "hpm-proportional": hpm_proportional,
    "attmask": attmask,
    "block": block,
    "inverse-block": inverse_block,
    "uniform-grid": uniform_grid,
    "green-noise": green_noise,
    "red-noise": red_noise,
    "blue-noise": blue_noise,
    "purple-noise": purple_noise,
    "maskfeat": maskfeat,
    "beit-tokens": beit_tokens,
}
"""Where masks lie and how the loss is predicted, by name."""


# Targets


def on_norm_pix() -> Fields:
    """Pixels normalised within each patch: the target with which MAE is strongest."""
    return {"target": "norm_pix"}


def on_hog() -> Fields:
    """Histograms of oriented gradients (MaskFeat, arXiv 2112.09133)."""
    return {"target": "hog"}


def on_tokens() -> Fields:
    """Discrete tokens (BEiT, arXiv 2106.08254) of a k-means codebook fitted on the images."""
    return {"target": "tokens"}


def on_ema() -> Fields:
    """The EMA teacher's own features."""
    return {"target": "ema_features"}


def on_dino() -> Fields:
    """Features of a frozen DINO ViT-B/16; of any other timm model by --target-model."""
    return {"target": "timm_features", "target_model": "vit_base_patch16_224.dino"}


def on_clip() -> Fields:
    """Features of a frozen CLIP ViT-B/16."""
    return {"target": "timm_features", "target_model": "vit_base_patch16_clip_224.openai"}


TARGETS: dict[str, Callable[[], Fields]] = {
    "norm-pix": on_norm_pix,
    "hog": on_hog,
    "tokens": on_tokens,
    "ema": on_ema,
    "dino": on_dino,
    "clip": on_clip,
}
"""What is reconstructed, by name; without one: the method's own, else raw pixels."""


# Scales


def vit_tiny() -> Fields:
    """ViT-Ti/16 at 224 px."""
    return {"encoder": "vit_tiny_patch16_224"}


def vit_small() -> Fields:
    """ViT-S/16 at 224 px."""
    return {"encoder": "vit_small_patch16_224"}


def vit_large() -> Fields:
    """ViT-L/16 at 224 px."""
    return {"encoder": "vit_large_patch16_224"}


def vit_huge() -> Fields:
    """ViT-H/14 at 224 px."""
    return {"encoder": "vit_huge_patch14_224"}


def imagenet_200() -> Fields:
    """The published ViT-B/16 run: ImageNet-1K, 200 epochs, batch 2,048; published fine-tune top-1 of HPM 83.0."""
    return {
        "hard_share_unit": "epoch",
        "epochs": 200,
        "batch_size": 2048,
        "warmup_epochs": 40.0,
        "ema_start": 0.999,
        "ema_end": 0.9999,
        "ema_ramp_epochs": 100.0,
    }


def imagenet_800() -> Fields:
    """The published ViT-B/16 run of 800 epochs; published fine-tune top-1 of HPM 84.2."""
    return imagenet_200() | {"epochs": 800}


def large_imagenet_200() -> Fields:
    """The published schedule with ViT-L/16, 200 epochs."""
    return imagenet_200() | vit_large()


def large_imagenet_800() -> Fields:
    """The published ViT-L/16 run of 800 epochs; published fine-tune top-1 of HPM 85.8."""
    return imagenet_800() | vit_large()


def small_data() -> Fields:
    """Some thousand to some ten thousand images at 224 px: ViT-S/16, light decoders, 400 epochs. Not measured yet."""
    return vit_small() | {
        "decoder_width": 256,
        "decoder_depth": 4,
        "decoder_heads": 8,
        "predictor_depth": 4,
        "epochs": 400,
        "batch_size": 256,
        "base_learning_rate": 3e-4,
    }


def px64() -> Fields:
    """Small images on small machines: 64 px, patch 8, a 6-block ViT 192 wide; minutes on two CPU cores."""
    return {
        "image_size": 64,
        "encoder": "vit_tiny_patch16_224",
        "patch_size": 8,
        "encoder_depth": 6,
        "decoder_width": 128,
        "decoder_depth": 2,
        "decoder_heads": 4,
        "predictor_depth": 2,
        "epochs": 10,
        "batch_size": 128,
        "base_learning_rate": 2e-3,
    }


def micro() -> Fields:
    """For comparisons on a CPU: 64 px, patch 8, a 4-block ViT 128 wide, decoders of one block."""
    return px64() | {
        "encoder_width": 128,
        "encoder_depth": 4,
        "encoder_heads": 4,
        "decoder_width": 96,
        "decoder_depth": 1,
        "predictor_depth": 1,
    }


def mini() -> Fields:
    """As micro, with decoders of two blocks: every method costs about what it does, of MAE, with ViT-B/16 at 224 px."""
    return micro() | {"decoder_depth": 2, "predictor_depth": 2}


SCALES: dict[str, Callable[[], Fields]] = {
    "tiny": vit_tiny,
    "small": vit_small,
    "large": vit_large,
    "huge": vit_huge,
    "imagenet-200": imagenet_200,
    "imagenet-800": imagenet_800,
    "large-imagenet-200": large_imagenet_200,
    "large-imagenet-800": large_imagenet_800,
    "small-data": small_data,
    "64px": px64,
    "micro": micro,
    "mini": mini,
}
"""Image size, model and length of the run, by name; without one: ViT-B/16, 224 px, 200 epochs."""


def shapes_demo() -> Fields:
    """What ``hardpatch demo`` runs: a 4-block ViT 128 wide on the embedded shapes, three minutes on two cores."""
    return {
        **hpm(),
        **micro(),
        "predictor_view": "both",
        "data": "shapes:4000",
        "crop_scale": (1.0, 1.0),
        "decoder_depth": 2,
        "predictor_depth": 2,
        "val": "shapes:480@1",
        "knn": False,
        "num_figure_images": 7,
        "epochs": 8,
    }


def recipe(name: str) -> Config:
    """The config of a named recipe: METHOD[-TARGET][-SCALE], or ``shapes-demo``.

    Raises:
        InputError: There is no such recipe.
    """
    if name == "shapes-demo":
        return with_fields(Config(), shapes_demo())
    for method, target, scale in _names():
        if name == "-".join(part for part in (method, target, scale) if part):
            parts = (SCALES.get(scale), METHODS[method], TARGETS.get(target))
            fields: Fields = {}
            for part in parts:
                fields |= part() if part else {}
            return with_fields(Config(), fields)
    close = suggest(name, [*METHODS, "shapes-demo", *("-".join(filter(None, parts)) for parts in _names())])
    raise InputError(
        f"recipe: no recipe {name!r}{close}; a recipe is METHOD[-TARGET][-SCALE] or shapes-demo.\n"
        f"METHOD: {', '.join(METHODS)}\nTARGET: {', '.join(TARGETS)}\nSCALE: {', '.join(SCALES)}"
    )


def _names() -> Iterator[tuple[str, str, str]]:
    """Every combination of method, target ("" for the method's own) and scale ("" for the config's own)."""
    return product(METHODS, ("", *TARGETS), ("", *SCALES))
