"""Flags to dataclasses, by tyro."""

from __future__ import annotations

from dataclasses import asdict, field, fields, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

if TYPE_CHECKING:
    from hardpatch.config.config import Config

Kind = TypeVar("Kind")


def parse(kind: type[Kind], prog: str, arguments: list[str]) -> tuple[Kind, bool]:
    """Flags as the command's own dataclass, and whether the figures are wanted as JSON.

    tyro prints help and complains about flags itself, with exit code 2. Values are held against the rules of their
    fields as the dataclass is made (:class:`hardpatch.config.fields.Settings`). Commands import what they run only
    after this, so that ``--help`` need not wait for it.

    Raises:
        InputError: A value breaks its field's rule.
    """
    own, _, as_json = _parse(kind, prog, arguments, [])
    return own, as_json


def parse_with_fields(
    kind: type[Kind], prog: str, arguments: list[str], *, base: Config | None = None
) -> tuple[Kind, dict[str, Any], bool]:
    """For commands that also take every field of a run's config.

    Args:
        kind: The command's own dataclass.
        prog: The command.
        arguments: What comes after it.
        base: What the fields are where they are not given, shown by ``--help``.

    Returns:
        The command's own dataclass, the fields that were given, and whether the figures are wanted as JSON.

    Raises:
        InputError: A value breaks its field's rule.
    """
    import tyro

    from hardpatch.config.config import Config

    settings = Annotated[Config, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes]
    own, command, as_json = _parse(kind, prog, arguments, [("settings", settings, field(default=base or Config()))])
    flags = {word.removeprefix("--").split("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
    flags |= {name.removeprefix("no_") for name in flags}
    values = {name: value for part in asdict(command.settings).values() for name, value in part.items()}
    return own, {name: value for name, value in values.items() if name in flags}, as_json


def _parse(kind: type[Kind], prog: str, arguments: list[str], more: list[Any]) -> tuple[Kind, Any, bool]:
    """tyro reads into a dataclass of the same fields and ``more``, which checks nothing: it would put a box around what
    is wrong with a value and break the lines."""
    import tyro

    as_json = Annotated[bool, tyro.conf.arg(help="Print the figures as one JSON object in the last line.")]
    unchecked = make_dataclass(
        kind.__name__,
        [*more, ("json", as_json, field(default=False))],
        bases=(kind,),
        namespace={"__doc__": kind.__doc__, "__post_init__": lambda self: None},
        frozen=True,
    )
    command: Any = tyro.cli(unchecked, prog=f"hardpatch {prog}", args=arguments)
    own = kind(**{item.name: getattr(command, item.name) for item in fields(kind)})  # type: ignore[arg-type]
    return own, command, command.json
