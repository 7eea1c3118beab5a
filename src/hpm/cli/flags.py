"""Flags to dataclasses, by tyro."""

from __future__ import annotations

from typing import Any


def parse(kind: type[Any], prog: str, arguments: list[str]) -> Any:
    """Parse flags into a dataclass; tyro prints help and complains about flags itself, with exit code 2.

    Commands import what they run only after this, so that ``--help`` need not wait for it.
    """
    import tyro

    return tyro.cli(kind, prog=f"hpm {prog}", args=arguments)


def parse_with_json(kind: type[Any], prog: str, arguments: list[str]) -> tuple[Any, bool]:
    """Evaluations are configured by their own dataclass; ``--json`` is the command line's."""
    as_json = "--json" in arguments
    return parse(kind, f"{prog} [--json]", [word for word in arguments if word != "--json"]), as_json


def given_flags(arguments: list[str]) -> set[str]:
    """Names of the fields that flags set, where only what was given holds and the rest has other defaults."""
    flags = {word.removeprefix("--").split("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
    return flags | {name.removeprefix("no_") for name in flags}
