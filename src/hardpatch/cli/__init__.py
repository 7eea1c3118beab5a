"""The command ``hardpatch``: parses, calls, prints. Everything it does can be done from Python as well.

Exit codes: 0 done; 2 the input was wrong; 3 stopped by a signal after saving, 130 by Ctrl-C without; 141 standard
output was closed by whoever read it; 1 a fault of hardpatch's. A new command is a function (arguments) -> None in one
of the modules here, and a line in :data:`COMMANDS`.
"""

from __future__ import annotations

import errno
import os
import select
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from io import TextIOWrapper
from typing import NamedTuple, NoReturn

from hardpatch.cli.ablate import ablate
from hardpatch.cli.benchmark import benchmark_data, benchmark_step
from hardpatch.cli.data import data_check, data_pack, data_stats
from hardpatch.cli.doctor import doctor
from hardpatch.cli.embed import embed
from hardpatch.cli.evaluate import evaluate
from hardpatch.cli.output import complain, say_plainly
from hardpatch.cli.plan import plan
from hardpatch.cli.pretrain import demo, pretrain
from hardpatch.cli.recipes import recipes
from hardpatch.cli.visualize import visualize
from hardpatch.cli.weights import convert, export
from hardpatch.config.evaluations import EVALUATIONS
from hardpatch.runtime.errors import InputError, Interrupted


class Command(NamedTuple):
    """One command."""

    run: Callable[[list[str]], None]
    """Takes the arguments after the name. Imports what it needs only after they are parsed, so that help is quick."""
    about: str
    """One line for the list of commands."""
    goes_on: bool = False
    """Is what it has done kept, so that the same command goes on from there?"""


COMMANDS: dict[str, Command] = {
    "demo": Command(demo, "the main job on embedded data: pre-train, evaluate, figures, report", goes_on=True),
    "doctor": Command(doctor, "will hardpatch run well here? packages, device, a training step, data processes, disk"),
    "plan": Command(plan, "images, a machine and a time budget -> model, sizes, batch, epochs, hours, memory"),
    "pretrain": Command(
        pretrain, "learn from images:  hardpatch pretrain --data photos/ --out runs/photos", goes_on=True
    ),
    **{
        f"evaluate {name}": Command(
            partial(evaluate, name), row.about, goes_on=name in ("finetune", "segment", "detect")
        )
        for name, row in EVALUATIONS.items()
    },
    "ablate": Command(ablate, "compare recipes with several seeds, at equal epochs, compute and time", goes_on=True),
    "data check": Command(data_check, "what is in a source: sizes, channels, depths, damage, duplicates"),
    "data stats": Command(
        data_stats, "mean and deviation per channel over all pixels, exactly, and the flags to use them"
    ),
    "data pack": Command(
        data_pack, "write resized tar shards that are quick to read; verified, resumable", goes_on=True
    ),
    "benchmark step": Command(
        benchmark_step, "images per second: the published step, ours, the fast presets, MAE, in turns"
    ),
    "benchmark data": Command(benchmark_data, "images per second and core of every way to load, beside a plain loader"),
    "visualize": Command(visualize, "what is hard in given images, as a figure"),
    "embed": Command(embed, "features of every image as a table, and how difficult each is", goes_on=True),
    "export": Command(export, "the backbone for timm, Hugging Face, ONNX or torch.export, checked"),
    "convert": Command(convert, "published HPM and MAE checkpoints to ours and back"),
    "recipes": Command(recipes, "the named starting points for pretrain"),
}
"""By name, in the order of the list that ``hardpatch`` prints."""

GROUPS = {"evaluate": "evaluation", "data": "command for data", "benchmark": "benchmark"}
"""First words that need a second one, and what that names."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and leave with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that is not UTF-8 shows escapes, and nothing ends for it
            stream.reconfigure(errors="backslashreplace")
    try:
        _dispatch(given)
        sys.stdout.flush()
    except InputError as error:
        complain(str(error))
        raise SystemExit(2) from None
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            raise SystemExit(141) from None
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR):
            complain(f"{error.strerror}: {error.filename}")
            raise SystemExit(2) from None
        if not _temporary_folder():
            complain(
                "TMPDIR: must name a folder that can be written to, as there is no other for temporary files (/tmp, "
                f"/var/tmp, the current folder), got {os.environ.get('TMPDIR', '')!r}"
            )
            raise SystemExit(2) from None
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        complain(
            f"the disk is full ({error.strerror}: {error.filename or 'while writing'}); the checkpoints before are "
            "whole: make room and run the same command again"
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        kept = "what was saved before is whole, and the same command goes on from there"
        complain(
            f"stopped by Ctrl-C; {kept if _goes_on(given) else 'nothing was kept, and the same command begins anew'}"
        )
        raise SystemExit(130) from None
    except Interrupted as stopped:
        if os.environ.get("RANK", "0") == "0":
            say_plainly(str(stopped))
        raise SystemExit(3) from None
    raise SystemExit(0)


def _goes_on(arguments: Sequence[str]) -> bool:
    """Does the command go on where it was stopped?"""
    return any(row.goes_on and list(arguments[: len(name.split())]) == name.split() for name, row in COMMANDS.items())


def _temporary_folder() -> bool:
    """Is there one? Packages that commands import make files in it and end in an OSError of their own without."""
    try:
        return bool(tempfile.gettempdir())
    except FileNotFoundError:
        return False


def _nobody_reads() -> bool:
    """Is standard output closed at its other end, as by ``hardpatch ... | head``? Then what is left goes nowhere.

    Another pipe that broke, say to a data process, is a fault and none of this.
    """
    try:
        output = sys.stdout.fileno()
    except OSError:  # it is no file at all
        return False
    look = select.poll()
    look.register(output, 0)
    if not any(event & select.POLLERR for _, event in look.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _dispatch(arguments: list[str]) -> None:
    """Find the command and run it.

    Raises:
        InputError: There is no such command.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_listed("COMMAND", COMMANDS))
        print("\nhardpatch COMMAND --help explains a command, --help-all all of its flags; --version prints versions.")
        return
    if arguments[0] == "--version":
        print(_versions())
        return
    for name, command in COMMANDS.items():
        words = name.split()
        if arguments[: len(words)] == words:
            command.run(arguments[len(words) :])
            return
    if arguments[0] in GROUPS:
        _no_second_word(arguments[0], arguments[1:])
        return

    from hardpatch.runtime.errors import suggest

    raise InputError(f"no command {arguments[0]!r}{suggest(arguments[0], COMMANDS)}; there are {', '.join(COMMANDS)}")


def _no_second_word(first: str, arguments: list[str]) -> None:
    """List the commands that begin with ``first``.

    Raises:
        InputError: None or an unknown one was given, rather than asked for the list.
    """
    from hardpatch.runtime.errors import suggest

    commands = {name: command for name, command in COMMANDS.items() if name.startswith(f"{first} ")}
    known = [name.split()[1] for name in commands]
    listed = f"{_listed(f'{first} NAME', commands)}\n\nhardpatch {first} NAME --help explains one."
    if not arguments:
        raise InputError(f"{first}: needs a name: {', '.join(known)}\n\n{listed}")
    if arguments[0] not in ("-h", "--help"):
        raise InputError(f"{first}: no {GROUPS[first]} {arguments[0]!r}{suggest(arguments[0], known)}\n\n{listed}")
    print(listed)


def _listed(usage: str, commands: dict[str, Command]) -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.about}" for name, command in commands.items()]
    return "\n".join([f"usage: hardpatch {usage} ...", "", *lines])


def _versions() -> str:
    from hardpatch.runs.folder import versions
    from hardpatch.runtime.distributed import choose_device

    return ", ".join(f"{name} {value}" for name, value in versions(choose_device("auto")).items())
