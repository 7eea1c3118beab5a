"""``hardpatch embed``."""

from __future__ import annotations

from hardpatch.cli.flags import parse
from hardpatch.cli.output import print_json, print_table

_SHOWN = 5
"""Images of either end of the ranking that are printed."""


def embed(arguments: list[str]) -> None:
    """``hardpatch embed``."""
    from hardpatch.config.commands import EmbedConfig

    config, as_json = parse(EmbedConfig, "embed", arguments)

    from hardpatch.embed import embed as command
    from hardpatch.runtime.distributed import is_main_of_environment
    from hardpatch.runtime.signals import stopped_by_signals

    with stopped_by_signals():
        result = command.run(config)
    if not is_main_of_environment():
        return
    shapes = {name: " x ".join(map(str, shape)) or "one number" for name, shape in result.columns.items()}
    print_table((f"{result.images:,} rows", "per image"), list(shapes.items()))
    left_out = f", {result.damaged} damaged left out" if result.damaged else ""
    print(f"\n{result.out}: {result.bytes / 1e6:,.1f} MB in {result.seconds:.1f} s{left_out}")
    if result.easiest:
        rows = [
            (end, f"{item.difficulty:.4g}", item.path)
            for end, items in (("easiest", result.easiest), ("hardest", result.hardest))
            for item in items[:_SHOWN]
        ]
        print()
        print_table(("", "difficulty", "image"), rows)
        print(f"\nrank correlation of difficulty with contrast: {result.difficulty_contrast_correlation:+.2f}")
    if result.contact_sheet:
        print(f"look:  {result.contact_sheet}")
    column = next(iter(result.columns))
    if result.out.endswith(".npz"):
        print(f'use:   import numpy\n       table = numpy.load("{result.out}")')
        print(f'       features, paths = table["{column}"], table["path"]')
    else:
        print(f'use:   import numpy, pyarrow.parquet\n       table = pyarrow.parquet.read_table("{result.out}")')
        print(f'       features, paths = numpy.array(table["{column}"].to_pylist()), table["path"].to_pylist()')
    if as_json:
        print_json(command.as_json(result))
