"""hpm doctor says what is wrong with a machine, and never anything that is not."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from importlib import metadata

import pytest

from hpm.cli import main
from hpm.doctor import software, surroundings, trials
from hpm.doctor.config import DoctorConfig
from hpm.doctor.examine import examine, summary, try_apart
from hpm.doctor.findings import Finding

Usage = namedtuple("Usage", "total used free")
QUICK = {"processors", "shared memory", "open files", "settings", "disk"}


def states(findings):
    return {finding.about: finding.state for finding in findings}


def test_command_looks_at_everything_and_ends_well(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    out = tmp_path / "runs"
    with pytest.raises(SystemExit) as left:
        main(["doctor", "--device", "cpu", "--data", "shapes:40", "--out", str(out), "--json"])
    printed = capsys.readouterr().out
    assert left.value.code == 0, printed
    figures = json.loads(printed.splitlines()[-1])
    seen = {check["about"]: check for check in figures["checks"]}
    assert seen.keys() == QUICK | {
        "versions", "packages", "optional packages", "device", "training step", "memory", "data processes", "images",
    }  # fmt: skip
    assert figures["problems"] == 0
    assert f"torch {metadata.version('torch')}" in seen["versions"]["found"]
    assert "40, 8 classes; 40 read whole" in seen["images"]["found"]
    assert "no problems" in printed
    assert "next:  hpm plan --data shapes:40" in printed
    assert not any(tmp_path.iterdir()), "it left something behind"


def test_a_problem_leaves_with_2_and_says_what_to_do(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["doctor", "--device", "cpu", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert left.value.code == 2
    assert "!!  images: data: " in printed
    assert "1 problem," in printed
    assert "run hpm doctor again" in printed


def test_nothing_that_needs_torch_is_tried_where_it_is_broken(monkeypatch):
    broken = Finding("device", "problem", "failed: ImportError: libcudart.so")
    monkeypatch.setattr("hpm.doctor.examine.try_apart", lambda trial, *_, seconds: [broken])
    seen = states(examine(DoctorConfig(device="cpu", data="shapes:8")))
    assert seen["device"] == "problem"
    assert not seen.keys() & {"memory", "data processes", "images"}


# --- packages ------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    """Pretend that packages are installed in these versions and ask for these."""
    versions = {"hpm": "1.0", "torch": "2.14.1", "torchvision": "0.29.1", "timm": "1.0.31", "tyro": "1.0"}
    asked = {"hpm": ["torch>=2.10", "tyro>=0.9", "datasets>=3; extra == 'datasets'"], "torchvision": ["torch==2.14.1"]}

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", asked.get)
    monkeypatch.setattr(software, "EXTRAS", {"datasets": "hf: sources"})
    return versions


def test_versions_that_match_are_well(installed):
    installed["datasets"] = "5.2.0"
    assert set(states(software.look_at_software()).values()) == {"ok"}


@pytest.mark.parametrize(
    ("name", "version", "told"),
    [
        ("torch", "2.11.0", "torchvision needs torch==2.14.1, here is 2.11.0"),
        ("torch", "2.9.1", "hpm needs torch>=2.10, here is 2.9.1"),
        ("tyro", None, "hpm needs tyro>=0.9, which is not installed"),
    ],
)
def test_packages_that_do_not_match_are_named(installed, name, version, told):
    installed.pop(name)
    if version:
        installed[name] = version
    seen = {finding.about: finding for finding in software.look_at_software()}
    assert seen["packages"].state == "problem"
    assert told in seen["packages"].found


def test_a_local_build_of_torch_matches(installed):
    installed |= {"torch": "2.14.1+cu130", "datasets": "5.2.0"}
    assert set(states(software.look_at_software()).values()) == {"ok"}


def test_optional_packages_come_with_how_to_get_them(installed):
    seen = {finding.about: finding for finding in software.look_at_software()}
    found = seen["optional packages"]
    assert (found.state, found.found) == ("note", "not installed, or too old: datasets")
    assert "hf: sources: pip install" in found.advice


def test_every_extra_of_hpm_is_explained():
    declared = set(metadata.metadata("hpm").get_all("Provides-Extra"))
    assert software.EXTRAS.keys() == declared - {"test", "dev"}


# --- machine -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cores(monkeypatch):
    def pretend(machine, allowed, quota=None):
        monkeypatch.setattr(os, "cpu_count", lambda: machine)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)
        monkeypatch.setattr(surroundings, "processor_quota", lambda: quota)

    return pretend


@pytest.mark.parametrize(
    ("machine", "environment", "state", "told"),
    [
        ((16, 16), {}, "ok", "16 cores"),
        ((16, 8), {}, "ok", "8 of 16 cores"),
        ((64, 64, 4.0), {}, "warning", "4 of 64 cores"),
        ((16, 16), {"OMP_NUM_THREADS": "1"}, "note", "16 cores, OMP_NUM_THREADS=1"),
        ((16, 16), {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "8"}, "ok", "16 cores"),  # as torchrun sets it
        ((2, 2), {}, "note", "2 cores"),
    ],
)
def test_processors(cores, machine, environment, state, told):
    cores(*machine)
    found = surroundings.look_at_processors(environment)
    assert (found.state, found.found.split(" by")[0]) == (state, told)


def test_a_quota_is_what_to_set(cores):
    cores(64, 64, 4.5)
    assert "OMP_NUM_THREADS=4 and give --workers 3" in surroundings.look_at_processors({}).advice


@pytest.mark.parametrize(("free", "state"), [(64 * 2**20, "warning"), (2**30, "ok")])
def test_little_shared_memory_is_told(monkeypatch, tmp_path, free, state):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2 * free, free, free))
    assert surroundings.look_at_shared_memory(tmp_path).state == state


def test_memory():
    assert surroundings.look_at_memory(3 * 2**30).state == "warning"
    assert surroundings.look_at_memory(16 * 2**30) == Finding("memory", "ok", "16.0 GiB free")


def test_settings_left_over_from_debugging():
    (found,) = surroundings.look_at_settings({"CUDA_LAUNCH_BLOCKING": "1", "CUDA_VISIBLE_DEVICES": "0"})
    assert (found.state, found.advice) == ("warning", "unset CUDA_LAUNCH_BLOCKING")
    (found,) = surroundings.look_at_settings({"CUDA_LAUNCH_BLOCKING": "0", "CUDA_VISIBLE_DEVICES": "0"})
    assert (found.state, found.found) == ("ok", "CUDA_VISIBLE_DEVICES=0")


@pytest.mark.parametrize(
    ("free", "seconds", "state"), [(100 * 2**30, 0.1, "ok"), (2**30, 0.1, "warning"), (100 * 2**30, 10, "warning")]
)
def test_room_and_speed_of_the_disk(monkeypatch, tmp_path, free, seconds, state):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2 * free, free, free))
    monkeypatch.setattr(surroundings, "_write", lambda _: seconds)
    assert surroundings.look_at_folder(str(tmp_path / "runs" / "deep")).state == state


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(surroundings, "_write", full)
    found = surroundings.look_at_folder(str(tmp_path))
    assert (found.state, found.about) == ("problem", "disk")
    assert "No space left" in found.found
    file = tmp_path / "file"
    file.touch()
    monkeypatch.undo()
    assert surroundings.look_at_folder(str(file / "runs")).state == "problem"


def test_what_the_texts_say_of_checkpoints():
    """Student, teacher and two moments of AdamW in float32."""
    import torch

    from hpm.build import build_student
    from hpm.recipes import recipe

    with torch.device("meta"):
        for size, gigabytes in (("", 2.2), ("-large", 5.7)):
            student = build_student(recipe(f"hpm-norm-pix{size}"))
            assert 16 * sum(p.numel() for p in student.parameters()) / 1e9 == pytest.approx(gigabytes, abs=0.1)


# --- what is tried apart -------------------------------------------------------------------------------------------


def test_a_trial_that_hangs_is_ended():
    (found,) = try_apart("data processes", seconds=0.05)
    assert (found.state, found.found) == ("problem", "not done after 0.05 s")


@pytest.mark.parametrize(
    ("script", "told", "advice"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGBUS)", "ended by SIGBUS: without a word", "--shm-size"),
        ("raise RuntimeError('operator torchvision::nms is not there')", "failed: RuntimeError: operator", "not match"),
        ("print('[]x')", "failed: without a word", "hpm.doctor.trials"),
    ],
)  # fmt: skip
def test_a_trial_that_dies_says_how(tmp_path, monkeypatch, script, told, advice):
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{script}"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    (found,) = try_apart("device", "cpu", seconds=60)
    assert found.state == "problem"
    assert found.found.startswith(told)
    assert advice in found.advice


def test_a_device_that_is_not_there_is_one_clear_finding():
    (found,) = try_apart("device", "mps", seconds=100)
    assert found.state == "problem"
    assert "device: 'mps' is not available here" in found.found


def test_a_step_that_computes_something_else_is_a_problem(monkeypatch):
    import torch

    losses = iter([1.98, 2.05])
    monkeypatch.setattr(trials, "_loss", lambda *_, **__: next(losses))
    (found,) = trials._try_step(torch.device("cpu"))
    assert found.state == "problem"
    assert "2.05" in found.found
    assert "1.98" in found.found


def test_bf16_that_goes_wrong_is_a_problem(monkeypatch):
    import torch

    monkeypatch.setattr("hpm.distributed.has_bf16", lambda _: True)
    monkeypatch.setattr(trials, "_loss", lambda *_, bf16=False, **__: float("nan") if bf16 else 1.98)
    (found,) = trials._try_step(torch.device("cpu"))
    assert (found.state, found.advice) == ("problem", "bf16 goes wrong here: give --precision float32")


def test_a_compiler_that_fails_is_a_finding(monkeypatch):
    def fails(*_, compiled=False, **__):
        if compiled:
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore")
        return 1.0

    monkeypatch.setattr(trials, "_loss", fails)
    (found,) = trials.try_compilation("cpu")
    assert found.state == "problem"
    assert found.found == "torch.compile fails: InvalidCxxCompiler: No working C++ compiler found"
    assert "--compile off" in found.advice


def test_compiled_blocks_are_held_against_the_others(monkeypatch):
    monkeypatch.setattr(trials, "_loss", lambda *_, compiled=False, **__: 2.0 if compiled else 1.0)
    assert next(trials.try_compilation("cpu")).state == "problem"


def test_damaged_images_are_counted(tmp_path):
    from PIL import Image

    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot an image")
    (found,) = trials.try_images(str(tmp_path))
    assert found.state == "warning"
    assert "4, no labels" in found.found
    assert "1 damaged, the first: " in found.found
    assert "broken.png" in found.found
    assert "hpm data check" in found.advice
    for number in range(3):
        (tmp_path / f"{number}.png").unlink()
    assert next(trials.try_images(str(tmp_path))).state == "problem"


def test_processes_see_each_other(tmp_path):
    command = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 -m hpm doctor --device cpu"
    done = subprocess.run(
        [*command.split(), "--out", str(tmp_path), "--json"], capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_LAUNCH_BLOCKING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next:") == 1
    seen = {check["about"]: check for check in json.loads(done.stdout.splitlines()[-1])["checks"]}
    assert seen["processes"]["state"] == "ok"
    assert seen["processes"]["found"].startswith("2, all with hpm ")
    assert "64 MiB summed over 2 processes" in seen["exchange"]["found"]
    assert seen["settings, process 1"]["state"] == "warning"


def test_processes_that_are_not_alike_are_a_problem():
    from hpm.doctor.processes import _compare

    found = _compare([{"torch": "2.14.1", "device": "NVIDIA H200"}, {"torch": "2.11.0", "device": "NVIDIA H200"}])
    assert found.state == "problem"
    assert "process 1: torch 2.11.0" in found.found


def test_summary_counts():
    found = [Finding("a", "ok", ""), Finding("b", "warning", ""), Finding("c", "problem", ""), Finding("d", "note", "")]
    assert {key: summary(found)[key] for key in ("problems", "warnings", "notes")} == {
        "problems": 1, "warnings": 1, "notes": 1,
    }  # fmt: skip
