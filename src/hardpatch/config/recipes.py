"""Named runs: METHOD, METHOD-TARGET, METHOD-SCALE or METHOD-TARGET-SCALE, e.g. ``hpm``, ``mae-norm-pix-64px``.

A method says where masks lie and how the loss is predicted. A target is what is reconstructed; without one, the
method's own, which is raw pixels if it does not say otherwise. A scale is everything else: image size, model, length of
the run; without one, the config's own (ViT-B/16, 224 px, 200 epochs). Any method runs on any target at any scale.

Each of the three is a table here, and nothing else lists recipes: ``hardpatch recipes``, the suites of ``hardpatch
ablate``, the tests and the tables of ``docs/recipes.md`` (which has the published numbers and ours) follow it. A method
has a row because the paper or a rival has it, because it was measured, or because another one is compared with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

from hardpatch.config.config import Config
from hardpatch.config.values import with_fields
from hardpatch.runtime.errors import InputError, suggest

Fields = dict[str, Any]
"""Fields of the config by name."""


class Part(NamedTuple):
    """A method, a target or a scale."""

    about: str
    """What it is, in a line, with its source."""
    fields: Fields
    """The fields of the config that it sets."""


def _table(*rows: tuple[str, str, Fields, str]) -> dict[str, Part]:
    """Parts by name, from rows of name, the part whose fields it starts from ("" for none), its own, and what it is."""
    parts: dict[str, Part] = {}
    for name, base, fields, about in rows:
        parts[name] = Part(about, (parts[base].fields if base else {}) | fields)
    return parts


METHODS = _table(
    # The paper's rows and the baselines
    ("mae", "", {"mask": "random", "predicted_loss": "none"},
     "MAE: random masks, no loss predictor (He et al., arXiv 2111.06377); mae-norm-pix is the honest baseline"),
    ("random+lpred", "", {"mask": "random", "predicted_loss": "relative"},
     "random masks with the loss predictor: what predicting the loss is worth without mining (HPM, ablation)"),
    ("hpm", "", {"mask": "hard", "predicted_loss": "relative", "predictor_view": "masked"},
     "HPM as published: relative loss, hard share 0 -> 0.5 (Wang et al., arXiv 2304.05919)"),
    ("hpm-absolute", "hpm", {"predicted_loss": "absolute"},
     "the predictor regresses the loss (MSE) instead of ranking it (HPM, ablation)"),
    ("hpm-0-to-1", "hpm", {"hard_share_start": 0.0, "hard_share_end": 1.0},
     "the hard share grows 0 -> 1 (HPM, ablation)"),
    ("hpm-constant", "hpm", {"hard_share_start": 0.5, "hard_share_end": 0.5},
     "a constant hard share of 0.5 (HPM, ablation)"),
    ("hpm-hardest", "hpm", {"hard_share_start": 1.0, "hard_share_end": 1.0},
     "always the hardest patches; worse than random in the paper: 81.40 against 82.49"),
    ("hpm-hard-to-easy", "hpm", {"hard_share_start": 0.5, "hard_share_end": 0.0},
     "the curriculum reversed, 0.5 -> 0; worse than random in the paper: 81.71 against 82.49"),
    ("hpm-easiest", "hpm", {"mask": "easy"},
     "the easiest patches instead of the hardest (argmin, 0 -> 0.5); 82.36 in the paper against 82.49 for random"),
    # What is recommended, and its control without mining
    ("hpm-fast", "hpm",
     {"predictor_view": "both", "decoded_share": 1 / 3, "predictor_depth": 1, "teacher_reduction": 2},
     "HPM below the price of MAE: a third of what is hidden is decoded, one-block predictor, teacher at half size"),
    ("hpm-fast-in-pixels", "hpm-fast", {"target": "norm_pix", "hardness_in_pixels": True},
     "hpm-fast on norm_pix whose hardness is the error in pixels, as where HPM was published"),
    ("random+lpred-fast", "random+lpred", {"decoded_share": 1 / 3, "predictor_depth": 1},
     "hpm-fast without teacher and mining, the control: random masks, a third decoded, a one-block predictor"),
    # Mining by a scout, without a teacher, and rows that differ from a mined one in their masks alone
    ("random+lpred-fast-in-pixels", "random+lpred-fast", {"target": "norm_pix", "hardness_in_pixels": True},
     "random+lpred-fast on norm_pix that predicts the error in pixels: hpm-scout with random masks"),
    ("hpm-scout", "random+lpred-fast-in-pixels", {"mask": "hard", "guide": "scout"},
     "mines what a scout finds hard by the error in pixels; predicts the loss, a third decoded, no teacher"),
    ("hpm-scout-alone", "hpm-scout", {"predicted_loss": "none"},
     "hpm-scout without a loss predictor; mae-third-norm-pix is the same with random masks"),
    ("hpm-variance", "hpm-scout", {"guide": "variance"},
     "hides the patches of highest variance, which learns nothing and costs nothing: the control of hpm-scout"),
    ("hpm-fast-in-pixels-random", "hpm-fast-in-pixels", {"mask": "random"},
     "hpm-fast-in-pixels with random masks: all that it does but mining"),
    # Variants that were measured
    ("hpm-both", "hpm", {"predictor_view": "both"},
     "the predictor also learns on the full image, where it is asked: mining sees far better"),
    ("hpm-shared", "hpm-fast", {"teacher_reduction": 1, "masks_per_image": 4},
     "hpm-fast with the teacher at full size instead, one pass of it for four masks of an image (data2vec 2.0)"),
    ("hpm-cross", "hpm-fast", {"decoder": "cross"},
     "hpm-fast with CrossMAE's decoders: cheaper still, but worse in 20-NN in our short ablation"),
    ("hpm-third", "hpm", {"decoded_share": 1 / 3},
     "a third of the hidden patches is decoded; pairs are ranked among those"),
    ("hpm-shallow", "hpm", {"predictor_depth": 1}, "a predictor of one block"),
    ("hpm-half-teacher", "hpm", {"teacher_reduction": 2},
     "the teacher sees the image at half size, where its predictor (learning on the masked view) never was"),
    ("hpm-proportional", "hpm", {"mask": "proportional"},
     "hard patches sampled in proportion to predicted loss instead of the hardest taken"),
    # Rivals and their controls
    ("mae-third", "mae", {"decoded_share": 1 / 3},
     "MAE that decodes a third of the hidden patches: what hpm-fast is without predicting the loss"),
    ("crossmae", "mae", {"target": "norm_pix", "decoder": "cross", "decoded_share": 1 / 3},
     "CrossMAE: a third of the hidden patches decoded by cross-attention, on norm_pix (Fu et al., arXiv 2401.14391)"),
    ("green-noise", "mae", {"mask": "green_noise"},
     "masks from band-passed noise (ColorMAE, Hinojosa et al., ECCV 2024)"),
    ("colormae", "green-noise", {"target": "norm_pix"},
     "ColorMAE-G: green-noise on norm_pix, the strong free baseline (Hinojosa et al., ECCV 2024)"),
    ("attmask", "mae", {"mask": "attention", "hard_share_start": 1.0, "hard_share_end": 1.0},
     "AttMask: the patches with the highest attention of the teacher's class token (Kakogeorgiou et al., ECCV 2022)"),
    ("block", "mae", {"mask": "block"},
     "block-wise masks (BEiT, arXiv 2106.08254), the control of the next two"),
    ("maskfeat", "block", {"target": "hog", "mask_ratio": 0.4},
     "MaskFeat's target and masks: HOG, 40 % in blocks (Wei et al., arXiv 2112.09133); encoder sees visible patches"),
    ("beit-tokens", "block", {"target": "tokens", "mask_ratio": 0.4},
     "BEiT's target and masks: discrete tokens (k-means codebook), 40 % in blocks; encoder sees visible patches"),
)  # fmt: skip
"""Masks and the way the loss is predicted, by name."""

TARGETS = _table(
    ("norm-pix", "", {"target": "norm_pix"},
     "pixels normalised within each patch: the target with which MAE is strongest"),
    ("hog", "", {"target": "hog"}, "histograms of oriented gradients (MaskFeat, arXiv 2112.09133)"),
    ("tokens", "", {"target": "tokens"},
     "discrete tokens (BEiT, arXiv 2106.08254) of a k-means codebook fitted on the images"),
    ("ema", "", {"target": "ema_features"}, "the EMA teacher's own features"),
    ("dino", "", {"target": "timm_features", "target_model": "vit_base_patch16_224.dino"},
     "features of a frozen DINO ViT-B/16; of any other timm model by --target-model"),
    ("clip", "", {"target": "timm_features", "target_model": "vit_base_patch16_clip_224.openai"},
     "features of a frozen CLIP ViT-B/16"),
)  # fmt: skip
"""What is reconstructed, by name; without one: the method's own, else raw pixels."""

_LARGE = {"encoder": "vit_large_patch16_224"}

SCALES = _table(
    ("tiny", "", {"encoder": "vit_tiny_patch16_224"}, "ViT-Ti/16 at 224 px"),
    ("small", "", {"encoder": "vit_small_patch16_224"}, "ViT-S/16 at 224 px"),
    ("large", "", _LARGE, "ViT-L/16 at 224 px"),
    ("huge", "", {"encoder": "vit_huge_patch14_224"}, "ViT-H/14 at 224 px"),
    ("imagenet-200", "",
     {"hard_share_unit": "epoch", "epochs": 200, "batch_size": 2048, "warmup_epochs": 40.0,
      "ema_start": 0.999, "ema_end": 0.9999, "ema_ramp_epochs": 100.0},
     "the published ViT-B/16 run: ImageNet-1K, 200 epochs, batch 2,048; published fine-tune top-1 of HPM 83.0"),
    ("imagenet-800", "imagenet-200", {"epochs": 800},
     "the published ViT-B/16 run of 800 epochs; published fine-tune top-1 of HPM 84.2"),
    ("large-imagenet-200", "imagenet-200", _LARGE, "the published schedule with ViT-L/16, 200 epochs"),
    ("large-imagenet-800", "imagenet-800", _LARGE,
     "the published ViT-L/16 run of 800 epochs; published fine-tune top-1 of HPM 85.8"),
    ("64px", "",
     {"image_size": 64, "encoder": "vit_tiny_patch16_224", "patch_size": 8, "encoder_depth": 6, "decoder_width": 128,
      "decoder_depth": 2, "decoder_heads": 4, "predictor_depth": 2, "epochs": 10, "batch_size": 128,
      "base_learning_rate": 2e-3},
     "small images on small machines: 64 px, patch 8, a 6-block ViT 192 wide; minutes on two CPU cores"),
    ("mini", "64px", {"encoder_width": 128, "encoder_depth": 4, "encoder_heads": 4, "decoder_width": 96},
     "64 px, patch 8, a 4-block ViT 128 wide: every method costs about what it does, of MAE, with ViT-B/16 at 224 px"),
    ("micro", "mini", {"decoder_depth": 1, "predictor_depth": 1},
     "as mini, with decoders of one block, for comparisons on a CPU"),
)  # fmt: skip
"""Image size, model and length of the run, by name; without one: ViT-B/16, 224 px, 200 epochs."""

SHAPES_DEMO = Part(
    "what hardpatch demo runs: a 4-block ViT 128 wide on the embedded shapes, three minutes on two cores",
    {
        **METHODS["hpm-both"].fields, **SCALES["mini"].fields,
        "data": "shapes:4000", "crop_scale": (1.0, 1.0), "val": "shapes:480@1", "knn": False, "num_figure_images": 7,
        "epochs": 8,
    },
)  # fmt: skip
"""The recipe ``shapes-demo``, which is none of the combinations."""


def recipe(name: str) -> Config:
    """The config of a named recipe: METHOD[-TARGET][-SCALE], or ``shapes-demo``.

    Raises:
        InputError: There is no such recipe.
    """
    if name == "shapes-demo":
        return with_fields(Config(), SHAPES_DEMO.fields)
    for known, parts in _combinations():
        if known == name:
            return with_fields(Config(), {field: value for part in parts for field, value in part.fields.items()})
    close = suggest(name, [*METHODS, "shapes-demo", *(known for known, _ in _combinations())])
    raise InputError(
        f"recipe: no recipe {name!r}{close}; a recipe is METHOD[-TARGET][-SCALE] or shapes-demo.\n"
        f"METHOD: {', '.join(METHODS)}\nTARGET: {', '.join(TARGETS)}\nSCALE: {', '.join(SCALES)}"
    )


def without_scale() -> list[str]:
    """Names of all recipes that leave the scale open: METHOD and METHOD-TARGET."""
    return [f"{method}{target}" for method in METHODS for target in ("", *(f"-{name}" for name in TARGETS))]


def _combinations() -> Iterator[tuple[str, list[Part]]]:
    """Every name with its parts, in the order in which their fields are set: the method's hold over the scale's."""
    for method, target, scale in product(METHODS, ("", *TARGETS), ("", *SCALES)):
        parts = [SCALES.get(scale), METHODS[method], TARGETS.get(target)]
        yield "-".join(filter(None, (method, target, scale))), [part for part in parts if part is not None]
