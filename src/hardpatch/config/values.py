"""From values, flags and YAML files to a checked config, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from hardpatch.config.config import Config
from hardpatch.config.fields import refusal
from hardpatch.config.rules import check_together
from hardpatch.runtime.errors import InputError, suggest

RESULT_SECTIONS = ("data", "model", "method", "optimisation")
"""Sections that decide what is learnt: a run can only be resumed with the same values here."""

RETIRED: dict[str, Any] = {
    "residual_precision": "float32", "steps_per_batch": 1, "teacher_budget": None, "progressive_start": 1.0,
}  # fmt: skip
"""Fields of version 0.1 that are no more, with the value at which they did nothing: runs that had it still load."""


def section_of() -> dict[str, str]:
    """Name of every field -> name of its section."""
    return {
        item.name: section.name
        for section in dataclasses.fields(Config)
        for item in dataclasses.fields(section.default_factory)  # type: ignore[arg-type]
    }


def with_fields(config: Config, values: Mapping[str, Any]) -> Config:
    """Replace fields by name, whatever section they are in.

    Raises:
        InputError: A name is no field of the config, or a value breaks its rule.
    """
    sections = section_of()
    nested: dict[str, dict[str, Any]] = dataclasses.asdict(config)
    for name, value in without_retired(values).items():
        if name not in sections:
            known = [*sections, *(item.name for item in dataclasses.fields(Config))]
            raise InputError(f"{name}: no such field{suggest(name, known)}")
        if name == "image_size" and isinstance(value, int):
            value = (value,)
        nested[sections[name]][name] = str(value) if isinstance(value, Path) else value
    return validated(nested)


def validated(nested: Mapping[str, Any]) -> Config:
    """Check every value and every rule between fields.

    Raises:
        InputError: Names each field, its rule and the value.
    """
    known_now = {
        name: without_retired(value) if isinstance(value, Mapping) else value for name, value in nested.items()
    }
    try:
        config = TypeAdapter(Config).validate_python(known_now)
    except ValidationError as error:
        known = [*section_of(), *(item.name for item in dataclasses.fields(Config))]
        raise refusal(error, known=known) from None
    check_together(config)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=config.data.size))


def without_retired(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by name, without those of version 0.1 that are no more.

    Raises:
        InputError: One of them has another value than the one at which it did nothing.
    """
    for name, default in RETIRED.items():
        if values.get(name, default) != default:
            raise InputError(
                f"{name}: was removed after version 0.1, whose configs and checkpoints can only be read where it is "
                f"{default!r}; got {values[name]!r}"
            )
    return {name: value for name, value in values.items() if name not in RETIRED}


def load_config(path: Path) -> Config:
    """Read a YAML file as written by :func:`to_yaml`: sections, or fields without sections.

    Raises:
        InputError: The file is missing or no YAML, or a key or value is wrong.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"config: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config: {path} is no valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"config: {path} must hold a mapping of fields, got {type(content).__name__}")
    content.pop("about", None)
    sections = {item.name for item in dataclasses.fields(Config)}
    flat = {}
    for key, value in content.items():
        if key in sections and isinstance(value, dict):
            flat.update(value)
        else:
            flat[key] = value
    return with_fields(Config(), {str(key): value for key, value in flat.items()})


def to_yaml(config: Config, about: Mapping[str, Any]) -> str:
    """The resolved config as YAML, with ``about`` (versions, git sha, command) beside it."""
    text: str = yaml.safe_dump(
        {**_plain(dataclasses.asdict(config)), "about": dict(about)}, sort_keys=False, default_flow_style=None
    )
    return text


def _plain(value: Any) -> Any:
    """Tuples as lists, so that the YAML stays plain."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def differences(a: Config, b: Config) -> list[str]:
    """Fields that decide the result and differ, as readable lines."""
    lines = []
    for section in RESULT_SECTIONS:
        old, new = dataclasses.asdict(getattr(a, section)), dataclasses.asdict(getattr(b, section))
        lines += [f"{name}: {old[name]!r} -> {new[name]!r}" for name in old if old[name] != new[name]]
    return lines


def decisions(config: Config) -> dict[str, Any]:
    """The fields that decide the result and differ from their defaults: what a run is known by.

    A field that is added later, at a default that changes nothing, does not make it another run.
    """
    default = Config()
    return {
        f"{section}.{name}": value
        for section in RESULT_SECTIONS
        for name, value in dataclasses.asdict(getattr(config, section)).items()
        if value != getattr(getattr(default, section), name)
    }
