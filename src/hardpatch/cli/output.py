"""What a command prints: tables and the JSON line on standard output, everything else on standard error."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from hardpatch.figures.sections import Picture, Section, Table
from hardpatch.runtime.text import printable


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain aligned table on standard output."""
    header, *rows = [[printable(cell) for cell in line] for line in (header, *rows)]
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


def print_section(section: Section) -> None:
    """Tables and text on standard output, and where pictures are."""
    for number, block in enumerate(section.blocks):
        if isinstance(block, Picture):
            show(f"look:  {block.path}")
            continue
        if number:
            print()
        if isinstance(block, Table):
            print_table(block.header, block.rows)
        else:
            show(block)
    print()


def show(message: str = "", *, flush: bool = False) -> None:
    """Lines on standard output, whatever names they hold."""
    print(printable(message, lines=True), flush=flush)


def say_plainly(message: str) -> None:
    """One line on standard error."""
    print(printable(message, lines=True), file=sys.stderr)


def complain(message: str) -> None:
    """Why it stopped, on standard error, from every process."""
    rank = os.environ.get("RANK", "0")
    say_plainly(f"hardpatch: {message}" if rank == "0" else f"hardpatch [process {rank}]: {message}")
