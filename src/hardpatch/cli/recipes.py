"""``hardpatch recipes``."""

from __future__ import annotations

from hardpatch.cli.output import print_table
from hardpatch.runtime.errors import InputError


def recipes(arguments: list[str]) -> None:
    """``hardpatch recipes``."""
    from hardpatch.config.recipes import METHODS, SCALES, SHAPES_DEMO, TARGETS
    from hardpatch.tools.ablate.suites import SUITES

    if arguments and arguments[0] not in ("-h", "--help"):
        raise InputError(f"recipes: takes no arguments, got {arguments}")
    print("A recipe is METHOD[-TARGET][-SCALE]: hpm, mae-norm-pix, hpm-both-norm-pix-64px, mae-imagenet-800\n")
    tables = {"METHOD": METHODS | {"shapes-demo": SHAPES_DEMO}, "TARGET": TARGETS, "SCALE": SCALES}
    for title, table in tables.items():
        print_table((title, "what it is"), [(name, part.about) for name, part in table.items()])
        print()
    print_table(
        ("SUITE", "hardpatch ablate compares"), [(name, ", ".join(suite.rows)) for name, suite in SUITES.items()]
    )
    print()
    print("Without a target: raw pixels, or the method's own. Without a scale: ViT-B/16, 224 px, 200 epochs.")
    print("next:  hardpatch pretrain --recipe hpm --help-all    # all values of a recipe")
