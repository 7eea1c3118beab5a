"""Flags to dataclasses, by tyro."""

from __future__ import annotations

from dataclasses import asdict, field, fields, make_dataclass
from typing import Annotated, Any


def parse(kind: type[Any], prog: str, arguments: list[str]) -> Any:
    """Parse flags into a dataclass; tyro prints help and complains about flags itself, with exit code 2.

    Commands import what they run only after this, so that ``--help`` need not wait for it.
    """
    import tyro

    return tyro.cli(kind, prog=f"hardpatch {prog}", args=arguments)


def parse_with_json(kind: type[Any], prog: str, arguments: list[str]) -> tuple[Any, bool]:
    """Evaluations are configured by their own dataclass; ``--json`` is the command line's."""
    with_json = make_dataclass(
        kind.__name__, [_json_flag()], bases=(kind,), namespace={"__doc__": kind.__doc__}, frozen=True
    )
    command = parse(with_json, prog, arguments)
    return kind(**{item.name: getattr(command, item.name) for item in fields(kind)}), command.json


def parse_with_fields(kind: type[Any], prog: str, arguments: list[str]) -> tuple[Any, dict[str, Any], bool]:
    """For commands that also take every field of a run's config: their own dataclass, the fields that were given
    (alone: whatever is not has other defaults), and whether the figures are wanted as JSON."""
    import tyro

    from hardpatch.config.config import Config

    settings = Annotated[Config, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes]
    with_settings = make_dataclass(
        kind.__name__,
        [("settings", settings, field(default=Config())), _json_flag()],
        bases=(kind,),
        namespace={"__doc__": kind.__doc__},
        frozen=True,
    )
    command = parse(with_settings, prog, arguments)
    flags = {word.removeprefix("--").split("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
    flags |= {name.removeprefix("no_") for name in flags}
    values = {name: value for part in asdict(command.settings).values() for name, value in part.items()}
    own = kind(**{item.name: getattr(command, item.name) for item in fields(kind)})
    return own, {name: value for name, value in values.items() if name in flags}, command.json


def _json_flag() -> tuple[str, Any, Any]:
    import tyro

    about = tyro.conf.arg(help="Print the figures as one JSON object in the last line.")
    return "json", Annotated[bool, about], field(default=False)
