"""Draw docs/masks.png: every kind of mask on embedded images.

    python docs/draw_masks.py --out docs/masks.png

The guided masks need scores. Those of an untrained model would be noise, so the variance within each patch stands in.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from matplotlib.figure import Figure
from torch import Tensor

from hardpatch.data.sources.drawn_shapes import make_shape
from hardpatch.method.choices import MASKS, resolve
from hardpatch.method.masks import MaskInput, hide_top, num_hidden_patches
from hardpatch.method.vit import patchify, unpatchify
from hardpatch.runtime.pictures import write_picture

GRID = (14, 14)
PATCH = (8, 8)
SIDE, GAP, LEFT, TOP, DPI = 112, 8, 8, 62, 110
"""Layout in pixels; a picture is drawn one to one, so that patches stay sharp."""
RATIO, SHARE = 0.75, 0.5
IMAGES = (6, 14, 33, 19)
"""Of the set 0: an object on plain ground, two on patterns, and a camouflaged one."""
TITLES = {"hard": "hard\n(attention: alike)"}
LEFT_OUT = ("attention",)
"""With the same scores the attention mask is the hard one."""


def masked(images: UInt8[Tensor, "b 3 h w"], hidden: Bool[Tensor, "b n"]) -> UInt8[Tensor, "b 3 h w"]:
    """Hidden patches in light grey."""
    patches = torch.where(hidden.unsqueeze(-1), 225, patchify(images.float(), PATCH))
    return unpatchify(patches, PATCH, GRID).to(torch.uint8)


def heat(scores: Float[Tensor, "b n"]) -> UInt8[Tensor, "b 3 h w"]:
    """Rank of each patch as brightness."""
    brightness = scores.argsort(1).argsort(1) * 255 // (scores.shape[1] - 1)
    return unpatchify(brightness.unsqueeze(-1).expand(-1, -1, 3 * PATCH[0] * PATCH[1]), PATCH, GRID).to(torch.uint8)


def columns() -> dict[str, UInt8[Tensor, "b 3 h w"]]:
    """Pictures by title: the images, their scores, and every mask."""
    drawn = [make_shape(0, index, SIDE, SIDE).image for index in IMAGES]
    images = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)
    variance = patchify(images.float(), PATCH).var(dim=2)
    scores = (variance - variance.mean(dim=1, keepdim=True)) / variance.std(dim=1, keepdim=True)
    noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0))
    num_hidden = num_hidden_patches(scores.shape[1], RATIO)
    shown = {"image": images, "stand-in\nscores": heat(scores)}
    for name in sorted(MASKS, key=lambda name: MASKS[name].guide is None):
        if name not in LEFT_OUT:
            given = MaskInput(scores, noise, GRID, num_hidden, int(num_hidden * SHARE))
            hidden = hide_top(resolve(MASKS[name].policy)(given), num_hidden)
            shown[TITLES.get(name, name.replace("_", "\n"))] = masked(images, hidden)
    return shown


def draw() -> Figure:
    """One row per image, one column per mask."""
    shown = columns()
    width = LEFT + len(shown) * (SIDE + GAP)
    height = TOP + len(IMAGES) * (SIDE + GAP)
    figure = Figure(figsize=(width / DPI, height / DPI))
    for column, (title, pictures) in enumerate(shown.items()):
        x = LEFT + column * (SIDE + GAP)
        for row, picture in enumerate(pictures):
            y = height - TOP - row * (SIDE + GAP) - SIDE
            axis = figure.add_axes((x / width, y / height, SIDE / width, SIDE / height))
            axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_axis_off()
        figure.text((x + SIDE / 2) / width, 1 - (TOP - 5) / height, title, ha="center", va="bottom", fontsize=8)
    figure.text(
        LEFT / width, 1 - 4 / height,
        f"Hidden patches (grey) of {GRID[0]}x{GRID[1]}, ratio {RATIO}; hard, easy and proportional choose {SHARE:.0%} "
        "of them by score, here the variance of each patch in place of a model's predicted loss, the rest at random",
        ha="left", va="top", fontsize=8,
    )  # fmt: skip
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("masks.png"))
    write_picture(draw(), parser.parse_args().out)
