"""``hpm ablate``."""

from __future__ import annotations

from dataclasses import asdict, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated

from hpm.cli.flags import given_flags, parse
from hpm.cli.output import print_json


def ablate(arguments: list[str]) -> None:
    """``hpm ablate``."""
    import tyro

    from hpm.ablation.suites import AblateConfig
    from hpm.config import Config

    settings = Annotated[Config, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes]
    with_settings = make_dataclass(
        "AblateCommand",
        [("settings", settings, field(default=Config())), ("json", bool, field(default=False))],
        bases=(AblateConfig,),
        namespace={"__doc__": AblateConfig.__doc__},
        frozen=True,
    )
    command = parse(with_settings, "ablate", arguments)
    # Every row has defaults of its own: only the flags that were given hold for all of them.
    given = given_flags(arguments)
    values = {name: value for part in asdict(command.settings).values() for name, value in part.items()}
    chosen = AblateConfig(**{item.name: getattr(command, item.name) for item in fields(AblateConfig)})

    from hpm import distributed
    from hpm.ablation.ablate import ablate

    result = ablate(chosen, {name: value for name, value in values.items() if name in given})
    if not distributed.is_main_of_environment():
        return
    print(Path(result["table"]).read_text())
    if (figure := Path(result["table"]).with_suffix(".png")).is_file():
        print(f"look:  {figure}")
    useful = sorted((run for run in result["runs"] if not run["failed"]), key=lambda r: r["rank_correlation"] is None)
    run = useful[0]["folder"]
    print(f"next:  hpm visualize --checkpoint {run} --images {values['data']!r} --out hard.png")
    if command.json:
        print_json(result)
