"""Longer or shorter afterwards: a run that branches off another before its learning rate fell.

With a constant learning rate nothing in a run knows its end before the cool-down begins. So a run of another length
goes on from the last checkpoint before that, and ends bit-identical (on a CPU) to one that had this length from the
start with the same ``schedule_epochs``. The run that it branches off stays as it is.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace

from hpm.checkpoint import CheckpointFolder, write_text_atomically
from hpm.config import Config, differences, load_config, with_fields
from hpm.errors import InputError
from hpm.log import read_metrics, say
from hpm.run_folder import RunFolder
from hpm.run_schedule import branching_step, resolve_schedule

FREE = ("epochs", "cooldown_epochs")
"""What may be another in a branch; and the section ``run``, which decides no result."""


def check_apart(trunk: RunFolder, out: RunFolder) -> None:
    """Refuse a branch in the folder of its trunk, which stays as it is.

    Raises:
        InputError: It is the same folder.
    """
    if trunk.path.resolve() == out.path.resolve():
        raise InputError(f"branch_from: a branch needs a folder of its own, got {str(out.path)!r} for out as well")


def open_trunk(run: RunFolder) -> Config:
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


def branched(trunk: Config, wanted: Config) -> Config:
    """The config of a branch: that of the trunk but for its length, with the trunk's ramps.

    Args:
        trunk: Of :func:`open_trunk`.
        wanted: The trunk's with what the user has given.

    Raises:
        InputError: Something else was changed as well, or nothing.
    """
    same = with_fields(wanted, {name: getattr(trunk.optimisation, name) for name in FREE} | {"data": trunk.data.data})
    if changed := differences(trunk, same):
        raise InputError(
            f"branch_from: a branch may differ in {', '.join(FREE)} and in how it runs, not in what is learnt before; "
            "changed:\n  " + "\n  ".join(changed)
        )
    if all(getattr(wanted.optimisation, name) == getattr(trunk.optimisation, name) for name in FREE):
        raise InputError(
            f"branch_from: this would be the same run again; give other epochs than {trunk.optimisation.epochs}, or "
            "cooldown_epochs"
        )
    ramps = trunk.optimisation.schedule_epochs or trunk.optimisation.epochs
    return replace(wanted, optimisation=replace(wanted.optimisation, schedule_epochs=ramps))


def branch_off(trunk: RunFolder, config: Config, folder: RunFolder, *, num_images: int) -> None:
    """Put the trunk's last usable checkpoint, records and figures into a new folder, for a run to go on with.

    Args:
        trunk: The run to branch off.
        config: Of :func:`branched`, resolved.
        folder: Of the branch; its config is written already.
        num_images: How many there are to learn from.

    Raises:
        InputError: No checkpoint is left from before the cool-down of either.
    """
    ends = [
        step
        for one in (open_trunk(trunk), config)
        if (step := branching_step(one, resolve_schedule(one.optimisation, num_images))) is not None
    ]
    checkpoints = CheckpointFolder(trunk.checkpoints)
    state = checkpoints.load_latest(until=min(ends))
    if state is None:
        raise InputError(
            f"branch_from: no checkpoint up to step {min(ends)} is left in {str(trunk.checkpoints)!r} (there are "
            f"{', '.join(map(str, checkpoints.steps())) or 'none'}); after it one of the two learning rates falls"
        )
    records = [record for record in read_metrics(trunk.path) if record["step"] <= state["step"]]
    write_text_atomically(folder.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    for figure in trunk.figures.glob("hardness_*.png"):
        if int(figure.stem.removeprefix("hardness_")) <= state["step"]:
            folder.figures.mkdir(exist_ok=True)
            shutil.copy(figure, folder.figures)
    CheckpointFolder(folder.checkpoints).save(state | {"config": asdict(config)})
    say(f"branching off {trunk.path} at step {state['step']}")
