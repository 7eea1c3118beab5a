"""An evaluation is a module and a row of the table: the command, the JSON file and the report follow from these."""

import json
import sys
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import pytest

from dense_run import write_run
from hardpatch.cli.evaluate import evaluate
from hardpatch.config.evaluations import EVALUATIONS, Evaluation
from hardpatch.evaluate.result import Result
from hardpatch.figures.report import write_report
from hardpatch.figures.sections import Picture, Section, Table, Tile
from hardpatch.runs.folder import RunFolder


@pytest.mark.parametrize("name", EVALUATIONS)
def test_every_row_leads_to_an_evaluation(name):
    row = EVALUATIONS[name]
    module = import_module(row.module)
    assert module.run.__annotations__["config"] == row.config.__name__
    assert callable(module.describe)
    assert row.config.__doc__


@dataclass(frozen=True)
class ToyConfig:
    """Count to a number."""

    checkpoint: str
    """Run folder."""
    number: int = 3
    """How far."""


@dataclass(frozen=True)
class ToyResult(Result):
    total: int
    pairs: dict[str, tuple[int, ...]]

    @property
    def name(self):
        return "toy"

    def what_next(self, config):
        return [f"next:  count to {config.number + 1}"]


def describe(figures):
    table = Table(("what", "total"), [("this run", str(figures["total"]))], folded="folded away")
    picture = Picture("/nowhere/toy.png", "lost")
    return Section("Counting", [table, "All <numbers> were counted.", picture], Tile("6", "total", "of three"))


@pytest.fixture
def toy(monkeypatch):
    """An evaluation from outside."""
    module = ModuleType("toy_evaluation")
    module.run = lambda config: ToyResult(sum(range(config.number + 1)), {"a": (1, 2)})
    module.describe = describe
    monkeypatch.setitem(sys.modules, "toy_evaluation", module)
    monkeypatch.setitem(EVALUATIONS, "toy", Evaluation(ToyConfig, "toy_evaluation", "counts"))


def test_an_evaluation_from_outside_is_printed_kept_and_in_the_report(toy, tmp_path, capsys):
    run = write_run(tmp_path / "run")
    evaluate("toy", ["--checkpoint", str(run), "--number", "3", "--json"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == ["what      total", "--------  -----", "this run  6"]
    assert printed[-3:] == ["", "next:  count to 4", '{"total": 6, "pairs": {"a": [1, 2]}}']
    assert "look:  /nowhere/toy.png" in printed
    assert json.loads((run / "evaluate" / "toy.json").read_text()) == {"total": 6, "pairs": {"a": [1, 2]}}
    page = (run / "report.html").read_text()
    assert "<h3>Counting</h3>" in page
    assert "<b>6</b><span>total</span>" in page
    assert "folded away" in page
    assert "All &lt;numbers&gt; were counted." in page
    assert "toy.png" not in page


def test_a_picture_that_moved_with_its_run_folder_is_found(toy, tmp_path):
    folder = RunFolder(write_run(tmp_path / "run"))
    folder.evaluations.mkdir()
    (folder.evaluations / "toy.json").write_text('{"total": 6}')
    (folder.evaluations / "toy.png").write_bytes(b"picture")
    write_report(folder)
    assert 'alt="lost"' in folder.report_file.read_text()


def test_a_checkpoint_file_without_a_folder_keeps_nothing(toy, tmp_path):
    run = write_run(tmp_path / "run")
    evaluate("toy", ["--checkpoint", str(run / "checkpoints" / "last")])
    assert not list(run.rglob("toy.json"))
