"""What every evaluation returns, and how it is kept.

An evaluation is a module, named in :data:`hardpatch.config.evaluations.EVALUATIONS`, with two functions:

    run(config) -> Result          measure; the result is a frozen dataclass of figures, derived from Result
    describe(figures) -> Section   tables, text and pictures, from the figures as they stand in the JSON file
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, cast

from hardpatch.figures.report import write_report
from hardpatch.runs.folder import RunFolder
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.files import write_text_atomically
from hardpatch.runtime.log import say
from hardpatch.runtime.outputs import make_output_folder
from hardpatch.runtime.text import quoted


class Result(ABC):
    """Figures of an evaluation; a subclass is a frozen dataclass of them."""

    kind: ClassVar[str]

    @property
    def name(self) -> str:
        """Under which the figures are kept: ``evaluate/NAME.json``."""
        return self.kind

    @abstractmethod
    def what_next(self, config: Any) -> list[str]:
        """Lines to end with, for a call with this config."""

    def kept_in(self, config: Any) -> str:
        """Folder for the figures; empty: the run's own."""
        return str(getattr(config, "out", ""))

    def figures(self) -> dict[str, Any]:
        """All fields as plain values: named tuples as objects, too."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(cast(Any, self))}


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def keep(result: Result, config: Any) -> None:
    """Write the figures into the run folder and refresh its report; or into another folder, where one is named.

    A checkpoint that is a file has no folder: nothing is kept.
    """
    run, out = RunFolder(config.checkpoint), result.kept_in(config)
    folder = Path(out).expanduser() if out else run.evaluations
    if not out and not run.config_file.is_file():
        return
    try:
        make_output_folder(folder)
        write_text_atomically(folder / f"{result.name}.json", json.dumps(result.figures(), indent=2) + "\n")
        if not out:
            write_report(run)
    except OSError as error:
        say(f"could not keep the result in {folder}: {error.strerror}")


def output_folder(config: Any, *below: str) -> Path:
    """The folder of what an evaluation makes: ``out``, or where none is named a folder below the run's.

    Raises:
        InputError: None is named, and the checkpoint is no run folder that could hold one; or it cannot be made.
    """
    run = RunFolder(config.checkpoint)
    if not config.out and not run.config_file.is_file():
        raise InputError(f"out: name a folder; {config.checkpoint!r} is no run folder that could hold one")
    folder = Path(config.out).expanduser() if config.out else run.path.joinpath(*below)
    try:
        make_output_folder(folder)
    except OSError as error:
        raise InputError(f"out: cannot make {str(folder)!r}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"out: cannot write in {str(folder)!r}")
    return folder


def command_of(name: str, config: Any, **changes: Any) -> str:
    """The command of an evaluation's config, with some fields changed, as it can be typed.

    Args:
        name: Of the evaluation.
        config: What it was told; fields that have their defaults are left out.
        changes: Fields and their new values.
    """
    words = ["hardpatch", "evaluate", name]
    for item in fields(config):
        value = changes.get(item.name, getattr(config, item.name))
        if value == item.default or value is None:
            continue
        flag = item.name.replace("_", "-")
        if isinstance(item.default, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return " ".join(map(quoted, words))


def visualize_command(checkpoint: str, images: str) -> str:
    """What to look at after an evaluation on some images."""
    return f"next:  hardpatch visualize --checkpoint {quoted(checkpoint)} --images {quoted(images)} --out hard.png"
