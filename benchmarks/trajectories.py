"""Does a refactor change what is learnt? Short seeded runs of many kinds, recorded to the bit and compared.

    python benchmarks/trajectories.py --out before.json                     with the code of today
    python benchmarks/trajectories.py --out after.json --against before.json    after the change: same machine

Every run is a process of its own with one thread. What is compared: losses and gradient norm of every step, checksums
of student, teacher and optimizer after the last one, and the figures of every evaluation. The numbers differ between
processors, so a record serves on the machine that made it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

TINY = [
    "--data",
    "shapes:48",
    "--image-size",
    "32",
    "--crop-scale",
    "0.5",
    "1",
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
    "3",
    "--base-learning-rate",
    "3e-2",
    "--precision",
    "float32",
    "--device",
    "cpu",
    "--workers",
    "0",
    "--log-steps",
    "1",
    "--no-figures",
    "--no-knn",
]

RUNS: dict[str, str] = {
    "hpm": "--recipe hpm",
    "hpm-bf16": "--recipe hpm --precision bf16",
    "hpm-absolute": "--recipe hpm-absolute",
    "hpm-both": "--recipe hpm-both",
    "hpm-cross": "--recipe hpm-cross",
    "hpm-fast": "--recipe hpm-fast",
    "hpm-fast-in-pixels": "--recipe hpm-fast-in-pixels",
    "hpm-micro-batches": "--recipe hpm --micro-batch-size 2",
    "hpm-four-masks": "--recipe hpm --masks-per-image 4 --crops-per-image 2",
    "hpm-proportional": "--recipe hpm-proportional",
    "mae-norm-pix": "--recipe mae-norm-pix",
    "random+lpred": "--recipe random+lpred",
    "attmask": "--recipe attmask",
    "green-noise": "--recipe green-noise",
    "beit-tokens": "--recipe beit-tokens --num-tokens 16",
    "maskfeat": "--recipe maskfeat",
    "hpm-ema": "--recipe hpm-ema",
    "hpm-coarse": "--recipe hpm --hardness-block 4",
    "hpm-constant-rate": "--recipe hpm --learning-rate-schedule constant",
}
"""Runs of pre-training, by name."""

EVALUATIONS: dict[str, str] = {
    "knn": "--train shapes:64 --val shapes:32@1 --k 5",
    "linear": "--train shapes:64 --val shapes:32@1 --epochs 5",
    "finetune": "--train shapes:64 --val shapes:32@1 --epochs 3 --batch-size 16 --workers 0 --precision float32",
    "foreground": "--images shapes:32@1",
    "segment": "--images shapes:32 --val-images shapes:16@1 --epochs 2",
    "detect": "--train-images shapes:16 --val-images shapes:8@1 --epochs 1 --batch-size 8",
}
"""Evaluations of the run ``hpm``, by name."""

NOT_COMPARED = {
    "seconds",
    "seconds_left",
    "images_per_second",
    "data_wait",
    "folder",
    "figure",
    "picture",
    "time",
    "run",
}
"""Figures of the clock and paths."""


def hardpatch(program: str, *words: str, processes: int = 1) -> list[str]:
    """The command line of a command of ours, on one or several processes."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=29777", "-m"]
    return [*start, program, *words]


def digest(state: Any) -> Any:
    """Checksums of a tree of tensors."""
    total = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                total.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            total.update(repr(value).encode())

    add(state)
    return total.hexdigest()[:16]


def without_clock(value: Any) -> Any:
    """Figures without those of the clock."""
    if isinstance(value, dict):
        return {key: without_clock(item) for key, item in value.items() if key not in NOT_COMPARED}
    return [without_clock(item) for item in value] if isinstance(value, list) else value


def trajectory(folder: Path) -> dict[str, Any]:
    """What a run came to: every step's losses, and checksums of the end."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    state = torch.load(folder / "checkpoints" / "last", weights_only=True)
    wanted = ("step", "reconstruction_loss", "prediction_loss", "gradient_norm", "predictor_rank_correlation", "lr")
    return {
        "steps": [{key: record[key] for key in wanted if key in record} for record in records if "lr" in record],
        "student": digest(state["student"]),
        "teacher": digest(state["teacher"]),
        "optimizer": digest(state["optimizer"]["state"]),
    }


def call(command: list[str]) -> None:
    """Run a command of ours, or say what it said."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")


def interrupted(command: list[str], folder: Path, *, step: int) -> None:
    """Run a command, and stop it by SIGTERM once it has recorded a step."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and f'"step": {step},' in metrics.read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    if process.wait() != 3:
        raise SystemExit(f"{' '.join(command)}\nwas to be stopped and saved, ended with {process.returncode}")


def main() -> None:
    """Record, and compare where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--program", default="hardpatch", help="module that is run")
    parser.add_argument("--only", nargs="*", help="names of runs and evaluations")
    given = parser.parse_args()
    found: dict[str, Any] = {}

    def wanted(name: str) -> bool:
        return not given.only or name in given.only

    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        for name, words in RUNS.items():
            if wanted(name) or (name == "hpm" and not given.only):
                call(hardpatch(given.program, "pretrain", "--out", str(base / name), *TINY, *words.split()))
                found[name] = trajectory(base / name)
        if wanted("two-processes"):
            two = ["pretrain", "--out", str(base / "two"), *TINY, "--recipe", "hpm"]
            call(hardpatch(given.program, *two, processes=2))
            found["two-processes"] = trajectory(base / "two")
        if wanted("resumed"):
            long = ["pretrain", "--out", str(base / "resumed"), *TINY, "--recipe", "hpm", "--epochs", "40"]
            interrupted(hardpatch(given.program, *long), base / "resumed", step=5)
            call(hardpatch(given.program, *long))
            found["resumed"] = trajectory(base / "resumed")
        for name, words in EVALUATIONS.items():
            if wanted(name):
                call(hardpatch(given.program, "evaluate", name, "--checkpoint", str(base / "hpm"), *words.split()))
                found[name] = without_clock(json.loads((base / "hpm" / "evaluate" / f"{name}.json").read_text()))
    given.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    if given.against:
        before = json.loads(given.against.read_text())
        changed = [name for name in found if found[name] != before.get(name)]
        print(
            f"{len(found) - len(changed)} of {len(found)} are the same to the bit"
            + "".join(f"\n  {n}" for n in changed)
        )
        raise SystemExit(bool(changed))


if __name__ == "__main__":
    main()
