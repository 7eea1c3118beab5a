"""Every command that README and docs show is one that hardpatch understands."""

import re
import shlex

import pytest
import tyro

from hardpatch.cli import COMMANDS
from hardpatch.config.config import Config
from places import ROOT

ROOT = ROOT
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(?:bash|sh)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def commands(page):
    """The words after ``hardpatch`` of every command in the page's blocks, without comments."""
    found = []
    for block in BLOCK.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if "hardpatch" in words and "..." not in words and "install" not in words:
                    found.append(words[len(words) - words[::-1].index("hardpatch") :])
    return found


SHOWN = [(page.name, words) for page in PAGES if page.name != "log.md" for words in commands(page)]


class UnderstoodError(Exception):
    """The flags were parsed."""


@pytest.fixture(autouse=True)
def only_parsed(monkeypatch):
    original = tyro.cli

    def cli(*arguments, **keywords):
        original(*arguments, **keywords)
        raise UnderstoodError

    monkeypatch.setattr(tyro, "cli", cli)
    monkeypatch.setattr(
        "hardpatch.training.branching.open_parent", lambda run: Config()
    )  # the runs that pages name are not there


def run(words):
    name = next(name for name in (" ".join(words[:2]), words[0] if words else "") if name in COMMANDS)
    COMMANDS[name].run(words[len(name.split()) :])


@pytest.mark.parametrize("words", [w for _, w in SHOWN], ids=[f"{page}: {' '.join(w)}"[:90] for page, w in SHOWN])
def test_a_command_that_is_shown_is_understood(words):
    if words == ["recipes"]:
        run(words)
        return
    with pytest.raises(UnderstoodError):
        run(words)


def test_commands_are_found():
    assert len(SHOWN) > 50
    assert {words[0] for _, words in SHOWN} >= {"plan", "pretrain", "evaluate", "ablate", "export", "data", "benchmark"}


@pytest.mark.parametrize("words", [["pretrain", "--no-such-flag", "1"], ["evaluate", "knn", "--checkpoint"]])
def test_a_command_that_is_wrong_is_not(words):
    with pytest.raises(SystemExit):
        run(words)
