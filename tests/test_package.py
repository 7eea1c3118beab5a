"""``import hpm`` and its help are quick: what is slow is imported when it is needed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hpm
from hpm.extras import install

SOURCES = sorted(Path(hpm.__file__).parent.rglob("*.py"))

SLOW = ("torch", "timm", "sklearn", "matplotlib")


def python(code):
    """Run code in a fresh interpreter; its standard output."""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_hpm_imports_nothing_slow():
    python(f"import sys, hpm; hpm.__version__, hpm.InputError, dir(hpm); assert not {{*{SLOW}}} & {{*sys.modules}}")


@pytest.mark.parametrize("words", [
    "", "--help", "recipes", "evaluate", "evaluate --help", "demo --help", "ablate --help", "visualize --help",
    "convert --help", "plan --help",
    "evaluate knn --help", "evaluate foreground --help", "pretrain --help", "pretrain --recipe hpm-norm-pix --help",
])  # fmt: skip
def test_help_imports_nothing_slow(words):
    python(f"""
import sys
from hpm.cli import main
try:
    main({words.split()})
except SystemExit as left:
    assert left.code == {2 if words == "evaluate" else 0}, left.code
assert not {{*{SLOW}}} & {{*sys.modules}}""")


def test_pretrain_is_the_function_though_a_module_has_its_name():
    first = "from hpm.pretrain import train; import hpm, hpm.demo"
    assert python(f"{first}; print(type(hpm.pretrain).__name__, hpm.pretrain.__name__)") == "function pretrain\n"


def test_every_public_name_is_there():
    assert set(hpm.__all__) <= set(dir(hpm))
    for name in hpm.__all__:
        assert getattr(hpm, name)
    with pytest.raises(AttributeError, match="module 'hpm' has no attribute 'pretrian'"):
        hpm.pretrian  # noqa: B018


@pytest.mark.parametrize("words", [["recipes"], ["--help"]])
def test_a_reader_that_leaves_ends_the_command_without_a_traceback(words):
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "hpm", *words],
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
import hpm.cli
def broken(_): raise BrokenPipeError("a data process")
hpm.cli.COMMANDS["recipes"] = hpm.cli.Command(broken, "")
try:
    hpm.cli.main(["recipes"])
except BrokenPipeError:
    print("raised")
"""
    assert python(code).strip() == "raised"


def test_what_an_extra_needs_is_installed_package_by_package():
    """``pip install 'hpm[dense]'`` would fetch another project of that name from the package index."""
    command = install("dense")
    assert command.startswith("pip install ")
    for package in ("segmentation-models-pytorch>=", "torchmetrics>=", "pycocotools>="):
        assert package in command
    assert "pyarrow" not in command
    used = {name for file in SOURCES for name in re.findall(r"""install\(["'](\w+)["']\)""", file.read_text())}
    used |= {"http", "s3", "hf", "onnx"}
    assert len(used) >= 9
    for name in used:
        assert "hpm" not in install(name)


def test_no_message_tells_to_install_hpm_from_the_index():
    root = Path(__file__).parent.parent
    for file in (*SOURCES, root / "README.md", *(root / "docs").glob("*.md")):
        told = re.search(r"""pip install ["']?hpm\b""", file.read_text())
        assert file.name in ("log.md", "extras.py") or not told, file
