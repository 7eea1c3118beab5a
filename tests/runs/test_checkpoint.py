"""Checkpoints: what is loaded is what was saved, and a bad moment costs one checkpoint at most."""

import errno
import hashlib
import os
import pickle
import resource
import shutil
import signal
import stat

import numpy as np
import pytest
import torch
from safetensors import safe_open

from hardpatch.runs.checkpoint import CheckpointFolder, CheckpointWarning, load_verified, save_weights
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.files import write_text_atomically


def state(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "step": step,
        "student": {"weight": torch.randn(50, 20, generator=generator)},
        "config": {"epochs": 3},
    }


def folder_with(path, *steps, **options):
    folder = CheckpointFolder(path / "checkpoints", **options)
    for step in steps:
        folder.save(state(step))
    return folder


def names(folder):
    return sorted(file.name for file in folder.path.iterdir())


def test_what_is_loaded_is_what_was_saved(tmp_path):
    folder = folder_with(tmp_path, 5, 10)
    loaded = folder.load_latest()
    assert loaded["step"] == 10
    assert loaded["config"] == {"epochs": 3}
    assert torch.equal(loaded["student"]["weight"], state(10)["student"]["weight"])
    assert load_verified(folder.file(5))["step"] == 5


def test_new_folder_holds_no_checkpoint(tmp_path):
    assert folder_with(tmp_path).load_latest() is None


def test_only_the_newest_and_the_chosen_steps_are_kept(tmp_path):
    folder = folder_with(tmp_path, *range(1, 11), keep_last=2, keep_steps=4)
    assert folder.steps() == [4, 8, 9, 10]
    files = [f"step_{step:08d}.pt" for step in (4, 8, 9, 10)]
    assert names(folder) == sorted([*files, *(f"{name}.sha256" for name in files), "last"])


def test_last_links_to_the_newest_within_a_folder_that_can_be_moved(tmp_path):
    folder = folder_with(tmp_path, 1, 2)
    assert (folder.path / "last").readlink().as_posix() == "step_00000002.pt"
    folder.save(state(3))
    moved = tmp_path / "moved"
    folder.path.rename(moved)
    assert load_verified((moved / "last").resolve())["step"] == 3


def test_checksum_is_what_sha256sum_writes(tmp_path):
    file = folder_with(tmp_path, 1).file(1)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert file.with_name(file.name + ".sha256").read_text() == f"{digest}  {file.name}\n"


@pytest.mark.parametrize("number", range(20))
def test_damaged_newest_is_passed_over_with_a_warning(tmp_path, number):
    folder = folder_with(tmp_path, 1, 2)
    random, newest = np.random.default_rng(number), folder.file(2)
    content = bytearray(newest.read_bytes())
    if number % 2:
        content = content[: random.integers(len(content))]
    else:
        content[random.integers(len(content))] ^= int(random.integers(1, 256))
    newest.write_bytes(content)
    with pytest.warns(CheckpointWarning, match="step_00000002.*checksum does not fit"):
        assert folder.load_latest()["step"] == 1


def test_checkpoint_without_or_with_damaged_checksum_is_passed_over(tmp_path):
    folder = folder_with(tmp_path, 1, 2, 3)
    folder.file(3).with_name("step_00000003.pt.sha256").unlink()
    folder.file(2).with_name("step_00000002.pt.sha256").write_bytes(b"\xff\x00")
    with pytest.warns(CheckpointWarning) as warned:
        assert folder.load_latest()["step"] == 1
    assert len(warned) == 2


def test_when_all_are_damaged_nothing_is_loaded_and_each_is_named(tmp_path):
    folder = folder_with(tmp_path, 1, 2)
    for step in (1, 2):
        folder.file(step).write_bytes(b"")
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(InputError, match=r"every checkpoint in .* is damaged") as caught,
    ):
        folder.load_latest()
    assert "step_00000001" in str(caught.value)
    assert "step_00000002" in str(caught.value)


def test_damaged_newer_checkpoint_does_not_cost_the_one_just_saved(tmp_path):
    """After falling back to step 10 the run goes on below the damaged step 30."""
    folder = folder_with(tmp_path, 10, 30, keep_last=2)
    folder.keep_last = 1
    folder.file(30).write_bytes(b"damaged")
    folder.save(state(20))
    assert load_verified((folder.path / "last").resolve())["step"] == 20
    assert load_verified(folder.file(20))["step"] == 20


# Writing that fails


def test_full_disk_leaves_earlier_checkpoints_and_no_temporary_file(tmp_path, monkeypatch):
    folder = folder_with(tmp_path, 1, 2)
    before = {name: (folder.path / name).read_bytes() for name in names(folder)}

    def half(state, file):
        file.write(b"half of a checkpoint")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    for step in (2, 3):  # 2: once more, over a good one
        with pytest.raises(OSError, match="No space"):
            folder.save(state(step))
    assert {name: (folder.path / name).read_bytes() for name in names(folder)} == before


def test_failed_flush_while_saving_a_step_again_leaves_the_old_one_loadable(tmp_path, monkeypatch):
    """Some file systems report a full disk only at fsync, after the checksum was computed."""
    folder = folder_with(tmp_path, 1)
    flush = os.fsync

    def full(descriptor):
        if (
            stat.S_ISREG((status := os.fstat(descriptor)).st_mode) and status.st_size > 1000
        ):  # the checkpoint, not its checksum
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        folder.save({**state(1), "student": {"weight": torch.zeros(1000)}})
    assert torch.equal(load_verified(folder.file(1))["student"]["weight"], state(1)["student"]["weight"])


@pytest.mark.parametrize("limit", [0, 1000, 60_000])
def test_real_file_size_limit_leaves_earlier_checkpoints(tmp_path, limit):
    """In a child process in which the kernel refuses to write files larger than ``limit`` bytes."""
    folder = folder_with(tmp_path, 1, 2)
    before = names(folder)
    child = os.fork()
    if child == 0:
        outcome = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            folder.save({**state(3), "student": {"weight": torch.zeros(100_000)}})
        except OSError as error:
            outcome = 0 if error.errno == errno.EFBIG else 3
        except BaseException:
            outcome = 2  # not what CheckpointFolder.save promises to raise
        finally:
            os._exit(outcome)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert names(folder) == before
    assert folder.load_latest()["step"] == 2


def test_text_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "config.yaml"
    write_text_atomically(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(file, "new \ud800")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_leftovers_of_a_killed_process_are_cleared_and_nothing_else(tmp_path):
    folder = folder_with(tmp_path, 1, 2)
    before = names(folder)
    (folder.path / ".step_00000003.pt.4711.tmp").write_bytes(b"half")
    (folder.path / ".last.tmp").symlink_to("step_00000003.pt")
    assert folder.steps() == [1, 2]
    assert folder.load_latest()["step"] == 2
    folder.clear_temporary()
    assert names(folder) == before


# Files that are no checkpoints


class Attack:
    """Runs a command when unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, kind):
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    content = {"step": 1, "student": Attack(f"touch {trace}")}
    if kind == "zip":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=r"evil\.pt"):
        load_verified(path, require_checksum=False)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"hello, I am a text file\n", b"\x80\x02", b"PK\x03\x04", b"\x00" * 1000])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "notes.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"notes\.pt"):
        load_verified(path, require_checksum=False)


def test_folders_missing_files_and_other_peoples_checkpoints_are_refused(tmp_path):
    torch.save({"model": {}}, tmp_path / "mae.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, said in (
        ("mae.pt", "no 'student'"),
        ("list.pt", "no 'student'"),
        ("nowhere.pt", "cannot be read"),
    ):
        with pytest.raises(InputError, match=said):
            load_verified(tmp_path / name, require_checksum=False)
    with pytest.raises(InputError, match="cannot be read"):
        load_verified(tmp_path, require_checksum=False)
    with pytest.raises(InputError, match="cannot be verified"):
        load_verified(tmp_path / "mae.pt")


def test_checksum_is_checked_where_there_is_one_even_if_not_required(tmp_path):
    folder = folder_with(tmp_path, 1)
    alone = tmp_path / "alone.pt"
    shutil.copy(folder.file(1), alone)
    assert load_verified(alone, require_checksum=False)["step"] == 1
    alone.with_name("alone.pt.sha256").write_text("0" * 64 + "  alone.pt\n")
    with pytest.raises(InputError, match="checksum does not fit"):
        load_verified(alone, require_checksum=False)


def test_weights_carry_timm_arguments(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(path, {"a": torch.arange(6.0).view(2, 3).t()}, {"model_name": "vit"}, {"mean": [0.5]})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"hardpatch": '{"timm": {"model_name": "vit"}, "input": {"mean": [0.5]}}'}
        assert torch.equal(file.get_tensor("a"), torch.arange(6.0).view(2, 3).t())
