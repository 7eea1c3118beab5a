"""Longer or shorter afterwards: a run that branches off another before its learning rate fell.

With a constant learning rate nothing in a run knows its end before the cool-down begins. So a run of another length
goes on from the last checkpoint before that, and ends bit-identical (on a CPU) to one that had this length from the
start with the same ``schedule_epochs``. The run that it branches off, its parent, stays as it is; once a branch has a
checkpoint of its own it is a run like any other, and the parent run may go.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from hardpatch.config.config import Config
from hardpatch.config.values import differences, load_config
from hardpatch.runs.checkpoint import CheckpointFolder
from hardpatch.runs.folder import RunFolder
from hardpatch.runs.schedule import Schedule, resolve_schedule
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.files import write_text_atomically
from hardpatch.runtime.log import read_metrics, say

FREE = ("epochs", "cooldown_epochs")
"""What may be another in a branch; and the section ``run``, which decides no result, and where the images lie."""


def beginning_of_branch(branch_from: str | Path, out: str | Path, *, resume: str) -> tuple[Config, RunFolder | None]:
    """What a run that was asked to branch off begins with.

    Returns:
        Defaults of what the user gives; and the run to branch off, or None where the branch is there already and goes
        on as any run.

    Raises:
        InputError: There is no run, none that another can branch off, or it is in the same folder.
    """
    parent, branch = RunFolder(branch_from), RunFolder(out)
    if parent.path.resolve() == branch.path.resolve():
        raise InputError(f"branch_from: a branch needs a folder of its own, got {str(branch.path)!r} for out as well")
    if resume == "auto" and branch.config_file.is_file() and CheckpointFolder(branch.checkpoints).steps():
        return load_config(branch.config_file), None
    return open_parent(parent), parent


def open_parent(run: RunFolder) -> Config:
    """The config of a run to branch off.

    Raises:
        InputError: There is no run, or none that another can branch off.
    """
    if not run.config_file.is_file():
        raise InputError(f"branch_from: {str(run.path)!r} holds no run")
    config = load_config(run.config_file)
    if config.optimisation.learning_rate_schedule != "constant":
        raise InputError(
            f"branch_from: the learning rate of {str(run.path)!r} falls from the warm-up on (learning_rate_schedule "
            f"{config.optimisation.learning_rate_schedule!r}), so its length stands; only runs with 'constant' can be "
            "made longer or shorter. To train on from its weights in a new run, use --init-from"
        )
    return config


def branched(parent: Config, wanted: Config) -> Config:
    """The config of a branch: that of the parent run but for its length, with the parent run's ramps.

    Args:
        parent: Of :func:`open_parent`.
        wanted: The parent run's with what the user has given.

    Raises:
        InputError: Something else was changed as well, or nothing.
    """
    ramps = parent.optimisation.schedule_epochs or parent.optimisation.epochs
    lengths = {name: getattr(parent.optimisation, name) for name in FREE}
    given = wanted.optimisation.schedule_epochs
    same = replace(
        wanted,
        data=replace(wanted.data, data=parent.data.data),
        optimisation=replace(
            wanted.optimisation,
            **lengths,
            schedule_epochs=parent.optimisation.schedule_epochs if given == ramps else given,
        ),
    )
    if changed := differences(parent, same):
        raise InputError(
            f"branch_from: a branch may differ in {', '.join(FREE)}, in how it runs, and in where its images lie, not "
            "in what is learnt; changed:\n  " + "\n  ".join(changed)
        )
    if all(getattr(wanted.optimisation, name) == value for name, value in lengths.items()):
        raise InputError(
            f"branch_from: this would be the same run again; give other epochs than {parent.optimisation.epochs}, or "
            "cooldown_epochs"
        )
    return replace(wanted, optimisation=replace(wanted.optimisation, schedule_epochs=ramps))


class Branch:
    """A run that is about to branch off another; on the main process, which alone needs it.

    Args:
        parent: The run to branch off.
        config: Of :func:`branched`, resolved.
        schedule: Of the branch.
        folder: Of the branch.
    """

    def __init__(self, parent: RunFolder, config: Config, schedule: Schedule, folder: RunFolder) -> None:
        self.parent, self.config, self.schedule, self.folder = parent, config, schedule, folder
        self.state: dict[str, Any] = {}

    def find(self, *, images: str, num_images: int) -> None:
        """Find the parent's last checkpoint in which neither learning rate has begun to fall. Writes nothing.

        Args:
            images: Fingerprint of the images there are.
            num_images: How many they are.

        Raises:
            InputError: Other images, or no such checkpoint is left whole.
        """
        parent = self.parent
        before = resolve_schedule(open_parent(parent).optimisation, num_images)
        ends = before.branching_step, self.schedule.branching_step
        until = min(step for step in ends if step is not None)
        checkpoints = CheckpointFolder(parent.checkpoints)
        try:
            state = checkpoints.load_latest(until=until)
        except InputError as error:
            raise InputError(
                f"branch_from: no checkpoint of {str(parent.path)!r} up to step {until} is whole; after it one of the "
                f"two learning rates falls\n{error}"
            ) from None
        if state is None:
            raise InputError(
                f"branch_from: no checkpoint up to step {until} is left in {str(parent.checkpoints)!r} (there are "
                f"{', '.join(map(str, checkpoints.steps())) or 'none'}); after it one of the two learning rates falls. "
                + self._what_would_do(checkpoints.steps(), ends[0])
            )
        if state["images"] != images:
            raise InputError(
                f"data: {self.config.data.data!r} does not hold the images that {str(parent.path)!r} was trained on "
                f"({state['images']}; now {images}): order and schedules would change. Say where they are with --data"
            )
        self.state = state

    def _what_would_do(self, steps: list[int], end: int | None) -> str:
        """The shortest length that the checkpoints of the parent run allow."""
        usable = [step for step in steps if end is None or step <= end]
        if not usable:
            return "It has none from before its own cool-down, either"
        given = self.config.optimisation.cooldown_epochs
        needed = min(usable) / self.schedule.steps_per_epoch
        epochs = math.ceil(needed / 0.8 if given is None else needed + given)
        return f"The shortest run that can branch off here has --epochs {epochs}; --keep-steps keeps more checkpoints"

    def start(self, device: torch.device) -> None:
        """Put the checkpoint, and what was recorded up to it, into the folder of the branch.

        Config first and checkpoint last: a folder that is left half made is branched off again.

        Raises:
            InputError: The disk is full, or does not let itself be written.
        """
        folder, parent, step = self.folder, self.parent, self.state["step"]
        folder.write_config(self.config, device, self.schedule)
        try:
            records = [record for record in read_metrics(parent.path) if record["step"] <= step]
            text = "".join(json.dumps(record) + "\n" for record in records)
            write_text_atomically(folder.path / "metrics.jsonl", text)
            for figure in parent.figures.glob("hardness_*.png"):
                found = re.fullmatch(r"hardness_(\d+)", figure.stem)
                if found and int(found[1]) <= step:
                    folder.figures.mkdir(exist_ok=True)
                    shutil.copy(figure, folder.figures)
            if damaged := parent.read_damaged():
                folder.save_damaged(damaged)
            CheckpointFolder(folder.checkpoints).save(self.state | {"config": asdict(self.config)})
        except OSError as error:
            raise InputError(f"out: cannot write in {str(folder.path)!r}: {error.strerror or error}") from error
        say(f"branching off {parent.path} at step {step}")
