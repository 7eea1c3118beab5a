"""``hardpatch ablate``."""

from __future__ import annotations

from pathlib import Path

from hardpatch.cli.flags import parse_with_fields
from hardpatch.cli.output import print_json, show
from hardpatch.runtime.text import quoted


def ablate(arguments: list[str]) -> None:
    """``hardpatch ablate``."""
    from hardpatch.tools.ablate.suites import AblateConfig

    config, given, as_json = parse_with_fields(AblateConfig, "ablate", arguments)

    from hardpatch.data.tools.parts import with_parts
    from hardpatch.runtime import distributed
    from hardpatch.tools.ablate.ablate import ablate

    given = with_parts(given)
    result = ablate(config, given)
    if not distributed.is_main_of_environment():
        return
    show(Path(result["table"]).read_text())
    if (figure := Path(result["table"]).with_suffix(".png")).is_file():
        show(f"look:  {figure}")
    useful = sorted((run for run in result["runs"] if not run["failed"]), key=lambda r: r["rank_correlation"] is None)
    run = useful[0]["folder"]
    show(f"next:  hardpatch visualize --checkpoint {quoted(run)} --images {quoted(given['data'])} --out hard.png")
    if as_json:
        print_json(result)
