"""What pre-training on the embedded shapes is worth: every evaluation beside the untrained encoder, over seeds.

    python benchmarks/shapes.py --out runs/shapes --seeds 0 1 2

Runs the commands that a user would (12,000 images, 8 epochs, then all of ``hpm evaluate``); on two busy CPU cores a
seed takes three quarters of an hour, half of it detection. What is done is not repeated. Writes OUT/shapes.json and
OUT/shapes.md: mean and standard deviation over seeds; a seed is that of pre-training and of everything after it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from hpm.checkpoint import write_text_atomically

TRAIN, VAL = "shapes:4000@1", "shapes:1000@2"
SHAPE_STAYS = "--crop-scale 1 1 --rand-augment= --mixup 0 --cutmix 0 --erasing 0"
"""Crops, shears and mixtures would hide the silhouette that is the class."""

EVALUATIONS: dict[str, str] = {
    "knn": f"knn --train {TRAIN} --val {VAL}",
    "knn-background": f"knn --train {TRAIN}:background --val {VAL}:background",
    "knn-hardness": f"knn --train {TRAIN} --val {VAL} --pooling hardness",
    "linear": f"linear --train {TRAIN} --val {VAL} --labels-per-class 10 50 --seed SEED",
    "linear-background": f"linear --train {TRAIN}:background --val {VAL}:background --labels-per-class 5 --seed SEED",
    "finetune": f"finetune --train {TRAIN} --val {VAL} --epochs 10 --batch-size 64 "
    f"{SHAPE_STAYS} --untrained --seed SEED",
    "foreground": "foreground --images shapes:480@3",
    "segment": "segment --images shapes:400@1 --val-images shapes:200@2 --cache --seed SEED",
    "detect": "detect --train-images shapes:800@1 --val-images shapes:200@2 --width 64 --samples-per-image 32 "
    "--epochs 10 --untrained --seed SEED",
}
"""Arguments of ``hpm evaluate``."""

FIGURES: dict[str, tuple[str, str, str]] = {
    "silhouettes, 10-NN top-1 %": ("knn", "top1", "untrained_top1"),
    "silhouettes, linear top-1 %": ("linear", "top1", "untrained_top1"),
    "silhouettes, linear, 50 labels a class, top-1 %": ("linear", "few.50.run", "few.50.untrained"),
    "silhouettes, fine-tuned top-1 %": ("finetune", "top1", "untrained_top1"),
    "silhouettes, 10-NN on predicted loss, top-1 %": ("knn-hardness", "top1", "untrained_top1"),
    "backgrounds, 10-NN top-1 %": ("knn-background", "top1", "untrained_top1"),
    "backgrounds, linear top-1 %": ("linear-background", "top1", "untrained_top1"),
    "backgrounds, linear, 5 labels a class, top-1 %": ("linear-background", "few.5.run", "few.5.untrained"),
    "foreground by predicted loss, AUROC": (
        "foreground",
        "predicted_loss.auroc",
        "others.untrained.predicted_loss.auroc",
    ),
    "segmentation, mean IoU %": ("segment", "miou", "untrained_miou"),
    "segmentation, IoU of the object %": ("segment", "per_class.1.iou", "per_class.1.untrained_iou"),
    "detection, AP of boxes %": ("detect", "ap", "untrained_ap"),
    "detection, AP50 of boxes %": ("detect", "ap50", "untrained_ap50"),
    "detection, AP of masks %": ("detect", "mask_ap", "untrained_mask_ap"),
}
"""By name: evaluation, and where its JSON holds the figure of the run and of the untrained encoder."""


def run_json(command: list[str], file: Path) -> dict[str, Any]:
    """The JSON line of an hpm command, run once.

    Raises:
        SystemExit: The command failed, or the file is of another command.
    """
    if not file.is_file():
        print("hpm", *command, file=sys.stderr, flush=True)
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "hpm", *command, "--json"], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(done.returncode)
        found = json.loads(done.stdout.splitlines()[-1])
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"command": command, "seconds": time.perf_counter() - start, "result": found}
        write_text_atomically(file, json.dumps(content) + "\n")
    kept: dict[str, Any] = json.loads(file.read_text())
    if kept["command"] != command:
        raise SystemExit(f"{file} is of another command: hpm {' '.join(kept['command'])}; choose another --out")
    return kept


def with_few_labels(result: dict[str, Any]) -> dict[str, Any]:
    """The result, with few labels as ``few.COUNT.KIND``."""
    few: dict[str, dict[str, float]] = {}
    for item in result.get("few_labels", []):
        few.setdefault(str(item["labels_per_class"]), {})[item["kind"]] = item["top1"]
    return {**result, "few": few}


def pick(result: Any, path: str) -> float:
    """The value at a path of keys and positions."""
    step = lambda value, key: value[int(key)] if isinstance(value, list) else value[key]  # noqa: E731
    return float(reduce(step, path.split("."), result))


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=12000)
    parser.add_argument("--only", nargs="+", choices=EVALUATIONS, default=list(EVALUATIONS), help="these evaluations")
    arguments = parser.parse_args()
    results: dict[int, dict[str, dict[str, Any]]] = {}
    for seed in arguments.seeds:
        folder = arguments.out / f"seed{seed}"
        data = [
            "--data",
            f"shapes:{arguments.images}",
            "--no-figures",
            "--seed",
            str(seed),
            "--out",
            str(folder / "run"),
        ]
        done = {"pretrain": run_json(["pretrain", "--recipe", "shapes-demo", *data], folder / "pretrain.json")}
        for name, words in EVALUATIONS.items():
            command = ["evaluate", *words.replace("SEED", str(seed)).split(), "--checkpoint", str(folder / "run")]
            file = folder / f"{name}.json"
            if name in arguments.only or file.is_file():
                done[name] = run_json(command, file)
        results[seed] = done
        write(results, arguments.out)


def write(results: dict[int, dict[str, dict[str, Any]]], out: Path) -> None:
    """The table of the seeds that are done."""
    rows: dict[str, dict[str, list[float]]] = {}
    known = {figure: paths for figure, paths in FIGURES.items() if all(paths[0] in done for done in results.values())}
    for figure, (name, mine, theirs) in known.items():
        found = [with_few_labels(done[name]["result"]) for done in results.values()]
        pairs = [(pick(result, mine), pick(result, theirs)) for result in found]
        rows[figure] = {"run": [a for a, _ in pairs], "untrained": [b for _, b in pairs]}
    lines = ["| | run | untrained | difference |", "|---|---:|---:|---:|"]
    for figure, values in rows.items():
        digits = 3 if "AUROC" in figure else 1
        difference = [a - b for a, b in zip(values["run"], values["untrained"], strict=True)]
        cells = [
            spread(values["run"], digits),
            spread(values["untrained"], digits),
            spread(difference, digits, sign=True),
        ]
        lines.append(f"| {figure} | {' | '.join(cells)} |")
    minutes = {
        name: statistics.fmean(done[name]["seconds"] for done in results.values()) / 60 for name in done_names(results)
    }
    made_by = yaml.safe_load((out / f"seed{next(iter(results))}" / "run" / "config.yaml").read_text())["about"]
    about = {"seeds": list(results), "minutes": minutes, "made_by": made_by}
    (out / "shapes.json").write_text(json.dumps({**about, "figures": rows}, indent=2) + "\n")
    (out / "shapes.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def done_names(results: dict[int, dict[str, dict[str, Any]]]) -> list[str]:
    """What was run with every seed, in order."""
    return [name for name in next(iter(results.values())) if all(name in done for done in results.values())]


def spread(values: list[float], digits: int, *, sign: bool = False) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.fmean(values):{'+' if sign else ''}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
