"""Trackers get what metrics.jsonl gets, know a run that goes on, and never cost one."""

import json
import sys

import pytest

from hardpatch.cli import main
from hardpatch.runs import trackers
from hardpatch.runs.trackers import TRACKERS, Tracker, Trackers, check_trackers, start_trackers
from hardpatch.runtime.errors import InputError, Interrupted
from hardpatch.runtime.log import read_metrics
from hardpatch.runtime.signals import StopSignal
from hardpatch.training.reporting import Reporter
from tiny import TINY, pretrain

FIELDS = {name: value for name, value in TINY.items() if name != "data"} | {"figures": True, "num_figure_images": 1}

WANDB = """
calls = []
class Run:
    def __init__(self, id): self.id = id or "new1"
    def define_metric(self, *a, **k): calls.append(("define", a, k))
    def log(self, values): calls.append(("log", values))
    def finish(self, exit_code): calls.append(("finish", exit_code))
def init(**k):
    calls.append(("init", k))
    return Run(k["id"])
def Image(file): return "image " + file
"""

MLFLOW = """
calls = []
class Info:
    def __init__(self, run_id): self.run_id = run_id or "new1"
class Run:
    def __init__(self, run_id): self.info = Info(run_id)
class Experiment:
    experiment_id = "7"
def set_experiment(name):
    calls.append(("experiment", name))
    return Experiment
def start_run(**k):
    calls.append(("init", k))
    return Run(k["run_id"])
def log_params(values):
    assert len(values) <= 100 and all(len(v) <= 500 for v in values.values())
    calls.append(("params", values))
def log_metrics(values, step, synchronous): calls.append(("log", {**values, "step": step}))
def log_artifact(file, folder): calls.append(("log", {folder: "image " + file}))
def end_run(status): calls.append(("finish", {"FINISHED": 0}.get(status, 1)))
"""

TRACKIO = """
calls = []
class Run:
    def __init__(self, name): self.name = name
def init(**k):
    calls.append(("init", k))
    return Run(k["name"] if k["name"].startswith("made-") else "made-" + k["name"])
def log(values, step): calls.append(("log", {**values, "step": step}))
def finish(): calls.append(("finish", 0))
def Image(file): return "image " + file
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Stand-ins for all three, which write down how they are called."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name, source in (("wandb", WANDB), ("mlflow", MLFLOW), ("trackio", TRACKIO)):
        (folder / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)
    yield lambda name: sys.modules[name].calls
    for name in TRACKERS:
        sys.modules.pop(name, None)


def logged(calls):
    return [call[1] for call in calls if call[0] == "log"]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_gets_every_record_every_figure_and_the_config(tmp_path, installed, name):
    out = tmp_path / "first"
    pretrain("shapes:48", out, trackers=(name,), tracker_project="moths", **FIELDS)
    calls = installed(name)
    begun = dict(call for call in calls if call[0] == "init")["init"]
    records = [values for values in logged(calls) if name not in values and "hardness" not in values]
    expected = [{k: v for k, v in record.items() if v is not None} for record in read_metrics(out)]
    assert [{**values, "step": int(values["step"])} for values in records] == expected
    pictures = [values["hardness"] for values in logged(calls) if "hardness" in values]
    assert [picture.removeprefix("image ") for picture in pictures] == sorted(
        str(file) for file in (out / "figures").glob("hardness_*.png")
    )
    assert calls[-1] == ("finish", 0)
    if name == "mlflow":
        params = {key: value for call in calls if call[0] == "params" for key, value in call[1].items()}
        assert ("experiment", "moths") in calls
        assert begun["run_name"] == "first"
    else:
        params = begun["config"]
        assert begun["project"] == "moths"
        assert begun["name"].startswith("first")
    assert str(params["batch_size"]) == "8"
    assert {"git", "command", "encoder", "mask"} <= params.keys()


@pytest.mark.parametrize("name", TRACKERS)
def test_a_run_that_goes_on_continues_its_run_there(tmp_path, installed, monkeypatch, name):
    after_step = Reporter.after_step

    def stopping(self, meter):
        after_step(self, meter)
        if self.run.state.step == 5:
            for stop in signals:
                stop.name = "SIGTERM"

    signals = []
    enter = StopSignal.__enter__
    monkeypatch.setattr(StopSignal, "__enter__", lambda self: (signals.append(self), enter(self))[1])
    monkeypatch.setattr(Reporter, "after_step", stopping)
    with pytest.raises(Interrupted):
        pretrain("shapes:48", tmp_path / "run", trackers=(name,), **FIELDS)
    calls = installed(name)
    assert calls[-1] == ("finish", 0 if name == "trackio" else 1)  # trackio knows no other end
    known = json.loads((tmp_path / "run" / "trackers.json").read_text())[name]
    monkeypatch.setattr(Reporter, "after_step", after_step)
    calls.clear()
    pretrain("shapes:48", tmp_path / "run", trackers=(name,), **FIELDS)
    begun = dict(call for call in calls if call[0] == "init")["init"]
    assert begun.get("id", begun.get("run_id", begun.get("name"))) == known
    assert not [call for call in calls if call[0] == "params"], "MLflow refuses parameters that are written twice"


def test_folders_of_one_name_are_different_runs(tmp_path, installed):
    for parent in ("a", "b"):
        pretrain("shapes:48", tmp_path / parent / "run", trackers=("trackio",), **FIELDS)
    first, second = (call[1]["name"] for call in installed("trackio") if call[0] == "init")
    assert first != second


def test_a_run_that_starts_over_is_a_new_one(tmp_path, installed):
    for _ in range(2):
        pretrain("shapes:48", tmp_path / "run", trackers=("wandb",), resume="restart", **FIELDS)
    assert [call[1]["id"] for call in installed("wandb") if call[0] == "init"] == [None, None]


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit) as left:
        main(
            [
                "pretrain",
                "--recipe",
                "hpm",
                "--data",
                "shapes:48",
                "--out",
                str(tmp_path / "run"),
                "--trackers",
                "wandb",
            ]
        )
    assert left.value.code == 2
    assert "trackers: 'wandb' needs its package; pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class Fake:
    """A tracker that may fail, and what it was asked."""

    def __init__(self, fails=()):
        self.fails, self.seen = fails, []
        self.tracker = Tracker(
            "r1",
            log=lambda metrics, step: self._do("log"),
            log_figure=lambda name, file, step: self._do("figure"),
            close=lambda *, finished: self._do(f"close {finished}"),
        )

    def _do(self, what):
        self.seen.append(what)
        if what in self.fails:
            raise ConnectionError("no route to host\nmore")


def test_one_that_fails_is_told_once_and_left(capsys):
    good, bad = Fake(), Fake(fails=("log",))
    both = Trackers({"bad": bad.tracker, "good": good.tracker})
    for step in range(3):
        both.log({"loss": 1.0}, step)
    both.close(finished=True)
    assert bad.seen == ["log", "close False"]
    assert good.seen == ["log", "log", "log", "close True"]
    told = capsys.readouterr().err.replace("\n", " ")
    assert told.count("bad fails and gets nothing more; metrics.jsonl has everything (no route to host)") == 1


def test_one_that_cannot_be_started_ends_the_others_and_the_run(tmp_path, monkeypatch):
    good = Fake()

    def refuse(*_):
        raise PermissionError("api_key not configured")

    monkeypatch.setattr(trackers, "TRACKERS", {"wandb": lambda *_: good.tracker, "mlflow": refuse})
    with pytest.raises(InputError, match="trackers: 'mlflow' cannot be started: api_key not configured"):
        start_trackers(["wandb", "mlflow"], "hpm", tmp_path, {})
    assert good.seen == ["close False"]
    assert not (tmp_path / "trackers.json").exists()


def test_a_run_that_goes_on_does_so_without_a_tracker_that_is_away(tmp_path, monkeypatch, capsys):
    def away(*_):
        raise ConnectionError("no route to host")

    (tmp_path / "trackers.json").write_text('{"wandb": "old1"}')
    monkeypatch.setattr(trackers, "TRACKERS", {"wandb": away})
    start_trackers(["wandb"], "hpm", tmp_path, {}).log({"loss": 1.0}, 5)
    assert "wandb cannot go on with its run" in capsys.readouterr().err.replace("\n", " ")
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "old1"}


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="'wandb' needs its package"):
        check_trackers(["wandb"])


def test_figures_that_are_no_number_are_not_sent():
    seen = []
    tracker = Fake().tracker._replace(log=lambda metrics, step: seen.append((metrics, step)))
    Trackers({"one": tracker}).log({"loss": 1, "knn": None, "rank": float("nan")}, 7)
    assert seen == [({"loss": 1.0}, 7)]


def test_without_trackers_nothing_is_written(tmp_path):
    none = start_trackers([], "hpm", tmp_path, {})
    none.log({"loss": 1.0}, 0)
    none.close(finished=True)
    assert not any(tmp_path.iterdir())
