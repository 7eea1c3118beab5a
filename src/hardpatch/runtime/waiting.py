"""Whoever waits for another process says for whom and since when, and does not wait for ever.

Every process of a group shows a sign of life every two seconds, through the store by which the group was formed and
from a thread of its own. So a process that is busy, with a slow first batch, compilation or an evaluation, is known to
be alive however long it takes; one that is paused, or on a machine or behind a cable that is gone, falls silent. Of
one that is silent longer than the limit nobody expects anything: the others leave with the exit code of a run that
can go on (3).
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import warn

LIMIT = "HARDPATCH_WAIT_MINUTES"
"""Environment variable: minutes after which a process that gives no sign of life is given up; default 10."""
BEAT = 2.0
"""Seconds between two signs of life."""
FEW = 32
"""Processes of which each looks at all others: the store answers each of them."""
SAID_AFTER = 30.0
"""Seconds of silence, or of waiting, after which it is said."""

_kept: list[str] = []


def note_kept(checkpoint: Path) -> None:
    """Remember the last checkpoint, or the folder of all, to be named where this process has to leave."""
    _kept[:] = [str(checkpoint)]


def what_is_kept() -> str:
    """A clause that names the last checkpoint."""
    found = (
        f"the last checkpoint is {'' if _kept[0].endswith('.pt') else 'in '}{_kept[0]}" if _kept else "nothing is lost"
    )
    return f"{found}; the same command goes on from there"


def wait_limit() -> timedelta:
    """How long a process may be silent.

    Raises:
        InputError: What :data:`LIMIT` holds is no positive number.
    """
    given = os.environ.get(LIMIT, "10")
    try:
        limit = timedelta(minutes=float(given))
    except (ValueError, OverflowError):
        limit = timedelta()
    if limit <= timedelta():
        raise InputError(f"{LIMIT}: must be a positive number of minutes, got {given!r}")
    return limit


def watched_by(rank: int, world_size: int) -> list[int]:
    """Whom a process looks at: all others, or of very many the main process and the next few; the main one at all."""
    others = [other for other in range(world_size) if other != rank]
    if rank == 0 or world_size <= FEW:
        return others
    return sorted({0, *((rank + ahead) % world_size for ahead in range(1, 9))} - {rank})


class Watch:
    """Signs of life of this process, and an eye on those of the others, in two threads.

    One thread talks to the store, and may hang where the network does; the other one only looks at the clock.

    Args:
        rank: Of this process.
        world_size: Processes in all.
        group: Number of the group, for processes that form several, one after another.
    """

    def __init__(self, rank: int, world_size: int, group: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.limit = wait_limit().total_seconds()
        self.said_after = min(SAID_AFTER, self.limit / 2)
        self.steps = 0
        """Exchanges that this process has come to."""
        self.place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self._prefix = f"hardpatch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{group}/"
        self._store: Any = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False,
            timeout=timedelta(seconds=60),
        )  # fmt: skip
        now = time.monotonic()
        self._beats, self._answered, self._moved = 0, now, (0, now)
        self._seen: dict[int, tuple[list[object], float]] = {}
        self._told: tuple[str, float, float] = ("", 0.0, 0.0)
        self._leaving = threading.Event()
        self._show()
        self._talking = threading.Thread(target=self._talk, daemon=True)
        self._talking.start()
        threading.Thread(target=self._look, daemon=True).start()

    def arrived(self) -> None:
        """This process has come to an exchange with the others."""
        self.steps += 1

    def leave(self) -> None:
        """This process has done its part, and is not missed any more."""
        self._leaving.set()
        self._talking.join(5)
        if not self._talking.is_alive():  # or the network hangs
            with suppress(RuntimeError):
                self._store.set(f"{self._prefix}{self.rank}", json.dumps([-1, self.steps, socket.gethostname(), ""]))

    def _show(self) -> None:
        self._beats += 1
        sign = [self._beats, self.steps, socket.gethostname(), _doing()]
        self._store.set(f"{self._prefix}{self.rank}", json.dumps(sign))

    def _talk(self) -> None:
        """Show that this process is alive, and read what the others show."""
        others = watched_by(self.rank, self.world_size)
        while not self._leaving.wait(min(BEAT, self.said_after / 6)):  # what is said of a process is never old
            try:
                self._show()
                signs = self._store.multi_get([f"{self._prefix}{rank}" for rank in others])
                for rank, sign in zip(others, map(json.loads, signs), strict=True):
                    if rank not in self._seen or self._seen[rank][0] != sign:
                        self._seen[rank] = (sign, time.monotonic())
                self._answered = time.monotonic()
            except RuntimeError as error:
                if "timed out" not in str(error).lower() and "timeout" not in str(error).lower():
                    return  # the store has ended with its process: whoever waits for that one is told by the exchange

    def _look(self) -> None:
        last = time.monotonic()
        while not self._leaving.wait(min(1.0, self.said_after / 4)):
            now = time.monotonic()
            if now - last > self.said_after / 2:  # it was this process that was paused
                self._answered = now
                self._seen = {rank: (sign, now) for rank, (sign, _) in dict(self._seen).items()}
            last = now
            if self.steps != self._moved[0]:
                self._moved = (self.steps, now)
            if not self._silent(now):
                self._slow(now)

    def _silent(self, now: float) -> bool:
        """Tell of processes that show no sign of life, and give them up in the end."""
        if now - self._answered > self.said_after:
            who, since, told_by_me = f"the machine of the main process ({self.place})", self._answered, _is_first_here()
        else:
            seen = dict(self._seen)  # the other thread adds to it
            quiet = {rank: at for rank, (sign, at) in seen.items() if sign[0] != -1 and now - at > self.said_after}
            if not quiet:
                return False
            who, since = (
                ", ".join(f"rank {rank} on {seen[rank][0][2]}" for rank in sorted(quiet)),
                min(quiet.values()),
            )
            told_by_me = self.rank == min({*range(self.world_size)} - quiet.keys())
        text = f"waiting for {who}: no sign of life since {_clock(now - since)} ({now - since:.0f} s)"
        if now - since > self.limit:
            warn(
                f"{text}. A process that is paused, or a machine or network that is gone; given up after "
                f"{self.limit / 60:g} minutes ({LIMIT}). {what_is_kept()[0].upper()}{what_is_kept()[1:]}"
            )
            sys.stdout.flush()
            os._exit(3)  # the main thread is in an exchange that may never end
        self._tell(who, text + f"; given up after {self.limit / 60:g} minutes ({LIMIT})", now, told_by_me)
        return True

    def _slow(self, now: float) -> None:
        """Tell of processes that are alive, and have not come yet to the exchange where this one waits."""
        seen = {rank: sign for rank, (sign, _) in dict(self._seen).items() if sign[0] != -1}
        steps = {rank: int(str(sign[1])) for rank, sign in seen.items()} | {self.rank: self.steps}
        late = [rank for rank, count in steps.items() if count == min(steps.values())]
        if now - self._moved[1] < self.said_after or self.rank in late:
            self._told = ("", 0.0, 0.0)
            return
        who = ", ".join(f"rank {rank} on {seen[rank][2]} (alive, in {seen[rank][3]})" for rank in late)
        since = self._moved[1]
        first = min(rank for rank in steps if rank not in late)
        self._tell(
            str(late), f"waiting for {who} since {_clock(now - since)} ({now - since:.0f} s)", now, self.rank == first
        )

    def _tell(self, who: str, text: str, now: float, by_me: bool) -> None:
        """Say it at once, and again after one minute, two, four..."""
        told, at, pause = self._told
        if who != told:
            at, pause = now, 60.0
        elif now < at + pause:
            return
        else:
            at, pause = now, 2 * pause
        self._told = (who, at, pause)
        if by_me:
            warn(f"rank {self.rank}: {text}")


def _clock(seconds_ago: float) -> str:
    return f"{datetime.now() - timedelta(seconds=seconds_ago):%H:%M:%S}"


def _is_first_here() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _doing() -> str:
    """The innermost function of hardpatch that the main thread is in, this module apart: the first sign is its own."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and not _is_told(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return "its own code" if frame is None else f"{frame.f_globals['__name__']}.{frame.f_code.co_name}"


def _is_told(module: str) -> bool:
    return module.startswith("hardpatch.") and module != __name__
