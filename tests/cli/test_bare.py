"""Commands where a batch system leaves little: no HOME, a user id without a name, no TERM, no folder of our own."""

import os
import subprocess
import sys
import tempfile

import pytest

from hardpatch import cli
from places import ROOT
from tiny import TINY, flags

PROGRAM = """
import os, pwd, sys

def nobody(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = nobody
from hardpatch.cli import main

for words in WORDS:
    try:
        main(words)
    except SystemExit as left:
        print("CODE", left.code, *words[:2], flush=True)
"""
LEFT = ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
"""What even a bare environment has."""


def in_bare_environment(*commands, folder="/proc"):
    """Exit codes of the commands, and what was said on standard error."""
    kept = {name: os.environ[name] for name in LEFT if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("WORDS", repr(commands))], capture_output=True, text=True, timeout=500,
        check=False, cwd=folder, env=kept | {
            "LANG": "C", "TMPDIR": "/nowhere", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"),
        },
    )  # fmt: skip
    return [line.split()[1] for line in done.stdout.splitlines() if line.startswith("CODE")], done.stderr


def test_commands_need_no_home_no_name_and_no_terminal(tmp_path):
    run, images = str(tmp_path / "run"), "shapes:16"
    commands = [
        ["pretrain", "--recipe", "hpm", "--out", run, *flags(TINY | {"data": images, "epochs": 1, "figures": True})],
        ["data", "check", images, "--out", str(tmp_path / "checked")],
        ["data", "stats", images],
        ["data", "pack", images, "--out", str(tmp_path / "packed"), "--workers", "0"],
        [
            "pretrain",
            "--recipe",
            "hpm",
            "--out",
            str(tmp_path / "other"),
            *flags(TINY | {"data": str(tmp_path / "packed" / "*.tar")}),
        ],
        ["evaluate", "knn", "--checkpoint", run, "--train", images, "--val", images, "--k", "1", "--device", "cpu"],
        ["evaluate", "foreground", "--checkpoint", run, "--images", "shapes:4", "--device", "cpu"],
        ["visualize", "--checkpoint", run, "--images", images, "--out", str(tmp_path / "hard.png")],
        ["embed", "--checkpoint", run, "--data", images, "--out", str(tmp_path / "t.parquet"), "--device", "cpu"],
        ["export", "--checkpoint", run, "--format", "timm", "--out", str(tmp_path / "timm")],
        ["convert", "--from", run, "--to", str(tmp_path / "published.pth")],
        ["recipes"],
    ]
    codes, said = in_bare_environment(*commands)
    assert codes == ["0"] * len(commands), said
    assert "Traceback" not in said


def test_what_is_written_where_nobody_may_is_refused(tmp_path):
    """Relative outputs of people who stand in a folder that is not theirs: /sys, which is nobody's."""
    commands = [
        ["pretrain", "--recipe", "hpm", "--out", "run", *flags(TINY)],
        ["data", "check", "shapes:4", "--out", "checked"],
        ["data", "pack", "shapes:4", "--out", "packed", "--workers", "0"],
    ]
    codes, said = in_bare_environment(*commands, folder="/sys")
    assert codes == ["2"] * len(commands), said
    assert "Traceback" not in said
    assert said.count("hardpatch: out: ") == len(commands), said


@pytest.mark.parametrize("words", [["--version"], ["recipes"], ["data", "stats", "shapes:4"]])
def test_no_folder_for_temporary_files_is_named(monkeypatch, capsys, words):
    """torch (through dill) and matplotlib make files in one as they are imported."""

    def import_it(*_):
        raise FileNotFoundError(2, "No usable temporary directory found in ['/nowhere', '/tmp', '/var/tmp']")

    monkeypatch.setattr(cli, "_dispatch", import_it)
    monkeypatch.setattr(tempfile, "gettempdir", import_it)
    monkeypatch.setenv("TMPDIR", "/nowhere")
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert left.value.code == 2
    assert "TMPDIR: must name a folder that can be written to" in capsys.readouterr().err
