"""Experiment trackers beside ``metrics.jsonl`` and TensorBoard: Weights & Biases, MLflow, Trackio.

A run that goes on continues its run there. What they are for is to be looked at: one that fails is told once and left,
and the training goes on. They are configured as their own documentation says (``WANDB_MODE=offline``,
``MLFLOW_TRACKING_URI``, ``TRACKIO_SPACE_ID``...).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from hardpatch.runtime.errors import InputError
from hardpatch.runtime.files import write_text_atomically
from hardpatch.runtime.log import warn

RUNS_FILE = "trackers.json"
"""In the run folder: by which name each tracker knows the run."""
MLFLOW_BATCH = 100
"""Parameters that MLflow takes at once."""


class Tracker(NamedTuple):
    """Somewhere that a run can be looked at."""

    run: str
    """By what it knows the run."""
    log: Callable[[Mapping[str, float], int], object]
    """Takes figures, and the step."""
    log_figure: Callable[[str, Path, int], object]
    """Takes a picture: its name, file and step."""
    close: Callable[..., object]
    """Told, by ``finished``, whether the run has ended, or was stopped and may go on."""


# Each is started with the project, the run folder (whose name is the run's), the run that goes on or None, and the
# fields of the config.


def start_wandb(project: str, folder: Path, run: str | None, config: Mapping[str, Any]) -> Tracker:
    """Weights & Biases."""
    wandb = importlib.import_module("wandb")
    # A run that the caller has open himself stays as it is; older versions do not know the word.
    beside = {} if getattr(wandb, "run", None) is None else {"reinit": "create_new"}
    started = wandb.init(
        project=project, name=folder.name, id=run, resume="allow", config=dict(config), dir=str(folder), **beside
    )
    # Steps of its own only ever grow, and a run that goes on from a checkpoint repeats some.
    started.define_metric("*", step_metric="step")
    return Tracker(
        str(started.id),
        log=lambda metrics, step: started.log({**metrics, "step": step}),
        log_figure=lambda name, file, step: started.log({name: wandb.Image(str(file)), "step": step}),
        close=lambda *, finished: started.finish(exit_code=0 if finished else 1),
    )


def start_mlflow(project: str, folder: Path, run: str | None, config: Mapping[str, Any]) -> Tracker:
    """MLflow; the project is its experiment."""
    mlflow = importlib.import_module("mlflow")
    experiment = mlflow.set_experiment(project).experiment_id
    started = mlflow.start_run(run_id=run, experiment_id=experiment, run_name=None if run else folder.name)
    if run is None:  # parameters are written once
        fields = [(name, str(value)[:500]) for name, value in config.items()]
        for first in range(0, len(fields), MLFLOW_BATCH):
            mlflow.log_params(dict(fields[first : first + MLFLOW_BATCH]))
    return Tracker(
        str(started.info.run_id),
        log=lambda metrics, step: mlflow.log_metrics(dict(metrics), step=step, synchronous=False),
        log_figure=lambda name, file, step: mlflow.log_artifact(str(file), name),
        close=lambda *, finished: mlflow.end_run("FINISHED" if finished else "KILLED"),
    )


def start_trackio(project: str, folder: Path, run: str | None, config: Mapping[str, Any]) -> Tracker:
    """Trackio, of Hugging Face."""
    trackio = importlib.import_module("trackio")
    # Its runs are known by their names alone: one of the folder's might be another folder's, too.
    name = run or f"{folder.name}-{secrets.token_hex(3)}"
    started = trackio.init(project=project, name=name, config=dict(config), resume="allow")
    return Tracker(
        str(started.name),
        log=lambda metrics, step: trackio.log(dict(metrics), step=step),
        log_figure=lambda name, file, step: trackio.log({name: trackio.Image(str(file))}, step=step),
        close=lambda *, finished: trackio.finish(),
    )


TRACKERS: dict[str, Callable[[str, Path, str | None, Mapping[str, Any]], Tracker]] = {
    "wandb": start_wandb,
    "mlflow": start_mlflow,
    "trackio": start_trackio,
}
"""By the name of their package."""


def check_trackers(names: Sequence[str]) -> None:
    """Are the packages there?

    Raises:
        InputError: One is not.
    """
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, as wandb makes one, is no package
            raise InputError(f"trackers: {name!r} needs its package; pip install {name}")


class Trackers:
    """All trackers of a run.

    Args:
        trackers: By name.
    """

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)

    def log(self, metrics: Mapping[str, float | int | None], step: int) -> None:
        """Send figures; those that are no number are left out."""
        there = {name: float(value) for name, value in metrics.items() if value is not None and math.isfinite(value)}
        self._each(lambda tracker: tracker.log(there, step))

    def log_figure(self, name: str, file: Path, step: int) -> None:
        """Send a picture, if it could be drawn."""
        if file.is_file():
            self._each(lambda tracker: tracker.log_figure(name, file, step))

    def close(self, *, finished: bool) -> None:
        """Tell them that the run has ended, or was stopped and may go on."""
        self._each(lambda tracker: tracker.close(finished=finished))
        self._trackers.clear()

    def _each(self, do: Callable[[Tracker], object]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                do(tracker)
            except Exception as error:  # networks and servers fail in any way: no reason to lose a training
                del self._trackers[name]
                warn(f"{name} fails and gets nothing more; metrics.jsonl has everything ({_first_line(error)})")
                with suppress(Exception):  # or the next run of this process would be taken for this one
                    tracker.close(finished=False)


def start_trackers(names: Sequence[str], project: str, folder: Path, config: Mapping[str, Any]) -> Trackers:
    """The trackers of a run. One that has known the run before and cannot be reached now is told and left out.

    Args:
        names: Of :data:`TRACKERS`.
        project: Where the run belongs there.
        folder: The run folder.
        config: Fields and values.

    Raises:
        InputError: A tracker of a new run cannot be started.
    """
    file = folder / RUNS_FILE
    known: dict[str, str] = json.loads(file.read_text()) if file.is_file() else {}
    started: dict[str, Tracker] = {}
    for name in names:
        try:
            started[name] = TRACKERS[name](project, folder, known.get(name), config)
        except Exception as error:  # they raise anything
            if name in known:
                warn(
                    f"{name} cannot go on with its run, and gets nothing; metrics.jsonl has all ({_first_line(error)})"
                )
                continue
            Trackers(started).close(finished=False)
            raise InputError(f"trackers: {name!r} cannot be started: {_first_line(error)}") from error
    if started:
        write_text_atomically(file, json.dumps(known | {name: tracker.run for name, tracker in started.items()}) + "\n")
    return Trackers(started)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
