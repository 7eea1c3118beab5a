"""Runs that branch off another: longer, shorter, stopped in between, refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from hardpatch.config.config import Config, OptimisationConfig
from hardpatch.config.values import load_config, with_fields
from hardpatch.method.targets.tokens import CodebookTarget
from hardpatch.runs.checkpoint import CheckpointFolder, CheckpointWarning
from hardpatch.runs.schedule import resolve_schedule
from hardpatch.runtime.errors import InputError, Interrupted
from hardpatch.runtime.log import read_metrics
from hardpatch.training.reporting import Reporter
from tiny import TINY, assert_same_state, final_state, flags, pretrain, stop_after

CONSTANT = TINY | {"learning_rate_schedule": "constant", "epochs": 4, "checkpoint_steps": 100, "keep_last": 1}
"""24 steps of 8 images, the last 5 of them with a falling learning rate."""


def run(out, **changes):
    values = CONSTANT | changes
    return pretrain(values.pop("data"), out, **values)


def branch(parent, out, **changes):
    values = {"precision": "float32", "device": "cpu", "workers": 0, "checkpoint_steps": 100} | changes
    return pretrain(CONSTANT["data"], out, branch_from=parent, **values)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("branching") / "parent"
    run(folder, keep_steps=6)
    return folder


def steps(folder):
    return CheckpointFolder(folder / "checkpoints").steps()


def test_the_checkpoint_before_the_cool_down_is_kept_for_good(parent):
    assert steps(parent) == [6, 12, 18, 19, 24]


def test_a_longer_branch_is_the_run_that_was_longer_from_the_start(parent, tmp_path):
    before = {file: file.read_bytes() for file in parent.rglob("*") if file.is_file()}
    result = branch(parent, tmp_path / "longer", epochs=7)
    assert result["steps"] == 42
    run(tmp_path / "whole", epochs=7, schedule_epochs=4)
    assert_same_state(final_state(tmp_path / "longer"), final_state(tmp_path / "whole"))
    assert {file: file.read_bytes() for file in parent.rglob("*") if file.is_file()} == before, "the parent was touched"
    told, expected = (
        {r["step"]: (r["hard_share"], r["lr"], r["ema_decay"]) for r in read_metrics(out) if "hard_share" in r}
        for out in (tmp_path / "longer", tmp_path / "whole")
    )
    assert told[15] == expected[15], "the records of the parent up to the branch"
    assert told[42] == expected[42]
    assert told[42][0] == told[36][0] == 0.5, "the share stays at its end"


def test_a_shorter_branch_ends_early_as_a_run_of_that_length(parent, tmp_path):
    branch(parent, tmp_path / "longer", epochs=5, cooldown_epochs=2)  # its own cool-down begins at step 18: from 0
    run(tmp_path / "whole", epochs=5, schedule_epochs=4, cooldown_epochs=2)
    assert_same_state(final_state(tmp_path / "longer"), final_state(tmp_path / "whole"))


def test_a_branch_of_a_branch_keeps_the_ramps_of_the_first(parent, tmp_path):
    branch(parent, tmp_path / "longer", epochs=5)
    branch(tmp_path / "longer", tmp_path / "longest", epochs=6)
    assert load_config(tmp_path / "longest/config.yaml").optimisation.schedule_epochs == 4
    run(tmp_path / "whole", epochs=6, schedule_epochs=4)
    assert_same_state(final_state(tmp_path / "longest"), final_state(tmp_path / "whole"))


def test_an_unfinished_run_can_be_brought_to_an_early_end(tmp_path, monkeypatch):
    stop_after(monkeypatch, 13)
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped", epochs=40, schedule_epochs=4, warmup_epochs=1)
    monkeypatch.undo()
    assert branch(tmp_path / "stopped", tmp_path / "ended", epochs=3, cooldown_epochs=0.5)["steps"] == 18
    run(tmp_path / "whole", epochs=3, cooldown_epochs=0.5, schedule_epochs=4, warmup_epochs=1)
    assert_same_state(final_state(tmp_path / "ended"), final_state(tmp_path / "whole"))


def test_a_branch_that_was_stopped_goes_on_by_the_same_command(parent, tmp_path, monkeypatch):
    stop_after(monkeypatch, 27)
    with pytest.raises(Interrupted):
        branch(parent, tmp_path / "longer", epochs=7)
    monkeypatch.undo()
    started = []
    monkeypatch.setattr(Reporter, "start", lambda self: started.append(self.run.state.step))
    branch(parent, tmp_path / "longer", epochs=7)
    assert started == [27]
    run(tmp_path / "whole", epochs=7, schedule_epochs=4)
    assert_same_state(final_state(tmp_path / "longer"), final_state(tmp_path / "whole"))


def test_a_branch_killed_while_it_was_made_is_made_again(parent, tmp_path, monkeypatch):
    save = CheckpointFolder.save
    monkeypatch.setattr(CheckpointFolder, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        branch(parent, tmp_path / "longer", epochs=5)
    monkeypatch.setattr(CheckpointFolder, "save", save)
    started = []
    monkeypatch.setattr(Reporter, "start", lambda self: started.append(self.run.state.step))
    branch(parent, tmp_path / "longer", epochs=5)
    assert started == [19]


def test_a_branch_can_be_started_over(parent, tmp_path, monkeypatch):
    branch(parent, tmp_path / "longer", epochs=5)
    started = []
    monkeypatch.setattr(Reporter, "start", lambda self: started.append(self.run.state.step))
    branch(parent, tmp_path / "longer", epochs=6, resume="restart")
    assert started == [19]
    assert json.loads((tmp_path / "longer/result.json").read_text())["steps"] == 36


def test_a_fitted_codebook_goes_with_the_branch(tmp_path, monkeypatch):
    changes = {"target": "tokens", "num_tokens": 8}
    run(tmp_path / "parent", **changes)
    monkeypatch.setattr(CodebookTarget, "fit", lambda *_, **__: pytest.fail("fitted again"))
    branch(tmp_path / "parent", tmp_path / "longer", epochs=5)
    ends = [final_state(tmp_path / name)["target"] for name in ("parent", "longer")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_refused_branch_leaves_nothing_and_can_be_asked_for_again(parent, tmp_path):
    with pytest.raises(InputError, match="no checkpoint up to step 4"):
        branch(parent, tmp_path / "branch", epochs=1)
    with pytest.raises(InputError, match="does not hold the images"):
        pretrain("shapes:96", tmp_path / "branch", branch_from=parent, epochs=8, device="cpu", workers=0)
    assert not (tmp_path / "branch").exists()
    assert branch(parent, tmp_path / "branch", epochs=2)["steps"] == 12


def test_what_cannot_be_branched_off_again_is_not_cleared(parent, tmp_path):
    branch(parent, tmp_path / "branch", epochs=5)
    with pytest.raises(InputError, match="no checkpoint up to step 4"):
        branch(parent, tmp_path / "branch", epochs=1, resume="restart")
    assert steps(tmp_path / "branch")[-1] == 30


def test_a_branch_outlives_its_trunk(parent, tmp_path, monkeypatch):
    shutil.copytree(parent, tmp_path / "parent")
    stop_after(monkeypatch, 27)
    with pytest.raises(Interrupted):
        branch(tmp_path / "parent", tmp_path / "longer", epochs=7)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "parent")
    assert branch(tmp_path / "parent", tmp_path / "longer", epochs=7)["steps"] == 42
    with pytest.raises(InputError, match="epochs: 7 -> 8"):
        branch(tmp_path / "parent", tmp_path / "longer", epochs=8)


def test_a_damaged_checkpoint_of_the_trunk_is_passed_over(parent, tmp_path, monkeypatch):
    shutil.copytree(parent, tmp_path / "parent")
    newest = tmp_path / "parent/checkpoints/step_00000019.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    started = []
    monkeypatch.setattr(Reporter, "start", lambda self: started.append(self.run.state.step))
    with pytest.warns(CheckpointWarning):
        branch(tmp_path / "parent", tmp_path / "longer", epochs=5)
    assert started == [18]
    for file in (tmp_path / "parent/checkpoints").glob("step_*.pt"):
        file.write_bytes(b"nothing")
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(InputError, match=r"branch_from: no checkpoint of .* up to step 19 is whole"),
    ):
        branch(tmp_path / "parent", tmp_path / "other", epochs=5)
    assert not (tmp_path / "other").exists()


def test_damaged_images_are_remembered(parent, tmp_path):
    shutil.copytree(parent, tmp_path / "parent")
    (tmp_path / "parent/damaged.csv").write_text("path,reason\na.jpg,cut off\n")
    (tmp_path / "parent/figures").mkdir()
    (tmp_path / "parent/figures/hardness_mine.png").touch()
    branch(tmp_path / "parent", tmp_path / "longer", epochs=5, max_damaged=0.1)
    assert (tmp_path / "longer/damaged.csv").read_text() == "path,reason\na.jpg,cut off\n"


@pytest.mark.slow
def test_two_processes_branch_off_together(parent, tmp_path):
    words = flags({"precision": "float32", "device": "cpu", "workers": 0, "epochs": 5, "checkpoint_steps": 100})
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hardpatch",
         "pretrain", "--branch-from", str(parent), "--out", str(tmp_path / "longer"), *words],
        check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    branch(parent, tmp_path / "one", epochs=5)
    ends = [final_state(tmp_path / name)["student"] for name in ("longer", "one")]
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-4) for name in ends[0])


def test_who_ends_before_the_schedules_is_told(parent, tmp_path, capsys):
    branch(parent, tmp_path / "shorter", epochs=2)
    assert "ends before its schedules do (schedule_epochs 4): with a hard share of 0.23" in " ".join(
        capsys.readouterr().err.split()
    )


def test_recipe_and_branch_exclude_each_other(parent, tmp_path):
    with pytest.raises(InputError, match="recipe, branch_from: give one, not both, got 'mae'"):
        branch(parent, tmp_path / "longer", recipe="mae", epochs=5)


def test_what_the_trunk_began_with_is_not_needed_any_more(parent, tmp_path):
    shutil.copytree(parent, tmp_path / "weights")
    run(tmp_path / "parent", init_from=str(tmp_path / "weights"))
    shutil.rmtree(tmp_path / "weights")
    assert branch(tmp_path / "parent", tmp_path / "longer", epochs=5)["steps"] == 30


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "would be the same run again; give other epochs than 4"),
        ({"epochs": 4}, "would be the same run again"),
        ({"epochs": 8, "batch_size": 16, "seed": 3}, r"batch_size: 8 -> 16\n  seed: 0 -> 3"),
        ({"epochs": 8, "schedule_epochs": 8}, "schedule_epochs: None -> 8"),
        ({"epochs": 8, "learning_rate_schedule": "cosine", "cooldown_epochs": None}, "'constant' -> 'cosine'"),
        ({"epochs": 1}, r"no checkpoint up to step 4 is left in .* \(there are 6, 12, 18, 19, 24\).*has --epochs 2;"),
        ({"epochs": 8, "data": "shapes:40"}, "does not hold the images that .* was trained on"),
    ],
)
def test_what_no_branch_may_change(parent, tmp_path, changes, said):
    values = {"data": CONSTANT["data"], "precision": "float32", "device": "cpu", "workers": 0} | changes
    with pytest.raises(InputError, match=said):
        pretrain(values.pop("data"), tmp_path / "branch", branch_from=parent, **values)


@pytest.mark.parametrize("resume", ["auto", "restart"])
def test_a_branch_never_grows_in_the_folder_of_its_trunk(parent, tmp_path, resume):
    (tmp_path / "same").symlink_to(parent)
    before = steps(parent)
    with pytest.raises(InputError, match="branch_from: a branch needs a folder of its own"):
        branch(parent, tmp_path / "same", epochs=5, resume=resume)
    assert steps(parent) == before


def test_figures_up_to_the_branch_go_with_it(tmp_path):
    changes = {"figures": True, "num_figure_images": 1, "checkpoint_steps": 8}
    run(tmp_path / "parent", **changes)
    branch(tmp_path / "parent", tmp_path / "longer", epochs=5, checkpoint_steps=8)
    drawn = {
        name: sorted(int(file.stem[-8:]) for file in (tmp_path / name / "figures").iterdir())
        for name in ("parent", "longer")
    }
    assert drawn == {"parent": [0, 8, 16, 19, 24], "longer": [0, 8, 16, 19, 24, 30]}


def test_a_falling_learning_rate_cannot_be_branched_off(tmp_path):
    run(tmp_path / "cosine", learning_rate_schedule="cosine", epochs=1)
    with pytest.raises(InputError, match=r"branch_from: the learning rate of .* falls .*--init-from"):
        branch(tmp_path / "cosine", tmp_path / "longer", epochs=2)
    with pytest.raises(InputError, match=r"branch_from: .* holds no run"):
        branch(tmp_path / "nothing", tmp_path / "longer", epochs=2)


def test_where_a_run_can_be_branched_off():
    schedule = resolve_schedule(OptimisationConfig(epochs=10, batch_size=10, learning_rate_schedule="constant"), 105)
    assert (schedule.total_steps, schedule.cooldown_steps) == (100, 20)
    assert schedule.branching_step == 80
    assert resolve_schedule(OptimisationConfig(epochs=10, batch_size=10), 105).branching_step is None


def test_ramps_of_another_length():
    fields = {"batch_size": 10, "learning_rate_schedule": "constant"}
    short = resolve_schedule(OptimisationConfig(epochs=10, **fields), 100)
    long = resolve_schedule(OptimisationConfig(epochs=30, schedule_epochs=10, **fields), 100)
    assert (long.warmup_steps, long.ema, long.ramp_steps) == (short.warmup_steps, short.ema, short.total_steps)
    assert (long.total_steps, long.cooldown_steps) == (300, 60)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"learning_rate_schedule": "constant", "cooldown_epochs": 9.5},
            "cooldown_epochs: must begin after the warm-up",
        ),
        ({"cooldown_epochs": 2}, "cooldown_epochs: goes with learning_rate_schedule 'constant'"),
        ({"schedule_epochs": 1000}, "epochs: must be longer than the warm-up of 1000 steps"),
    ],
)
def test_schedules_that_do_not_fit(fields, said):
    with pytest.raises(InputError, match=said):
        resolve_schedule(with_fields(Config(), {"epochs": 10, "batch_size": 10, **fields}).optimisation, 100)
