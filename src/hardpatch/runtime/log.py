"""What a run says while it works: a progress bar, ``metrics.jsonl``, TensorBoard."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from hardpatch.runtime.files import write_text_atomically
from hardpatch.runtime.text import printable

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 30.0
"""How often :func:`tracked` prints a line where there is no terminal."""

console = Console(stderr=True, highlight=False)
"""Logs and bars go to standard error; figures for the user go to standard output."""


def say(message: str) -> None:
    """One line to the user, from the main process."""
    if os.environ.get("RANK", "0") == "0":
        console.print(printable(message, lines=True), markup=False, soft_wrap=True)


def warn(message: str) -> None:
    """One line that the user should not miss."""
    console.print(Text.assemble(("warning:", "yellow"), f" {printable(message, lines=True)}"), soft_wrap=True)


class RunLog:
    """Progress bar, ``metrics.jsonl`` and TensorBoard of one run; only the main process makes one.

    Args:
        folder: The run folder.
        total_steps: Length of the run.
        first_step: Where it starts or goes on; records of later steps, left by a run that was killed, are dropped.
        description: Name beside the bar.
    """

    def __init__(self, folder: Path, *, total_steps: int, first_step: int, description: str = "pre-training") -> None:
        self.metrics_file = folder / "metrics.jsonl"
        records = [record for record in read_metrics(folder) if record["step"] <= first_step]
        write_text_atomically(self.metrics_file, "".join(json.dumps(record) + "\n" for record in records))
        self._tensorboard = SummaryWriter(folder / "events", purge_step=first_step + 1)
        self._bar = _bar(TextColumn("{task.fields[figures]}"))
        self._task: TaskID = self._bar.add_task(description, total=total_steps, completed=first_step, figures="")
        self._is_terminal = console.is_terminal
        self._last_line = -math.inf

    def __enter__(self) -> RunLog:
        if self._is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._tensorboard.close()

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=step)

    def record(self, metrics: Mapping[str, float | int | None]) -> None:
        """Append one record, and show it."""
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in metrics.items()}
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(clean) + "\n")
        for key, value in clean.items():
            if value is not None and key != "step":
                self._tensorboard.add_scalar(key, value, int(metrics["step"] or 0))
        line = summary_line(clean)
        if line:
            self._bar.update(self._task, figures=line)
            # Without a terminal a bar would fill the log file: one line every ten seconds instead.
            if not self._is_terminal and time.monotonic() - self._last_line > 10:
                self._last_line = time.monotonic()
                task = self._bar.tasks[0]
                say(
                    f"step {metrics['step']}/{int(task.total or 0)}  {line}  left {_clock(metrics.get('seconds_left'))}"
                )


def summary_line(metrics: Mapping[str, float | int | None]) -> str:
    """The figures that stand beside the bar."""
    parts = []
    for key, text in (
        ("epoch", "epoch {:.1f}"),
        ("reconstruction_loss", "rec {:.3f}"),
        ("prediction_loss", "pred {:.3f}"),
        ("train_loss", "loss {:.3f}"),
        ("val_top1", "val top-1 {:.1f} %"),
        ("predictor_rank_correlation", "rank corr {:+.2f}"),
        ("hard_share", "hard {:.0%}"),
        ("images_per_second", "{:.0f} img/s"),
        ("data_wait", "wait {:.0%}"),
    ):
        value = metrics.get(key)
        if value is not None and (key != "prediction_loss" or value):  # 0: nothing is predicted
            parts.append(text.format(value))
    return "  ".join(parts) if metrics.keys() & {"reconstruction_loss", "train_loss"} else ""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; lines that are damaged or half-written, by a kill or a disk, are left out."""
    file = folder / "metrics.jsonl"
    records = []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
    return records


def read_object(file: Path) -> dict[str, Any] | None:
    """What a JSON file of ours holds; None where it is not there, and with a warning where it is damaged."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        warn(f"{file} is damaged and not used: {error}")
        return None
    if not isinstance(content, dict):
        warn(f"{file} is damaged and not used: it holds a {type(content).__name__}")
        return None
    return content


def _bar(*extra: ProgressColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), *extra,
        console=console,
    )  # fmt: skip


def tracked(
    items: Iterable[Item], description: str, *, total: int | None = None, images_per_item: int | None = None
) -> Iterator[Item]:
    """Show a bar with time left while going through ``items``; without a terminal a line every half minute.

    Args:
        items: What to go through.
        description: Name beside the bar.
        total: How many there are.
        images_per_item: Show the rate in images as well.
    """
    if os.environ.get("RANK", "0") != "0":
        yield from items
    elif console.is_terminal:
        with _bar(*([] if images_per_item is None else [_ImageRate(images_per_item)])) as bar:
            yield from bar.track(items, description=description, total=total)
    else:
        total = total if total is not None else len(items) if isinstance(items, Sized) else None
        started = last_line = time.monotonic()
        for number, item in enumerate(items, 1):
            yield item
            if (now := time.monotonic()) - last_line > SECONDS_BETWEEN_LINES:
                last_line, each = now, (now - started) / number
                rate = "" if images_per_item is None else f"  {images_per_item / each:.0f} img/s"
                left = None if total is None else (total - number) * each
                say(f"{description} {number}/{'?' if total is None else total}{rate}  left {_clock(left)}")


class _ImageRate(ProgressColumn):
    """Images per second.

    Args:
        images: Of one item.
    """

    def __init__(self, images: int) -> None:
        super().__init__()
        self.images = images

    def render(self, task: Task) -> Text:
        """``123 img/s``."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed * self.images:.0f} img/s")


def _clock(seconds: float | int | None) -> str:
    if seconds is None:
        return "?"
    return f"{int(seconds) // 3600}:{int(seconds) % 3600 // 60:02d}:{int(seconds) % 60:02d}"
