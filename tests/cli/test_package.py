"""``import hardpatch`` and its help are quick: what is slow is imported when it is needed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hardpatch
from hardpatch.runtime.extras import install
from places import ROOT

SOURCES = sorted(Path(hardpatch.__file__).parent.rglob("*.py"))

SLOW = ("torch", "timm", "sklearn", "matplotlib")


def python(code):
    """Run code in a fresh interpreter; its standard output."""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_hpm_imports_nothing_slow():
    python(
        "import sys, hardpatch; hardpatch.__version__, hardpatch.InputError, dir(hardpatch); "
        f"assert not {{*{SLOW}}} & {{*sys.modules}}"
    )


@pytest.mark.parametrize("words", [
    "", "--help", "recipes", "evaluate", "evaluate --help", "demo --help", "ablate --help", "visualize --help",
    "convert --help", "plan --help",
    "evaluate knn --help", "evaluate foreground --help", "pretrain --help", "pretrain --recipe hpm-norm-pix --help",
])  # fmt: skip
def test_help_imports_nothing_slow(words):
    python(f"""
import sys
from hardpatch.cli import main
try:
    main({words.split()})
except SystemExit as left:
    assert left.code == {2 if words == "evaluate" else 0}, left.code
assert not {{*{SLOW}}} & {{*sys.modules}}""")


def test_every_public_name_is_there():
    assert set(hardpatch.__all__) <= set(dir(hardpatch))
    for name in hardpatch.__all__:
        assert getattr(hardpatch, name)
    with pytest.raises(AttributeError, match="module 'hardpatch' has no attribute 'pretrian'"):
        hardpatch.pretrian  # noqa: B018


@pytest.mark.parametrize("words", [["recipes"], ["--help"]])
def test_a_reader_that_leaves_ends_the_command_without_a_traceback(words):
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "hardpatch", *words],
            check=False,
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    finally:
        os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""


def test_another_pipe_that_breaks_is_a_fault():
    code = """
import hardpatch.cli
def broken(_): raise BrokenPipeError("a data process")
hardpatch.cli.COMMANDS["recipes"] = hardpatch.cli.Command(broken, "")
try:
    hardpatch.cli.main(["recipes"])
except BrokenPipeError:
    print("raised")
"""
    assert python(code).strip() == "raised"


def test_what_an_extra_needs_is_installed_package_by_package():
    command = install("dense")
    assert command.startswith("pip install ")
    for package in ("segmentation-models-pytorch>=", "torchmetrics>=", "pycocotools>="):
        assert package in command
    assert "pyarrow" not in command
    used = {name for file in SOURCES for name in re.findall(r"""install\(["'](\w+)["']\)""", file.read_text())}
    used |= {"http", "s3", "hf", "onnx"}
    assert len(used) >= 7
    for name in used:
        assert "hardpatch" not in install(name)  # package by package: also right for an install from a checkout


def test_no_message_tells_to_install_the_other_project_called_hpm():
    root = ROOT
    for file in (*SOURCES, root / "README.md", *(root / "docs").glob("*.md")):
        told = re.search(r"""pip install ["']?hpm\b""", file.read_text())
        assert file.name in ("log.md", "extras.py") or not told, file
