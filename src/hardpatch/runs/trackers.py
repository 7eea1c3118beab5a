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
from typing import Any, Protocol, runtime_checkable

from hardpatch.runtime.errors import InputError
from hardpatch.runtime.files import write_text_atomically
from hardpatch.runtime.log import warn

RUNS_FILE = "trackers.json"
"""In the run folder: by which name each tracker knows the run."""
MLFLOW_BATCH = 100
"""Parameters that MLflow takes at once."""


@runtime_checkable
class Tracker(Protocol):
    """Somewhere that a run can be looked at."""

    run: str
    """By what it knows the run."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take figures."""
        ...

    def log_figure(self, name: str, file: Path, step: int) -> None:
        """Take a picture."""
        ...

    def close(self, *, finished: bool) -> None:
        """The run has ended, or was stopped and may go on."""
        ...


class Wandb:
    """Weights & Biases.

    Args:
        project: Its project.
        folder: The run folder, whose name is the run's.
        run: Of a run that goes on; None: a new one.
        config: Fields and values.
    """

    def __init__(self, project: str, folder: Path, run: str | None, config: Mapping[str, Any]) -> None:
        self.module = importlib.import_module("wandb")
        # A run that the caller has open himself stays as it is; older versions do not know the word.
        beside = {} if getattr(self.module, "run", None) is None else {"reinit": "create_new"}
        self._run = self.module.init(
            project=project, name=folder.name, id=run, resume="allow", config=dict(config), dir=str(folder), **beside
        )
        self.run = str(self._run.id)
        # Steps of its own only ever grow, and a run that goes on from a checkpoint repeats some.
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take figures."""
        self._run.log({**metrics, "step": step})

    def log_figure(self, name: str, file: Path, step: int) -> None:
        """Take a picture."""
        self._run.log({name: self.module.Image(str(file)), "step": step})

    def close(self, *, finished: bool) -> None:
        """The run has ended, or was stopped and may go on."""
        self._run.finish(exit_code=0 if finished else 1)


class Mlflow:
    """MLflow; the project is its experiment.

    Args:
        project: Its experiment.
        folder: The run folder, whose name is the run's.
        run: Of a run that goes on; None: a new one.
        config: Fields and values.
    """

    def __init__(self, project: str, folder: Path, run: str | None, config: Mapping[str, Any]) -> None:
        self.module = importlib.import_module("mlflow")
        experiment = self.module.set_experiment(project)
        started = self.module.start_run(
            run_id=run, experiment_id=experiment.experiment_id, run_name=None if run else folder.name
        )
        self.run = str(started.info.run_id)
        if run is None:  # parameters are written once
            fields = [(name, str(value)[:500]) for name, value in config.items()]
            for first in range(0, len(fields), MLFLOW_BATCH):
                self.module.log_params(dict(fields[first : first + MLFLOW_BATCH]))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take figures."""
        self.module.log_metrics(dict(metrics), step=step, synchronous=False)

    def log_figure(self, name: str, file: Path, step: int) -> None:
        """Take a picture."""
        self.module.log_artifact(str(file), name)

    def close(self, *, finished: bool) -> None:
        """The run has ended, or was stopped and may go on."""
        self.module.end_run("FINISHED" if finished else "KILLED")


class Trackio:
    """Trackio, of Hugging Face.

    Args:
        project: Its project.
        folder: The run folder, whose name is the run's.
        run: Of a run that goes on; None: a new one.
        config: Fields and values.
    """

    def __init__(self, project: str, folder: Path, run: str | None, config: Mapping[str, Any]) -> None:
        self.module = importlib.import_module("trackio")
        # Its runs are known by their names alone: one of the folder's might be another folder's, too.
        name = run or f"{folder.name}-{secrets.token_hex(3)}"
        self.run = str(self.module.init(project=project, name=name, config=dict(config), resume="allow").name)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take figures."""
        self.module.log(dict(metrics), step=step)

    def log_figure(self, name: str, file: Path, step: int) -> None:
        """Take a picture."""
        self.module.log({name: self.module.Image(str(file))}, step=step)

    def close(self, *, finished: bool) -> None:
        """The run has ended, or was stopped and may go on."""
        self.module.finish()


TRACKERS: dict[str, Callable[[str, Path, str | None, Mapping[str, Any]], Tracker]] = {
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
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

    def _each(self, do: Callable[[Tracker], None]) -> None:
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
