"""Killed at any moment, a run ends with the very weights of a run that was not."""

import json
import os
import random
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hardpatch.runs.checkpoint import CheckpointFolder
from hardpatch.runtime.signals import StopSignal
from tiny import TINY, assert_same_state, final_state, in_child, pretrain_in_child

KILLS = int(os.environ.get("HPM_KILLS", "20"))
LONG = TINY | {"epochs": 30, "checkpoint_steps": 3}


def run_whole(out: Path, values: dict) -> int:
    process = in_child(pretrain_in_child, str(out), values)
    process.join(120)
    return process.exitcode


def newest_step(out: Path) -> int:
    return max((int(file.stem.split("_")[1]) for file in (out / "checkpoints").glob("step_*.pt")), default=0)


def test_sigkill_at_random_moments_leaves_no_trace(tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert run_whole(undisturbed, LONG) == 0
    chance = random.Random(0)
    for _ in range(KILLS):
        process = in_child(pretrain_in_child, str(killed), LONG | {"workers": 1})
        goal, deadline = newest_step(killed) + chance.choice([0, 0, 3, 6]), time.monotonic() + 60
        while newest_step(killed) < goal and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        assert process.is_alive(), "finished before it was killed often enough: make the run longer"
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert run_whole(killed, LONG | {"workers": 1}) == 0
    assert_same_state(final_state(undisturbed), final_state(killed))
    losses = [
        [
            (r["step"], r["loss"])
            for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            if "loss" in r
        ]
        for run in (undisturbed, killed)
    ]
    assert [step for step, _ in losses[0]] == [step for step, _ in losses[1]]
    assert not list((killed / "checkpoints").glob(".*.tmp"))


def pretrain_in_a_group_of_its_own(out: str, values: dict) -> None:
    os.setpgrp()
    pretrain_in_child(out, values)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_even_twice_saves_and_leaves_with_code_3(tmp_path, number):
    """Schedulers, torchrun and `timeout` signal the group, data workers too, and repeat themselves."""
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    values = LONG | {"epochs": 10, "workers": 1}
    process = in_child(pretrain_in_a_group_of_its_own, str(out), values)
    while newest_step(out) < 6 and process.is_alive():
        time.sleep(0.002)
    os.killpg(process.pid, number)
    time.sleep(0.01)
    os.killpg(process.pid, number)
    process.join(60)
    assert process.exitcode == 3
    assert 0 < newest_step(out) < 60
    assert run_whole(out, values) == 0
    assert run_whole(whole, values) == 0
    assert_same_state(final_state(whole), final_state(out))


def test_only_a_second_ctrl_c_ends_at_once_and_not_within_a_second(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("hardpatch.runtime.signals.time", SimpleNamespace(monotonic=lambda: now[0]))
    with StopSignal() as stop:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        now[0] = 30.0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(number)
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def fill_the_disk_after_the_first_checkpoint(out: str, values: dict) -> None:
    save = CheckpointFolder.save

    def save_once(folder, state):
        save(folder, state)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    CheckpointFolder.save = save_once
    pretrain_in_child(out, values)


def test_a_full_disk_ends_with_code_2_and_keeps_the_last_checkpoint(tmp_path):
    process = in_child(fill_the_disk_after_the_first_checkpoint, str(tmp_path / "run"), LONG)
    process.join(60)
    assert process.exitcode == 2
    assert newest_step(tmp_path / "run") == 3
    assert not list((tmp_path / "run" / "checkpoints").glob(".*.tmp"))
    assert run_whole(tmp_path / "run", LONG) == 0, "the run goes on once there is room"
