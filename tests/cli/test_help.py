"""Help in two tiers: what most people need, in the words of the fields themselves, and everything."""

import re
import shlex
import subprocess
import sys

import pytest

from hardpatch.cli import COMMANDS, main
from hardpatch.cli.flags import parse, parse_with_fields
from hardpatch.cli.help import SHORT
from hardpatch.config.commands import PretrainCommand
from hardpatch.config.evaluations import EVALUATIONS
from hardpatch.config.plan import PlanConfig
from hardpatch.tools.ablate.suites import AblateConfig

WITH_FIELDS = {"pretrain": PretrainCommand, "plan": PlanConfig, "ablate": AblateConfig}


def shown(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", SHORT)
def test_short_help_is_short_and_all_of_it_is_true(capsys, command):
    short, full = shown(capsys, *command.split(), "--help"), shown(capsys, *command.split(), "--help-all")
    flags = [line.split()[0] for line in short.splitlines() if line.startswith("  --")]
    assert flags == [f"--{name.replace('_', '-')}" for name in SHORT[command].flags] + ["--json"]
    assert len(flags) <= 16
    assert all(f"{flag} " in full or f"{flag}," in full for flag in flags)
    assert len(re.findall(r"(?m)^\W*--\w", full)) > 1.4 * len(flags)
    assert len(short.splitlines()) < 75
    assert max(map(len, short.splitlines())) <= 120


def test_data_comes_first_and_what_is_chosen_is_said(capsys):
    plain = shown(capsys, "pretrain", "--help")
    assert plain.index("  --data SRC") < plain.index("  --out PATH") < plain.index("  --encoder NAME")
    assert plain.count("[chosen from the images and the machine]") == 5
    named = shown(capsys, "pretrain", "--recipe", "mae-imagenet-800", "--help")
    assert "chosen from the images and the machine]" not in named
    assert "Passes over the data. [800]" in named


@pytest.mark.parametrize(("command", "line"), [(name, line) for name, row in SHORT.items() for line in row.examples])
def test_examples_can_be_parsed(command, line):
    words = shlex.split(line)
    assert words[:1] + words[1 : 1 + len(command.split())] == ["hardpatch", *command.split()]
    rest = words[1 + len(command.split()) :]
    if command in WITH_FIELDS:
        parse_with_fields(WITH_FIELDS[command], command, rest)
    else:
        parse(EVALUATIONS[command.split()[1]].config, command, rest)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "recipes"])
def test_every_command_knows_both(capsys, command):
    assert "--" in shown(capsys, *command.split(), "--help")
    assert "--" in shown(capsys, *command.split(), "--help-all")


def test_help_needs_no_torch():
    lines = ("import sys; from hardpatch.cli import main", "try: main(['pretrain', '--help'])",
             "finally: assert 'torch' not in sys.modules")  # fmt: skip
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, stdout=subprocess.DEVNULL)
