"""Two machines for real, on one: two network namespaces joined by a virtual cable, which is pulled in the end.

    python benchmarks/two_machines.py --out benchmarks/results/two_machines.json        as root, on Linux

Each command runs as a process in either namespace, started as SLURM's ``srun`` starts it, and is compared with one
process alone: pre-training by copies and sharded, fine-tuning and embed. Then a run is cut off: both sides have to say
for whom they wait, and to leave with exit code 3 within the limit; the same command has to go on to the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TINY = [
    "--recipe",
    "hpm",
    "--data",
    "shapes:48",
    "--image-size",
    "32",
    "--encoder",
    "vit_tiny_patch16_224",
    "--patch-size",
    "8",
    "--encoder-width",
    "32",
    "--encoder-depth",
    "2",
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
    "--epochs",
    "2",
    "--base-learning-rate",
    "3e-2",
    "--precision",
    "float32",
    "--device",
    "cpu",
    "--workers",
    "0",
    "--no-figures",
    "--no-knn",
]


class Machines:
    """Two namespaces and the cable between them."""

    def __init__(self) -> None:
        mark = f"{os.getpid() % 10000}"
        self.names = (f"hp{mark}a", f"hp{mark}b")
        self.ends = (f"ve{mark}a", f"ve{mark}b")
        self.port = random.Random(os.getpid()).randrange(20000, 50000)

    def __enter__(self) -> Machines:
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.ends[0], "type", "veth", "peer", "name", self.ends[1])
        for number, (name, end) in enumerate(zip(self.names, self.ends, strict=True), 1):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            ip("-n", name, "link", "set", "lo", "up")
        self.plug(True)
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False)

    def plug(self, there: bool) -> None:
        """Plug the cable in, or pull it."""
        for name, end in zip(self.names, self.ends, strict=True):
            ip("-n", name, "link", "set", end, "up" if there else "down")

    def start(self, words: list[str], minutes: float = 10) -> list[subprocess.Popen[str]]:
        """Start a command of ours on both."""
        self.port += 1
        started = []
        for rank, (name, end) in enumerate(zip(self.names, self.ends, strict=True)):
            about = {
                "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": str(self.port), "GLOO_SOCKET_IFNAME": end,
                "OMP_NUM_THREADS": "1", "HARDPATCH_WAIT_MINUTES": str(minutes),
            }  # fmt: skip
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "hardpatch", *words]
            started.append(subprocess.Popen(
                command, env=os.environ | about, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            ))  # fmt: skip
        return started


def ip(*words: str) -> None:
    """The system's command for networks."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


def why_not() -> str:
    """Why there can be no namespaces here; empty: there can."""
    if sys.platform != "linux" or shutil.which("ip") is None or os.geteuid() != 0:
        return "needs Linux, iproute2 and root"
    try:
        with Machines():
            return ""
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.decode().strip()}"


def ended(processes: list[subprocess.Popen[str]], seconds: float = 600) -> list[tuple[int, str]]:
    """Exit code and standard error of each."""
    return [(p.returncode, said) for p in processes for said in [p.communicate(timeout=seconds)[1]]]


def alone(words: list[str]) -> None:
    """A command in one process here."""
    done = subprocess.run(
        [sys.executable, "-m", "hardpatch", *words], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)


def largest_difference(a: Path, b: Path) -> float:
    """Between two tables of features or two files of weights."""
    import numpy as np
    from safetensors.numpy import load_file

    one, two = (dict(np.load(p, allow_pickle=False)) if p.suffix == ".npz" else load_file(p) for p in (a, b))
    return max(float(np.abs(one[k].astype("f8") - two[k].astype("f8")).max()) for k in one if one[k].dtype.kind == "f")


def compare(machines: Machines, base: Path, name: str, words: list[str], result: tuple[str, str]) -> dict[str, Any]:
    """A command on two machines and in one process: exit codes, and how far the results are apart."""
    flag = "--out"
    both = ended(machines.start([*words, flag, str(base / f"{name}-two{result[1]}")]))
    alone([*(word for word in words if word not in ("--sharding", "full")), flag, str(base / f"{name}-one{result[1]}")])
    row: dict[str, Any] = {"exit codes": [code for code, _ in both]}
    if any(row["exit codes"]):
        return row | {"said": both[0][1][-500:]}
    paths = (base / f"{name}-{many}{result[1]}{result[0]}" for many in ("two", "one"))
    return row | {"largest difference": largest_difference(*paths)}


def pull(machines: Machines, base: Path, minutes: float) -> dict[str, Any]:
    """Pull the cable in the middle of a run; plug it in again and let the same command go on."""
    long = ["pretrain", *TINY, "--epochs", "40", "--checkpoint-minutes", "0.01", "--log-steps", "1"]
    started = machines.start([*long, "--out", str(base / "cut")], minutes)
    while not any((base / "cut" / "checkpoints").glob("step_*.pt")) and started[0].poll() is None:
        time.sleep(0.05)
    machines.plug(False)
    since = time.monotonic()
    found = ended(started)
    seconds = time.monotonic() - since
    machines.plug(True)
    row: dict[str, Any] = {
        "exit codes": [code for code, _ in found], "limit in seconds": 60 * minutes, "left after seconds": seconds,
        "both said for whom they waited": all("waiting for" in said for _, said in found),
        "checkpoint named": all("checkpoints" in said for _, said in found),
    }  # fmt: skip
    if not row["both said for whom they waited"]:
        row["said"] = [said[-600:] for _, said in found]
    row["exit codes of the same command again"] = [
        code for code, _ in ended(machines.start([*long, "--out", str(base / "cut")]))
    ]
    whole = ended(machines.start([*long, "--out", str(base / "whole")]))
    weights = "checkpoints/weights.safetensors"
    if not any(code for code, _ in whole):
        row["largest difference to a run that was not cut"] = largest_difference(
            base / "cut" / weights, base / "whole" / weights
        )
    return row


def main() -> None:
    """All of it, with a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float, default=0.75, help="limit of waiting while the cable is pulled")
    parser.add_argument("--only", nargs="*", help="pretrain, sharded, embed, finetune, cable")
    given = parser.parse_args()
    if reason := why_not():
        raise SystemExit(f"skipped: {reason}")
    found: dict[str, Any] = {}
    weights, run = "checkpoints/weights.safetensors", None
    with tempfile.TemporaryDirectory() as temporary, Machines() as machines:
        base = Path(temporary)
        run = str(base / "run")
        alone(["pretrain", *TINY, "--out", run])
        pretrain = ["pretrain", *TINY]
        finetune = [
            "evaluate", "finetune", "--checkpoint", run, "--train", "shapes:32", "--val", "shapes:16@1",
            "--epochs", "2", "--batch-size", "8", "--workers", "0", "--precision", "float32", "--device", "cpu",
        ]  # fmt: skip
        embed = ["embed", "--checkpoint", run, "--data", "shapes:64", "--device", "cpu"]
        jobs = {
            "pretrain": (pretrain, (f"/{weights}", "")),
            "sharded": ([*pretrain, "--sharding", "full"], (f"/{weights}", "")),
            "finetune": (finetune, ("/classifier.safetensors", "")),
            "embed": (embed, ("", ".npz")),
        }
        for name, (words, result) in jobs.items():
            if not given.only or name in given.only:
                found[name] = compare(machines, base, name, words, result)
                print(name, found[name], flush=True)
        if not given.only or "cable" in given.only:
            found["cable pulled"] = pull(machines, base, given.minutes)
            print("cable pulled", found["cable pulled"], flush=True)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
