"""``hardpatch visualize``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from hardpatch.cli.flags import parse
from hardpatch.cli.output import print_json


@dataclass(frozen=True)
class VisualizeCommand:
    """Draw images, their loss under ten masks, the predicted loss, the mask it leads to, and the reconstruction."""

    checkpoint: str
    """Run folder or checkpoint file."""
    images: str
    """Images, any source."""
    out: str
    """Figure to write, .png."""
    count: int = 8
    """How many images, spread over the source."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


def visualize(arguments: list[str]) -> None:
    """``hardpatch visualize``."""
    command = parse(VisualizeCommand, "visualize", arguments)

    from hardpatch.figures.hardness import visualize as draw

    correlation = draw(command.checkpoint, command.images, Path(command.out), count=command.count)
    if math.isnan(correlation):
        print(f"{command.out}: true loss, masks and reconstruction; this run has no loss predictor")
        print(f"next:  hardpatch evaluate knn --checkpoint {command.checkpoint} --train TRAIN --val VAL")
    else:
        print(f"{command.out}: rank correlation of predicted and true loss {correlation:+.3f}")
        print(f"next:  hardpatch evaluate foreground --checkpoint {command.checkpoint} --images IMAGES --masks MASKS")
    if command.json:
        print_json({"figure": command.out, "rank_correlation": correlation})
