"""What a command prints: tables and the JSON line on standard output, everything else on standard error."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain aligned table on standard output."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    for line in (header, ["-" * width for width in widths], *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def print_json(figures: dict[str, Any]) -> None:
    """One line, in which a figure that is not there is null: NaN is no JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    print(json.dumps(plain(figures), allow_nan=False))


def save_evaluation(checkpoint: str, name: str, figures: dict[str, Any], out: str = "") -> None:
    """Keep an evaluation in the run folder and refresh its report; or in another folder, where one is named."""
    from hardpatch.figures.report import write_report
    from hardpatch.runs.folder import RunFolder
    from hardpatch.runtime.files import write_text_atomically

    folder = RunFolder(checkpoint)
    if out:
        write_text_atomically(Path(out).expanduser() / f"{name}.json", json.dumps(figures, indent=2) + "\n")
        return
    if not folder.config_file.is_file():
        return
    try:
        folder.save_evaluation(name, figures)
        write_report(folder)
    except OSError as error:
        say_plainly(f"could not keep the result in {folder.path}: {error.strerror}")


def say_plainly(message: str) -> None:
    """One line on standard error."""
    print(message, file=sys.stderr)


def complain(message: str) -> None:
    """Why it stopped, on standard error, from every process."""
    rank = os.environ.get("RANK", "0")
    print(f"hardpatch: {message}" if rank == "0" else f"hardpatch [process {rank}]: {message}", file=sys.stderr)
