"""hardpatch doctor says what is wrong with a machine, and never anything that is not."""

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest

from hardpatch.cli import main
from hardpatch.config.commands import DoctorConfig
from hardpatch.tools.doctor import Finding, surroundings, trials
from hardpatch.tools.doctor.examine import examine, summary, try_apart
from places import ROOT

Usage = namedtuple("Usage", "total used free")
QUICK = {"processors", "shared memory", "settings", "disk"}


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
    assert seen["images"]["found"].startswith("40, about 224x224 px, 8 classes; ")
    assert "no problems" in printed
    assert "next:  hardpatch plan --data shapes:40" in printed
    assert not any(tmp_path.iterdir()), "it left something behind"


def test_a_problem_leaves_with_2_and_says_what_to_do(tmp_path, capsys, monkeypatch):
    def at_once(trial, *arguments, seconds):
        if trial in ("disk", "images"):
            return trials.findings_of(trial, *arguments)
        return [Finding("training step" if trial == "device" else trial, "ok", "")]

    monkeypatch.setattr("hardpatch.tools.doctor.examine.try_apart", at_once)
    with pytest.raises(SystemExit) as left:
        main(["doctor", "--device", "cpu", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert left.value.code == 2
    assert "!!  images: data: " in printed
    assert "1 problem," in printed
    assert "run hardpatch doctor again" in printed


def test_nothing_that_needs_torch_is_tried_where_it_is_broken(monkeypatch):
    broken = Finding("device", "problem", "ImportError: libcudart.so")
    monkeypatch.setattr("hardpatch.tools.doctor.examine.try_apart", lambda trial, *_, seconds: [broken])
    seen = states(examine(DoctorConfig(device="cpu", data="shapes:8")))
    assert seen["device"] == "problem"
    assert not seen.keys() & {"data processes", "images"}


def test_it_works_where_what_it_needs_is_missing(tmp_path):
    """Without tyro the flags cannot be read, but what is missing is still named."""
    (tmp_path / "tyro.py").write_text("raise ImportError('no tyro')")
    done = subprocess.run(
        [sys.executable, "-m", "hardpatch", "doctor"], capture_output=True, text=True, timeout=100, check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2
    assert "ok  versions: " in done.stdout
    assert "Traceback" not in done.stderr


# --- packages ------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    """Pretend that packages are installed in these versions and ask for these."""
    versions = {"hardpatch": "1.0", "torch": "2.14.1", "torchvision": "0.29.1", "timm": "1.0.31", "tyro": "1.0"}
    asked = {
        "hardpatch": ["torch>=2.10", "tyro>=0.9", "datasets>=3; extra == 'datasets'"],
        "torchvision": ["torch==2.14.1"],
    }

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", asked.get)
    monkeypatch.setattr(surroundings, "EXTRAS", {"datasets": "hf: sources"})
    return versions


def test_versions_that_match_are_well(installed):
    installed["datasets"] = "5.2.0"
    assert set(states(surroundings.look_at_software()).values()) == {"ok"}


@pytest.mark.parametrize(
    ("name", "version", "told"),
    [
        ("torch", "2.11.0", "torchvision needs torch==2.14.1, here is 2.11.0"),
        ("torch", "2.9.1", "hardpatch needs torch>=2.10, here is 2.9.1"),
        ("tyro", None, "hardpatch needs tyro>=0.9, which is not installed"),
    ],
)
def test_packages_that_do_not_match_are_named(installed, name, version, told):
    installed.pop(name)
    if version:
        installed[name] = version
    seen = {finding.about: finding for finding in surroundings.look_at_software()}
    assert seen["packages"].state == "problem"
    assert told in seen["packages"].found


def test_a_local_build_of_torch_matches(installed):
    installed |= {"torch": "2.14.1+cu130", "datasets": "5.2.0"}
    assert set(states(surroundings.look_at_software()).values()) == {"ok"}


def test_a_build_between_two_releases_counts_as_the_release(installed):
    """NVIDIA's containers have torch 2.14.1a0+somewhat."""
    installed |= {"torch": "2.14.1a0+5228986c39.nv25.06", "datasets": "5.2.0"}
    assert states(surroundings.look_at_software())["packages"] == "ok"


def test_without_an_installation_nothing_is_said_to_be_well(installed):
    installed.pop("hardpatch")
    seen = {finding.about: finding for finding in surroundings.look_at_software()}
    assert seen.keys() == {"versions", "packages"}
    assert seen["packages"].state == "problem"


def test_optional_packages_come_with_how_to_get_them(installed):
    seen = {finding.about: finding for finding in surroundings.look_at_software()}
    found = seen["optional packages"]
    assert (found.state, found.found) == ("note", "not installed, or too old: datasets")
    assert "hf: sources: pip install" in found.advice


def test_every_extra_is_explained():
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    assert surroundings.EXTRAS.keys() == declared - {"test", "dev"}


# --- machine -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cores(monkeypatch):
    def pretend(machine, usable, quota=None):
        monkeypatch.setattr(os, "cpu_count", lambda: machine)
        monkeypatch.setattr(surroundings, "usable_cores", lambda: usable)
        monkeypatch.setattr(surroundings, "processor_quota", lambda: quota)

    return pretend


@pytest.mark.parametrize(
    ("machine", "environment", "state", "told"),
    [
        ((16, 16), {}, "ok", "16 cores"),
        ((16, 8), {}, "ok", "8 of 16 cores"),
        ((64, 4, 4.0), {}, "warning", "4 of 64 cores"),
        ((64, 4, 4.0), {"OMP_NUM_THREADS": "4"}, "ok", "4 of 64 cores"),  # what it was told to do
        ((16, 16), {"OMP_NUM_THREADS": "1"}, "note", "16 cores, OMP_NUM_THREADS=1"),
        ((16, 16), {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "8"}, "ok", "16 cores"),  # as torchrun sets it
        ((2, 2), {}, "note", "2 cores"),
    ],
)
def test_processors(cores, machine, environment, state, told):
    cores(*machine)
    found = surroundings.look_at_processors(environment)
    assert (found.state, found.found.split(", by")[0]) == (state, told)


def test_a_quota_is_what_to_set(cores):
    cores(64, 5, 4.5)
    assert surroundings.look_at_processors({}).advice == "set OMP_NUM_THREADS=5"
    assert surroundings.look_at_processors({"LOCAL_WORLD_SIZE": "2"}).advice == "set OMP_NUM_THREADS=2"


def test_tasks_of_a_job_that_do_not_know_each_other():
    (found,) = surroundings.look_at_launch({"SLURM_NTASKS": "8"})
    assert found.state == "warning"
    assert not list(surroundings.look_at_launch({"SLURM_NTASKS": "8", "RANK": "0"}))
    assert not list(surroundings.look_at_launch({"SLURM_NTASKS": "1"}))


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
    (found,) = surroundings.look_at_folder(str(tmp_path / "runs" / "deep"))
    assert found.state == state


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(surroundings, "_write", full)
    (found,) = surroundings.look_at_folder(str(tmp_path))
    assert (found.state, found.about) == ("problem", "disk")
    assert "No space left" in found.found
    file = tmp_path / "file"
    file.touch()
    monkeypatch.undo()
    (found,) = surroundings.look_at_folder(str(file / "runs"))
    assert found.state == "problem"


def test_odd_folders_are_one_clear_finding(tmp_path):
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for out in ("~nobody-of-this-name/runs", str(tmp_path / "nowhere")):
        (found,) = surroundings.look_at_folder(out)
        assert (found.state, found.about) == ("problem", "disk"), out
        assert out in found.found


def test_sizes_of_checkpoints():
    import torch

    from hardpatch.config.recipes import recipe
    from hardpatch.runs.build import build_student

    with torch.device("meta"):
        for model, scale in (("ViT-B", ""), ("ViT-L", "-large")):
            student = build_student(recipe(f"hpm-norm-pix{scale}"))
            size = 16 * sum(p.numel() for p in student.parameters())
            assert size == pytest.approx(surroundings.CHECKPOINT_BYTES[model], rel=0.03), model


# --- what is tried apart -------------------------------------------------------------------------------------------


def test_a_trial_that_hangs_is_ended():
    (found,) = try_apart("data processes", seconds=0.05)
    assert (found.state, found.found) == ("problem", "not done after 0.05 s")


@pytest.mark.parametrize(
    ("script", "told", "advice"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV: without a word", "all of it"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL: without a word", "memory"),
        ("raise SystemExit('no')", "failed: no", "hardpatch.tools.doctor.trials device cpu"),
        ("print('[]x')", "failed: without a word", "see all of it"),
    ],
)  # fmt: skip
def test_a_trial_that_dies_says_how(tmp_path, monkeypatch, script, told, advice):
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{script}"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    (found,) = try_apart("device", "cpu", seconds=60)
    assert (found.state, found.found) == ("problem", told)
    assert advice in found.advice


def test_a_trial_that_hangs_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\nsleep 600 &\necho $! >{tmp_path}/pid\nwait\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    (found,) = try_apart("device", "cpu", seconds=1)
    assert found.found == "not done after 1 s"
    until = time.monotonic() + 5
    while time.monotonic() < until and _runs(int((tmp_path / "pid").read_text())):
        time.sleep(0.05)
    assert not _runs(int((tmp_path / "pid").read_text()))


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_what_was_found_before_an_error_is_kept(monkeypatch):
    def breaks():
        yield Finding("device", "ok", "NVIDIA B300")
        raise RuntimeError("CUDA error: no kernel image is available for execution\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setitem(trials.TRIALS, "device", breaks)
    first, last = trials.findings_of("device")
    assert first == Finding("device", "ok", "NVIDIA B300")
    assert last.found == "RuntimeError: CUDA error: no kernel image is available for execution"
    assert "not built for this GPU" in last.advice


def test_modules_of_the_current_folder_are_not_taken_for_installed_ones(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise RuntimeError('somebody else')")
    monkeypatch.chdir(tmp_path)
    (found,) = try_apart("disk", str(tmp_path), seconds=60)
    assert found.state != "problem", found


def test_a_device_that_is_not_there_is_one_clear_finding():
    (found,) = try_apart("device", "mps", seconds=100)
    assert found.state == "problem"
    assert found.found.startswith("device: 'mps' is not available here")


GOOD = trials.Step(1.98, 1.5, 1.91)


@pytest.mark.parametrize(
    "changes", [{"loss": 1.9806}, {"gradient_norm": 1.51}, {"next_loss": 1.92}, {"loss": float("nan")}]
)
def test_a_step_that_computes_something_else_is_a_problem(monkeypatch, changes):
    import torch

    steps = iter([GOOD, GOOD._replace(**changes)])
    monkeypatch.setattr(trials, "take_step", lambda *_, **__: next(steps))
    found = trials._try_step(torch.device("cpu"))
    assert found.state == "problem"
    assert "loss 1.98," in found.found


@pytest.mark.parametrize("broken", ["linear backward", "random attention", "no attention", "no optimizer"])
def test_faults_of_a_device_show_in_the_step(monkeypatch, broken):
    """On the CPU, which stands for the device in every other call."""
    import torch
    import torch.nn.functional as F

    from hardpatch.runs import build

    device = torch.device("cpu")
    expected = trials.take_step(device)
    if broken == "linear backward":
        linear = F.linear
        monkeypatch.setattr(F, "linear", lambda x, w, b=None: linear(x.detach(), w.detach(), b))
    elif broken == "no optimizer":
        make = build.build_optimizer

        def lazy(*arguments):
            optimizer = make(*arguments)
            optimizer.step = lambda: None
            return optimizer

        monkeypatch.setattr(build, "build_optimizer", lazy)
    else:
        change = torch.randn_like if broken == "random attention" else torch.zeros_like
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: change(v))
        monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: change(x))
    found = trials.take_step(device)
    assert found.differs_from(expected, bf16=True)


def test_bf16_that_goes_wrong_is_a_problem(monkeypatch):
    import torch

    monkeypatch.setattr("hardpatch.runtime.distributed.has_bf16", lambda _: True)
    wrong = GOOD._replace(loss=float("nan"))
    monkeypatch.setattr(trials, "take_step", lambda *_, bf16=False, **__: wrong if bf16 else GOOD)
    found = trials._try_step(torch.device("cpu"))
    assert (found.state, found.advice) == ("problem", "bf16 goes wrong here: give --precision float32")


def test_a_compiler_that_fails_is_a_finding(monkeypatch):
    def fails(*_, compiled=False, **__):
        if compiled:
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore")
        return GOOD

    monkeypatch.setattr(trials, "take_step", fails)
    (found,) = trials.try_compilation("cpu")
    assert found.state == "problem"
    assert found.found == "torch.compile fails: InvalidCxxCompiler: No working C++ compiler found"
    assert "--compile off" in found.advice


def test_compiled_blocks_are_held_against_the_others(monkeypatch):
    other = GOOD._replace(loss=2.5)
    monkeypatch.setattr(trials, "take_step", lambda *_, compiled=False, **__: other if compiled else GOOD)
    assert next(trials.try_compilation("cpu")).state == "problem"


def test_damaged_images_are_counted(tmp_path):
    from PIL import Image

    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot an image")
    (found,) = trials.try_images(str(tmp_path))
    assert found.state == "warning"
    assert found.found.startswith("4, about 8x8 px, no labels; ")
    assert "1 of 4 damaged, the first: " in found.found
    assert "broken.png" in found.found
    assert "hardpatch data check" in found.advice
    for number in range(3):
        (tmp_path / f"{number}.png").unlink()
    (found,) = trials.try_images(str(tmp_path))
    assert found.state == "problem"
    assert found.found.startswith("data: no image of 1 can be read")


def test_images_of_other_channels_are_well(tmp_path):
    import numpy as np

    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.zeros((5, 16, 16), np.uint8))
    (found,) = trials.try_images(str(tmp_path))
    assert (found.state, found.advice) == ("note", "give --channels 5 to hardpatch pretrain")


def together(*words, **environment):
    command = (
        f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 -m hardpatch doctor --device cpu"
    )
    return subprocess.run(
        [*command.split(), *words], capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_processes_see_each_other(tmp_path):
    done = together("--out", str(tmp_path), "--json", CUDA_LAUNCH_BLOCKING="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next:") == 1
    checks = json.loads(done.stdout.splitlines()[-1])["checks"]
    seen = {check["about"]: check for check in checks}
    assert seen["processes"]["state"] == "ok"
    assert seen["processes"]["found"].startswith("2, all with Python ")
    assert "64 MiB summed over 2 processes" in seen["exchange"]["found"]
    assert seen["settings, process 1"]["state"] == "warning"
    assert sum(check["about"].startswith("disk") for check in checks) == 1  # one of a machine looks at the machine


def test_a_process_that_is_alone_says_so(monkeypatch):
    """The others have not come: told after the time that was given, not after half an hour."""
    from hardpatch.tools.doctor.processes import look_at_processes

    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29811"}.items():
        monkeypatch.setenv(name, value)
    start = time.monotonic()
    (found,) = look_at_processes(DoctorConfig(device="cpu", seconds=2), [])
    assert time.monotonic() - start < 60
    assert found.state == "problem"
    assert found.found.startswith("process 0 did not find the others: ")


def test_processes_that_are_not_alike():
    from hardpatch.tools.doctor.processes import compare

    first = {"torch": "2.14.1", "device": "NVIDIA H200"}
    (found,) = compare([first, first, {**first, "torch": "2.11.0"}])
    assert found.state == "problem"
    assert "torch: 2.14.1 on 2 (process 0 first), 2.11.0 on 1 (process 2 first)" in found.found
    (found,) = compare([first, {**first, "device": "NVIDIA A100"}])
    assert found.state == "warning"


def test_summary_counts():
    found = [Finding("a", "ok", ""), Finding("b", "warning", ""), Finding("c", "problem", ""), Finding("d", "note", "")]
    assert {key: summary(found)[key] for key in ("problems", "warnings", "notes")} == {
        "problems": 1, "warnings": 1, "notes": 1,
    }  # fmt: skip
