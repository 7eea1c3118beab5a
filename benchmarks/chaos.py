"""Chaos: kills, damage, full disks, a clock set back, two commands in one folder. Does every result come out the same?

    python benchmarks/chaos.py --out benchmarks/results/chaos.json --seconds 3600        seeds are printed and kept

Every command runs to its end once undisturbed. Then, as long as there is time, a case is drawn by the seed:

    kill      SIGKILL to the whole process group at a random moment, again and again, until the command ends by itself
    worker    SIGKILL to one of its data processes: refused with a name, or done
    damage    a stopped command's folder, in which one file is cut, flipped, emptied, filled with noise or deleted
    full      the folder lies on a tmpfs with room for only a part (as root); then there is room again
    clock     the files of a stopped command seem to come from tomorrow
    twice     a second command begins in the same folder while the first one runs

and the same command is run until it ends. Good is the same result, or a refusal (exit code 2) that names what is
damaged; bad are another result, a traceback, and a command that does not end.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from hardpatch import cli

HANGS = 300.0
"""Seconds after which a command that has not ended is taken for one that hangs."""
MODEL = [
    "--recipe",
    "hpm",
    "--image-size",
    "32",
    "--encoder",
    "vit_tiny_patch16_224",
    "--patch-size",
    "8",
    "--encoder-width",
    "32",
    "--encoder-depth",
    "1",
    "--encoder-heads",
    "2",
    "--decoder-width",
    "32",
    "--decoder-depth",
    "1",
    "--decoder-heads",
    "2",
    "--predictor-depth",
    "1",
    "--batch-size",
    "8",
    "--precision",
    "float32",
    "--device",
    "cpu",
    "--num-figure-images",
    "1",
]


class Job(NamedTuple):
    """A command, and what it is to come to."""

    words: Callable[[Path], list[str]]
    """Its words, for the place of its result."""
    result: Callable[[Path], Any]
    """What is compared."""


def weights(path: Path) -> str:
    """Checksum of every tensor of a file."""
    total = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        total.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def state(run: Path) -> str:
    """Checksum of what a run has come to."""
    saved = torch.load(run / "checkpoints" / "last", weights_only=True)
    total = hashlib.sha256(str(saved["step"]).encode())
    for part in ("student", "teacher"):
        for tensor in saved[part].values():
            total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def table(path: Path) -> str:
    """Checksum of a table of features."""
    total = hashlib.sha256()
    content = np.load(path, allow_pickle=False)
    for name in sorted(content.files):
        total.update(name.encode() + content[name].tobytes())
    return total.hexdigest()[:16]


def shards(folder: Path) -> list[str]:
    """Checksums of packed shards."""
    return [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in sorted(folder.glob("*.tar"))]


def accuracies(folder: Path) -> list[Any]:
    """The figures of an ablation's runs."""
    return [weights(file) for file in sorted(folder.rglob("checkpoints/weights.safetensors"))]


def jobs(run: Path, photographs: Path) -> dict[str, Job]:
    """The commands, on tiny data.

    Args:
        run: A run that is done, for those that need one.
        photographs: A folder of images.
    """
    tiny = ["--workers", "1", "--no-knn", "--checkpoint-minutes", "0.001"]
    few = ["--checkpoint", str(run), "--device", "cpu"]
    segment = ["evaluate", "segment", *few, "--images", "shapes:16", "--val-images", "shapes:8@1", "--epochs", "6"]
    finetune = [
        "evaluate", "finetune", *few, "--train", "shapes:32", "--val", "shapes:16@1", "--epochs", "4", "--batch-size",
        "8", "--workers", "0", "--precision", "float32", "--checkpoint-minutes", "0.001",
    ]  # fmt: skip
    ablate = ["ablate", "--suite", "main", "--rows", "hpm", "--data", "shapes:32", "--seeds", "0", "--epochs", "2"]
    return {
        "pretrain": Job(
            lambda out: ["pretrain", "--data", "shapes:48", *MODEL, *tiny, "--epochs", "6", "--out", str(out)], state
        ),
        "finetune": Job(
            lambda out: [*finetune, "--out", str(out)], lambda out: weights(out / "classifier.safetensors")
        ),
        "segment": Job(
            lambda out: [*segment, "--out", str(out)],
            lambda out: json.loads(next(out.rglob("segment.json")).read_text())["miou"],
        ),
        "embed": Job(
            lambda out: ["embed", *few, "--data", "shapes:600", "--batch-size", "16", "--out", f"{out}.npz"],
            lambda out: table(Path(f"{out}.npz")),
        ),
        "pack": Job(
            lambda out: ["data", "pack", str(photographs), "--out", str(out), "--size", "32", "--shard-bytes", "20000"],
            shards,
        ),
        "ablate": Job(
            lambda out: [
                *ablate,
                "--scale",
                "micro",
                "--batch-size",
                "8",
                "--no-equal-compute",
                "--workers",
                "0",
                "--out",
                str(out),
            ],
            accuracies,
        ),
    }


class Forked:
    """A command of ours in a process group of its own, forked from this process, which has imported everything.

    Importing torch takes seconds, the commands of this script take little more: so many more cases fit in an hour.
    """

    def __init__(self, words: list[str], said: Any = None) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._run(words, said)

    @staticmethod
    def _run(words: list[str], said: Any) -> NoReturn:
        code: Any = 1
        try:
            os.setsid()
            nowhere = os.open(os.devnull, os.O_RDWR)
            for number, target in ((0, nowhere), (1, nowhere), (2, nowhere if said is None else said.fileno())):
                os.dup2(target, number)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            cli.main(words)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)

    def poll(self) -> int | None:
        """Exit code, -N for signal N; None as long as it runs."""
        if self.code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if done else None
        return self.code

    def wait(self, seconds: float = HANGS) -> int | None:
        """The exit code; None where it still runs after this time."""
        until = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        return self.code

    def kill(self) -> None:
        """SIGKILL to all of it."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # forked a moment ago: not yet a group of its own
                os.killpg(self.pid, signal.SIGKILL)
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


def run(words: list[str]) -> tuple[int | None, str]:
    """Run a command to its end: exit code, None where it hung; and what it said."""
    with tempfile.TemporaryFile() as said:
        process = Forked(words, said)
        code = process.wait()
        process.kill()
        said.seek(0)
        return code, said.read().decode(errors="replace")


def kill_after(words: list[str], seconds: float, *, only_a_worker: bool = False) -> bool:
    """Kill a command, or one of its data processes, after a time; False: it had ended before."""
    process = Forked(words)
    if process.wait(seconds) is not None:
        return False
    if only_a_worker:
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
        for child in found.stdout.split()[-1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        process.wait()
    process.kill()
    return True


def damage(out: Path, chance: random.Random) -> str:
    """Damage one file of what a command has left; which, and how."""
    beside = [out] if out.exists() else [p for p in out.parent.iterdir() if p.name.startswith(out.name)]
    files = sorted(f for place in beside for f in ([place] if place.is_file() else place.rglob("*")) if f.is_file())
    if not files:
        return "nothing"
    file, content = chance.choice(files), b""
    how = chance.choice(["bit", "cut", "empty", "noise", "deleted"])
    content = file.read_bytes()
    place = chance.randrange(max(1, len(content)))
    if how == "deleted":
        file.unlink()
    elif how == "bit" and content:
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :])
    else:
        file.write_bytes({"cut": content[:place], "noise": chance.randbytes(max(64, place))}.get(how, b""))
    return f"{how} {file.name}"


def disturb(kind: str, job: Job, out: Path, usual: float, chance: random.Random) -> str:
    """Do the harm of one case; what exactly."""
    words, moment = job.words(out), chance.uniform(0.15, 1.0) * usual
    if kind == "kill":
        kills = 0
        while kills < 3 and kill_after(words, chance.uniform(0.3, 1.0) * usual):
            kills += 1
        return f"{kills} kills"
    if kind == "worker":
        return f"worker at {moment:.1f} s {kill_after(words, moment, only_a_worker=True)}"
    if kind == "twice":
        first = Forked(words)
        time.sleep(moment / 2)
        code, said = run(words)
        first.wait()
        first.kill()
        return f"second ended with {code}" + (f": TRACEBACK {said[-3000:]}" if "Traceback" in said else "")
    kill_after(words, moment)
    if kind == "damage":
        what = damage(out, chance)
        if what == "nothing":  # it was stopped before it had written anything
            run(words)
            what = damage(out, chance)
        return what
    tomorrow = time.time() + 86400
    for place in out.parent.iterdir():
        for file in [place, *place.rglob("*")] if place.is_dir() else [place]:
            if file.name.startswith(out.name) or out in file.parents:
                os.utime(file, (tomorrow, tomorrow), follow_symlinks=False)
    return "from tomorrow"


def on_a_full_disk(job: Job, out: Path, chance: random.Random) -> str:
    """Run a command on a tmpfs that fills up, and give it room afterwards."""
    kilobytes = chance.randrange(40, 1500)
    out.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(out.parent)], check=True)
    code, said = run(job.words(out))
    subprocess.run(["mount", "-o", "remount,size=200m", str(out.parent)], check=True)
    return f"{kilobytes} kB: {code}" + (f": TRACEBACK {said[-3000:]}" if "Traceback" in said else "")


def comes_to(job: Job, out: Path) -> Any:
    """The result, or what reading it says."""
    try:
        return job.result(out)
    except Exception as error:  # whatever is not there, or half
        return repr(error)


def case(kind: str, name: str, job: Job, expected: Any, usual: float, base: Path, seed: int) -> dict[str, Any]:
    """One case: the harm, the same command again until it ends, and what it came to."""
    chance = random.Random(seed)
    out = base / f"{kind}-{name}-{seed}" / "out"
    out.parent.mkdir(parents=True)
    mounted = kind == "full"
    row: dict[str, Any] = {"kind": kind, "command": name, "seed": seed}
    try:
        row["what"] = on_a_full_disk(job, out, chance) if mounted else disturb(kind, job, out, usual, chance)
        code, said = run(job.words(out))
        row["code"] = code
        if "TRACEBACK" in row["what"] or "Traceback" in said or code in (None, 1):
            row["verdict"] = "hangs" if code is None else "traceback"
            row["said"] = said[-3000:]
        elif code == 2 and comes_to(job, out) != expected:  # embed refuses to write over a table that is done
            row["verdict"] = "refused"
            row["said"] = said[-400:]
        else:
            row["verdict"] = "same" if comes_to(job, out) == expected else "other result"
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(out.parent)], check=False)
        shutil.rmtree(out.parent, ignore_errors=True)
    return row


def main() -> None:
    """As many cases as there is time for, and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=["kill", "worker", "damage", "full", "clock", "twice"])
    parser.add_argument("--commands", nargs="*")
    given = parser.parse_args()
    if os.geteuid() != 0 and "full" in given.kinds:
        given.kinds.remove("full")
        print("no full disks: they need root")
    torch.set_num_threads(1)  # a forked process has none of the threads that its parent had
    for module in IMPORTED:
        importlib.import_module(module)
    since, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        photographs = base / "photographs"
        photographs.mkdir()
        for number in range(40):
            noise = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(noise).save(photographs / f"{number}.png")
        done = base / "done"
        code, said = run(["pretrain", "--data", "shapes:48", *MODEL, "--epochs", "1", "--workers", "0", "--no-knn",
                          "--out", str(done)])  # fmt: skip
        if code:
            raise SystemExit(said)
        every = {n: j for n, j in jobs(done, photographs).items() if not given.commands or n in given.commands}
        known = {}
        for name, job in every.items():
            began, place = time.monotonic(), base / f"undisturbed-{name}"
            code, said = run(job.words(place))
            if code:
                raise SystemExit(f"{name}: {said}")
            known[name] = (job.result(place), time.monotonic() - began)
            print(f"{name}: {known[name][1]:.0f} s undisturbed", flush=True)
        chance = random.Random(given.seed)
        while time.monotonic() - since < given.seconds:
            kind, name = chance.choice(given.kinds), chance.choice(list(every))
            seed = chance.randrange(2**31)
            row = case(kind, name, every[name], *known[name], base, seed)
            rows.append(row)
            print(json.dumps(row), flush=True)
            if given.out:
                write(given.out, given.seed, rows)
    if any(row["verdict"] not in ("same", "refused") for row in rows):
        raise SystemExit(1)


IMPORTED = (
    "hardpatch.data.tools.pack",
    "hardpatch.embed.embed",
    "hardpatch.evaluate.classify.finetune",
    "hardpatch.evaluate.dense.segment",
    "hardpatch.tools.ablate.ablate",
    "hardpatch.tools.first_run",
    "hardpatch.training.pretrain",
    "torch.utils.tensorboard",
)
"""What the commands import late."""


def write(out: Path, seed: int, rows: list[dict[str, Any]]) -> None:
    """Counts by kind and command, and every case that did not end the same."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(f"{row['kind']} {row['command']}", Counter())[row["verdict"]] += 1
    others = [row for row in rows if row["verdict"] != "same"]
    kills = sum(int(row["what"].split()[0]) if row["kind"] == "kill" else row["kind"] != "full" for row in rows)
    out.write_text(
        json.dumps(
            {"seed": seed, "cases": len(rows), "kills": kills, "counts": counts, "not the same": others}, indent=1
        )
    )


if __name__ == "__main__":
    main()
