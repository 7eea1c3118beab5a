"""Flags to dataclasses, by tyro."""

from __future__ import annotations

from dataclasses import asdict, field, fields, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from hardpatch.cli.help import SHORT, short_help
from hardpatch.runtime.errors import InputError

if TYPE_CHECKING:
    from hardpatch.config.config import Config

Kind = TypeVar("Kind")

MEANT = {
    "lr": "base_learning_rate", "learning_rate": "base_learning_rate", "blr": "base_learning_rate", "epoch": "epochs",
    "bs": "batch_size", "batch": "batch_size", "model": "encoder", "arch": "encoder", "backbone": "encoder",
    "img_size": "image_size", "input_size": "image_size", "resolution": "image_size", "wd": "weight_decay",
    "num_workers": "workers", "output": "out", "output_dir": "out", "dataset": "data", "data_path": "data",
    "train_data": "data", "val_data": "val", "resume_from": "branch_from", "pretrained": "init_from",
    "amp": "precision", "time": "budget",
}  # fmt: skip
"""Names that other programs have for our flags."""


def parse(kind: type[Kind], prog: str, arguments: list[str]) -> tuple[Kind, bool]:
    """Flags as the command's own dataclass, and whether the figures are wanted as JSON.

    tyro prints help and complains about flags itself, with exit code 2. Values are held against the rules of their
    fields as the dataclass is made (:class:`hardpatch.config.fields.Settings`). Commands import what they run only
    after this, so that ``--help`` need not wait for it.

    Raises:
        InputError: A value breaks its field's rule.
    """
    arguments = _help(kind, prog, arguments, settings=None, planned=False)
    own, _, as_json = _parse(kind, prog, arguments, [])
    return own, as_json


def parse_with_fields(
    kind: type[Kind], prog: str, arguments: list[str], *, base: Config | None = None, planned: bool = False
) -> tuple[Kind, dict[str, Any], bool]:
    """For commands that also take every field of a run's config.

    Args:
        kind: The command's own dataclass.
        prog: The command.
        arguments: What comes after it.
        base: What the fields are where they are not given, shown by ``--help``.
        planned: Are sizes and length chosen from the images where they are not given?

    Returns:
        The command's own dataclass, the fields that were given, and whether the figures are wanted as JSON.

    Raises:
        InputError: A value breaks its field's rule.
    """
    import tyro

    from hardpatch.config.config import Config

    arguments = _help(kind, prog, arguments, settings=base or Config(), planned=planned)
    settings = Annotated[Config, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes]
    own, command, as_json = _parse(kind, prog, arguments, [("settings", settings, field(default=base or Config()))])
    flags = {word.removeprefix("--").split("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
    flags |= {name.removeprefix("no_") for name in flags}
    values = {name: value for part in asdict(command.settings).values() for name, value in part.items()}
    return own, {name: value for name, value in values.items() if name in flags}, as_json


def _help(kind: type[Any], prog: str, arguments: list[str], *, settings: Any, planned: bool) -> list[str]:
    """Print the short help of a command that has one, and end; ``--help-all`` is what tyro calls ``--help``."""
    if "--help-all" in arguments:
        return ["--help"]
    if prog in SHORT and not {"-h", "--help"}.isdisjoint(arguments):
        print(short_help(prog, kind, settings, planned=planned))
        raise SystemExit(0)
    return arguments


def _parse(kind: type[Kind], prog: str, arguments: list[str], more: list[Any]) -> tuple[Kind, Any, bool]:
    """tyro reads into a dataclass of the same fields and ``more``, which checks nothing: it would put a box around what
    is wrong with a value and break the lines."""
    import tyro

    as_json = Annotated[bool, tyro.conf.arg(help="Print the figures as one JSON object in the last line.")]
    _refuse_names_of_others(kind, arguments, with_config=bool(more))
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


def _refuse_names_of_others(kind: type[Any], arguments: list[str], *, with_config: bool) -> None:
    """Say what our flag is called where one is given by the name that other programs have for it.

    Raises:
        InputError: One is.
    """
    from hardpatch.config.config import Config

    known = {item.name for item in fields(kind)}
    if with_config:
        known |= {name for part in asdict(Config()).values() for name in part}
    for word in arguments:
        name = word.removeprefix("--").split("=")[0].replace("-", "_")
        if word.startswith("--") and name not in known and (meant := MEANT.get(name)) in known:
            raise InputError(f"{word.split('=')[0]}: there is no such flag; did you mean --{meant.replace('_', '-')}?")
