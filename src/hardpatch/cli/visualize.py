"""``hardpatch visualize``."""

from __future__ import annotations

import math
from pathlib import Path

from hardpatch.cli.flags import parse
from hardpatch.cli.output import print_json, show
from hardpatch.runtime.text import quoted


def visualize(arguments: list[str]) -> None:
    """``hardpatch visualize``."""
    from hardpatch.config.commands import VisualizeCommand

    command, as_json = parse(VisualizeCommand, "visualize", arguments)

    from hardpatch.figures.hardness import visualize as draw

    correlation = draw(command.checkpoint, command.images, Path(command.out), count=command.count)
    run = quoted(command.checkpoint)
    if math.isnan(correlation):
        show(f"{command.out}: true loss, masks and reconstruction; this run has no loss predictor")
    else:
        show(f"{command.out}: rank correlation of predicted and true loss {correlation:+.3f}")
    table = quoted(str(Path(command.out).with_name("embedding.parquet")))
    sheet = quoted(str(Path(command.out).with_name("hardest.png")))
    show(f"next:  hardpatch embed --checkpoint {run} --data {quoted(command.images)} --out {table} --hardness "
         f"--contact-sheet {sheet}")  # fmt: skip
    if as_json:
        print_json({"figure": command.out, "rank_correlation": correlation})
