"""A run folder: what is in it, and getting models back out of it."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import timm
import torch

from hardpatch.config.config import Config
from hardpatch.config.values import differences, load_config, to_yaml, validated
from hardpatch.runs.checkpoint import CheckpointFolder
from hardpatch.runs.schedule import Schedule
from hardpatch.runs.trackers import RUNS_FILE
from hardpatch.runtime.claim import Claim
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.files import write_text_atomically
from hardpatch.runtime.log import read_object, warn
from hardpatch.runtime.outputs import make_output_folder
from hardpatch.runtime.text import printable


class RunFolder:
    """Paths of a run.

    Args:
        path: The folder; need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.config_file = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.weights_file = self.checkpoints / "weights.safetensors"
        self.figures = self.path / "figures"
        self.right_file = self.path / "knn_right.json"
        self.result_file = self.path / "result.json"
        self.report_file = self.path / "report.html"
        self.damaged_file = self.path / "damaged.csv"
        self.evaluations = self.path / "evaluate"
        self.is_config_damaged = False
        """Does the config file say something else than the checkpoints? Known after :meth:`check_usable`."""
        self._claim: Claim | None = None

    def claim(self) -> None:
        """Take the folder for this process, until :meth:`release` or its end, however it ends.

        Raises:
            InputError: Another process trains this run.
        """
        self._claim = Claim(self.path)

    def release(self) -> None:
        """Give the folder back."""
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    @property
    def has_begun(self) -> bool:
        """Is there anything that a run would lose by starting over: a checkpoint, weights, a result?"""
        weights = self.checkpoints / "weights.safetensors"
        return bool(CheckpointFolder(self.checkpoints).steps()) or weights.is_file() or self.result_file.is_file()

    def check_usable(self, config: Config, resume: Literal["auto", "never", "restart"]) -> None:
        """Can a run with this config start or go on here?

        Raises:
            InputError: A file is in the way, the folder holds other things, another run, or cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"out: must be a folder, got the file {str(self.path)!r}")
        if printable(str(self.path)) != str(self.path):  # TensorBoard and safetensors open none such
            raise InputError(
                f"out: {str(self.path)!r} has bytes that are not UTF-8, or control characters; choose another"
            )
        if self.config_file.is_file() or self.has_begun:
            if resume == "never":
                raise InputError(f"out: {str(self.path)!r} holds a run already and resume is 'never'")
            if resume == "auto" and self.has_begun and (changed := self._differences(config)):
                raise InputError(
                    f"out: {str(self.path)!r} holds a run with another config; choose another folder, or go on with "
                    "that run's values, or start over with --resume restart; to train on from its weights in a new "
                    "folder, use --init-from, to make a run with a constant learning rate longer there --branch-from. "
                    "Changed:\n  " + "\n  ".join(changed)
                )
        elif self.path.is_dir() and any(not file.name.startswith(".") for file in self.path.iterdir()):
            raise InputError(f"out: {str(self.path)!r} is not empty and holds no run; choose a new folder")
        parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not os.access(parent, os.W_OK):
            raise InputError(f"out: cannot write in {str(parent)!r}")

    def _differences(self, config: Config) -> list[str]:
        """Fields that decide the result and differ from the run's in this folder.

        Data may be named in another way and may have been moved: where there are checkpoints, the fingerprint of the
        images in them decides. They hold the config, too, and are verified: ``config.yaml`` may be damaged.
        """
        has_checkpoints = bool(CheckpointFolder(self.checkpoints).steps())

        def changed_from(before: Config) -> list[str]:
            paths = (os.path.abspath(Path(c.data.data).expanduser()) for c in (before, config))  # noqa: PTH100 (drops ..)
            if has_checkpoints or len(set(paths)) == 1:
                before = replace(before, data=replace(before.data, data=config.data.data))
            return differences(before, config)

        try:
            changed = changed_from(load_config(self.config_file))
        except InputError as error:  # without a checkpoint nothing is lost: the run begins again
            changed = [str(error)] if has_checkpoints else []
        if changed and has_checkpoints and (saved := CheckpointFolder(self.checkpoints).load_latest()):
            changed = changed_from(validated(saved["config"]))
            self.is_config_damaged = not changed
        return changed

    def save_damaged(self, damaged: dict[str, str]) -> None:
        """Keep the names of damaged images and what is wrong with them."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("path", "reason"), *damaged.items()])
        write_text_atomically(self.damaged_file, text.getvalue())

    def hardness_figure(self, step: int) -> Path:
        """The file of a step's hardness figure."""
        return self.figures / f"hardness_{step:08d}.png"

    def read_damaged(self) -> dict[str, str]:
        """What :meth:`save_damaged` has kept."""
        if not self.damaged_file.is_file():
            return {}
        try:
            with self.damaged_file.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                rows = list(csv.reader(file))
        except (ValueError, csv.Error):
            rows = []
        if rows[:1] != [["path", "reason"]]:
            warn(f"{self.damaged_file} is damaged itself, and begun again")
        return {row[0]: row[1] for row in rows[1:] if rows[0] == ["path", "reason"] and len(row) == 2}

    def save_right(self, step: int, right: list[bool]) -> None:
        """Keep which images the nearest neighbours classified rightly before the first step, or after the last."""
        kept = {str(number): self.right(number) for number in (0,)} if step else {}
        text = json.dumps({**kept, str(step): right})
        write_text_atomically(self.right_file, text + "\n")

    def right(self, step: int) -> list[bool] | None:
        """Which images the nearest neighbours classified rightly at a step; None: not kept, or damaged."""
        try:
            found = json.loads(self.right_file.read_text())[str(step)]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return [bool(one) for one in found] if isinstance(found, list) else None

    def clear(self) -> None:
        """Forget the run that is in this folder, so that another can start: checkpoints, metrics, result."""
        stale = [
            self.path / "metrics.jsonl",
            self.path / RUNS_FILE,
            self.result_file,
            self.report_file,
            self.damaged_file,
            self.right_file,
        ]
        for pattern in (
            "checkpoints/step_*.pt*",
            "checkpoints/last",
            "checkpoints/weights.safetensors",
            "figures/hardness_*.png",
            "evaluate/*.json",
            "evaluate/*.png",
            "events/*",
        ):
            stale += self.path.glob(pattern)
        for file in stale:
            file.unlink(missing_ok=True)

    def write_config(self, config: Config, device: torch.device, schedule: Schedule | None = None) -> None:
        """Save the resolved config with versions, git sha and command, and the schedule that its epochs came to."""
        make_output_folder(self.path)
        about: dict[str, Any] = {**about_this_run(device)}
        if schedule is not None:
            values = asdict(schedule)
            about["schedule"] = values | {"ema": schedule.ema._asdict()}
        write_text_atomically(self.config_file, to_yaml(config, about))

    def save_evaluation(self, name: str, figures: dict[str, Any]) -> None:
        """Write ``evaluate/NAME.json``."""
        self.evaluations.mkdir(exist_ok=True)
        write_text_atomically(self.evaluations / f"{name}.json", json.dumps(figures, indent=2) + "\n")

    def result(self) -> dict[str, Any] | None:
        """The figures of a finished run; None where there are none, or damaged ones."""
        return read_object(self.result_file)


def about_this_run(device: torch.device) -> dict[str, str]:
    """Versions, hardware, time and command: what a number needs beside it."""
    return {
        **versions(device),
        "git": _git_sha(),
        "command": shlex.join(["hardpatch", *sys.argv[1:]]),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions(device: torch.device) -> dict[str, str]:
    """Versions of hardpatch, torch and timm, and the device's name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} x{os.cpu_count()}"
    return {
        "hardpatch": version("hardpatch"),
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "device": name,
    }


def _git_sha() -> str:
    try:
        sha = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return sha.stdout.strip()
