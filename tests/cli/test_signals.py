"""Ctrl-C and SIGTERM at any moment of a run, in a terminal: answered at once, left soon, gone on with."""

import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from tiny import TINY, flags

ANSWERED, LEFT = 1.0, 10.0
"""Seconds, as promised."""

SLOW = """
import sys, time
from hardpatch.data.sources import shapes
from hardpatch.training import monitor, preparation, reporting
place = sys.argv.pop(1)
def slower(before, at):
    def wrapped(*given, **more):
        if place == at:
            print("NOW", file=sys.stderr, flush=True)
            time.sleep(60) if at != "step" else time.sleep(3)
        return before(*given, **more)
    return wrapped
preparation.open_images = slower(preparation.open_images, "start")
monitor.split_features = slower(monitor.split_features, "look")
monitor.draw_hardness = slower(monitor.draw_hardness, "figure")
reporting.Reporter.damaged = slower(reporting.Reporter.damaged, "step")
from hardpatch.__main__ import main
main()
"""
"""The command, slow at one place, where it says so."""


def in_terminal(words, place=""):
    """Start a command in a terminal; the process and the terminal's other end."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, place, *words], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(theirs)
    return process, ours


def read_until(terminal, mark, seconds):
    """What the terminal shows until a mark appears in it, or the time is over."""
    shown, end = "", time.monotonic() + seconds
    while mark not in shown and time.monotonic() < end:
        if select.select([terminal], [], [], 0.05)[0]:
            try:
                shown += os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # closed at its other end
                break
    return shown


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("place", ["start", "look", "figure", "step"])
def test_a_signal_is_answered_at_once_and_the_same_command_goes_on(tmp_path, place, number):
    fields = TINY | {"knn": True, "figures": True, "num_figure_images": 2, "epochs": 1, "checkpoint_steps": 2}
    words = ["pretrain", "--recipe", "hpm", "--out", str(tmp_path / "run"), *flags(fields)]
    process, terminal = in_terminal(words, place)
    assert "NOW" in read_until(terminal, "NOW", 120)
    time.sleep(0.2)
    since = time.monotonic()
    os.killpg(process.pid, number)
    name = signal.Signals(number).name
    shown = read_until(terminal, name, 30)
    assert name in shown
    assert time.monotonic() - since < ANSWERED
    shown += read_until(terminal, "no such mark", 0.1)
    while process.poll() is None and time.monotonic() - since < 60:
        shown += read_until(terminal, "no such mark", 0.1)
    assert time.monotonic() - since < LEFT
    assert process.returncode == 3, shown
    assert "Traceback" not in shown
    os.close(terminal)
    done = subprocess.run([sys.executable, "-m", "hardpatch", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_second_ctrl_c_ends_a_slow_step(tmp_path):
    words = ["pretrain", "--recipe", "hpm", "--out", str(tmp_path / "run"), *flags(TINY)]
    process, terminal = in_terminal(words, "step")
    assert "NOW" in read_until(terminal, "NOW", 120)
    os.killpg(process.pid, signal.SIGINT)
    assert "Ctrl-C again: stop now" in read_until(terminal, "again", 5)
    time.sleep(1.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(LEFT) in (3, 130)
    os.close(terminal)
