"""Whoever waits for another process says so and leaves in the end; processes that see different things never begin."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hardpatch.runtime.errors import InputError
from hardpatch.runtime.waiting import LIMIT, _doing, wait_limit, watched_by
from tiny import TINY, flags, in_child

EXCHANGE = """
import os, signal, sys, time
import torch
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import InputError, Interrupted
from hardpatch.runtime.waiting import note_kept
note_kept("step_7.pt")
try:
    with distributed.process_group(torch.device("cpu")):
        distributed.barrier()
        if os.environ["RANK"] == "1":
            {second}
        distributed.barrier()
except Interrupted as error:
    print(error, file=sys.stderr)
    sys.exit(3)
except InputError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


def two(commands: list[list[str]], *, environment=None, seconds: float = 300) -> list[tuple[int, str]]:
    """Run two processes of one group; exit code and standard error of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for rank, command in enumerate(commands):
        about = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        started.append(subprocess.Popen(
            [sys.executable, *command], env=os.environ | about | (environment or {}), stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL, text=True,
        ))  # fmt: skip
    ended = time.monotonic() + seconds
    found = []
    for process in started:
        try:
            said = process.communicate(timeout=max(1, ended - time.monotonic()))[1]
        except subprocess.TimeoutExpired:  # paused, and given up by the other
            process.send_signal(signal.SIGKILL)
            said = process.communicate()[1]
        found.append((process.returncode, " ".join(said.split())))
    return found


def be_one(rank: int, port: int, words: list[str], said: str) -> None:
    """Run a command as one of two processes; what it says goes to a file."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
    }  # fmt: skip
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    from hardpatch.cli import main

    main(words)


def two_commands(folder: Path, commands: list[list[str]]) -> list[tuple[int, str]]:
    """Run a command in two processes that have imported hardpatch already; exit code and standard error of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    files = [folder / f"said{rank}" for rank in range(2)]
    processes = [in_child(be_one, rank, port, words, str(files[rank])) for rank, words in enumerate(commands)]
    for process in processes:
        process.join(300)
    return [(p.exitcode, " ".join(file.read_text().split())) for p, file in zip(processes, files, strict=True)]


def exchange(second: str, minutes: float, *, seconds: float = 300) -> list[tuple[int, str]]:
    return two([["-c", EXCHANGE.format(second=second)]] * 2, environment={LIMIT: str(minutes)}, seconds=seconds)


@pytest.mark.parametrize("given", ["ten", "0", "-3", "nan", "inf", ""])
def test_a_limit_that_is_none_is_refused(monkeypatch, given):
    monkeypatch.setenv(LIMIT, given)
    with pytest.raises(InputError, match=f"{LIMIT}: must be a positive number of minutes, got '{given}'"):
        wait_limit()


@pytest.mark.parametrize("size", [2, 32, 33, 1000])
def test_every_process_is_looked_at_by_the_main_one_and_by_others(size):
    watched = {rank: watched_by(rank, size) for rank in range(size)}
    assert watched[0] == list(range(1, size))
    assert all(0 in watched[rank] and rank not in watched[rank] for rank in range(1, size))
    assert all(sum(rank in seen for seen in watched.values()) >= min(8, size - 1) for rank in range(size))
    assert sum(map(len, watched.values())) <= 32 * size


@pytest.mark.slow
def test_a_paused_process_is_named_and_given_up():
    (code, said), _ = exchange("os.kill(os.getpid(), signal.SIGSTOP)", 0.2, seconds=60)
    assert code == 3
    assert f"waiting for rank 1 on {socket.gethostname()}: no sign of life since " in said
    assert "given up after 0.2 minutes" in said
    assert "The last checkpoint is step_7.pt; the same command goes on" in said


@pytest.mark.slow
def test_a_process_that_works_is_waited_for_beyond_the_limit_and_named():
    (code, said), (other, _) = exchange("time.sleep(15)", 0.1)
    assert [code, other] == [0, 0]
    assert f"waiting for rank 1 on {socket.gethostname()} (alive, in its own code) since " in said


def test_what_a_process_is_doing_is_never_that_it_says_so():
    assert _doing() == "its own code"


def test_a_killed_process_ends_the_other_with_the_code_of_a_run_that_can_go_on():
    (code, said), _ = exchange("os.kill(os.getpid(), signal.SIGKILL)", 10)
    assert code == 3
    assert "another process has gone" in said
    assert "the last checkpoint is step_7.pt" in said


def test_a_process_that_never_comes_is_not_waited_for_for_ever():
    (code, said), _ = two(
        [["-c", EXCHANGE.format(second="pass")], ["-c", "pass"]], environment={LIMIT: "0.1"}, seconds=60
    )
    assert code == 3
    assert "not all 2 processes have come to localhost:" in said


SIBLINGS = {
    "fewer images": ({"data": "shapes:47"}, "images: 48 images"),
    "other images": ({"data": "shapes:48@1"}, "images: 48 images"),
    "another config": ({"mask_ratio": 0.5}, "mask_ratio: 0.75 on rank 0"),
    "another mean": ({"mean": (0.1, 0.2, 0.3), "std": (0.2, 0.2, 0.2)}, "mean: "),
    "no images": ({"data": "/no/such/folder"}, "'/no/such/folder' does not exist"),
}


@pytest.mark.parametrize("name", SIBLINGS)
def test_processes_that_do_not_see_the_same_are_refused_before_the_first_step(tmp_path, name):
    given, named = SIBLINGS[name]
    start = ["pretrain", "--recipe", "hpm", "--out", str(tmp_path / "run")]
    found = two_commands(tmp_path, [[*start, *flags(TINY)], [*start, *flags(TINY | given)]])
    assert [code for code, _ in found] == [2, 2]
    assert all(named in said and "rank 1" in said for _, said in found)
    assert not (tmp_path / "run").exists()


def test_a_start_of_two_processes_warns_of_nothing(tmp_path):
    command = [
        "-m",
        "hardpatch",
        "pretrain",
        "--recipe",
        "hpm",
        "--out",
        str(tmp_path / "run"),
        *flags(TINY | {"epochs": 1}),
    ]
    found = two([command, command])
    assert [code for code, _ in found] == [0, 0]
    assert not any("arning" in said for _, said in found), "of buffers, or of the strides of gradients"


def test_versions_are_compared(tmp_path):
    other = EXCHANGE.format(second="pass").replace(
        "try:", "distributed.version = lambda name: '0.0' if name == 'timm' else '1'\ntry:"
    )
    one = other.replace("'0.0' if", "'9.9' if")
    found = two([["-c", one], ["-c", other]])
    assert [code for code, _ in found] == [2, 2]
    assert "timm: 9.9 on rank 0" in found[0][1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    from tiny import pretrain

    out = tmp_path_factory.mktemp("trained") / "run"
    pretrain(out=out, **(TINY | {"epochs": 1}))
    return out


@pytest.mark.parametrize("name", ["embed", "knn", "finetune"])
def test_other_commands_refuse_likewise(tmp_path, trained, name):
    command = {
        "embed": ["embed", "--out", str(tmp_path / "a.npz"), "--data"],
        "knn": ["evaluate", "knn", "--val", "shapes:16@1", "--k", "5", "--train"],
        "finetune": ["evaluate", "finetune", "--val", "shapes:16@1", "--out", str(tmp_path / "f"), "--epochs", "1",
                     "--batch-size", "8", "--workers", "0", "--train"],
    }[name]  # fmt: skip
    given = ["--checkpoint", str(trained), "--device", "cpu"]
    found = two_commands(tmp_path, [[*command, "shapes:24", *given], [*command, "shapes:23", *given]])
    assert [code for code, _ in found] == [2, 2], found
    assert "24 images" in found[0][1]
    assert "23 images" in found[0][1]
