"""What pre-training is worth: every evaluation beside the untrained encoder, over seeds.

    python benchmarks/worth.py shapes --out runs/worth-shapes --seeds 0 1 2
    python benchmarks/worth.py photographs --shared ../shared/data --out runs/worth-photographs --seeds 0 1

Runs the commands that a user would: pre-training, then all of ``hardpatch evaluate``. What is done is not repeated,
``--only`` picks some. Writes NAME.json and NAME.md: mean and standard deviation over seeds; a seed is that of
pre-training and of everything after it.
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
from typing import Any, NamedTuple

import yaml

from hardpatch.runtime.files import write_text_atomically

Figure = tuple[str, str, str]
"""Evaluation, and where its JSON holds the figure of the run and of the untrained encoder."""


class Images(NamedTuple):
    """Images to learn from, and what is asked of the encoder afterwards."""

    pretrain: str
    """Arguments of ``hardpatch pretrain``."""
    evaluations: dict[str, str]
    """Arguments of ``hardpatch evaluate`` by name; SEED and SHARED are filled in."""
    figures: dict[str, Figure]
    """By name."""


TRAIN, VAL = "shapes:4000@1", "shapes:1000@2"
SHAPE_STAYS = "--crop-scale 1 1 --rand-augment= --mixup 0 --cutmix 0 --erasing 0"
"""Crops, shears and mixtures would hide the silhouette that is the class."""

SHAPES = Images(
    pretrain="--recipe shapes-demo --data shapes:12000",
    evaluations={
        "knn": f"knn --train {TRAIN} --val {VAL}",
        "knn-background": f"knn --train {TRAIN}:background --val {VAL}:background",
        "knn-hardness": f"knn --train {TRAIN} --val {VAL} --pooling hardness",
        "linear": f"linear --train {TRAIN} --val {VAL} --labels-per-class 10 50 --seed SEED",
        "linear-background": f"linear --train {TRAIN}:background --val {VAL}:background --labels-per-class 5 "
        "--seed SEED",
        "finetune": f"finetune --train {TRAIN} --val {VAL} --epochs 10 --batch-size 64 "
        f"{SHAPE_STAYS} --untrained --seed SEED",
        "foreground": "foreground --images shapes:480@3",
        "segment": "segment --images shapes:400@1 --val-images shapes:200@2 --cache --seed SEED",
        "detect": "detect --train-images shapes:800@1 --val-images shapes:200@2 --width 64 --samples-per-image 32 "
        "--epochs 10 --untrained --seed SEED",
    },
    figures={
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
    },
)

NATURE = "--train SHARED/nature/train-*.tar.gz --val SHARED/nature/val-*.tar.gz"
HORSES = "--images SHARED/masks/images --masks SHARED/masks/masks"
NUCLEI = "SHARED/scientific/nuclei"

PHOTOGRAPHS = Images(
    pretrain="--recipe hpm-fast-norm-pix-mini --data SHARED/nature/train-*.tar.gz --epochs 6 --workers 0",
    evaluations={
        "knn": f"knn {NATURE}",
        "linear": f"linear {NATURE} --labels-per-class 5 10 50 --seed SEED",
        "finetune": f"finetune {NATURE} --labels-per-class 50 --epochs 20 --workers 0 --untrained --seed SEED",
        "foreground": f"foreground {HORSES}",
        "foreground-boxes": "foreground --images SHARED/nature/val-*.tar.gz --boxes SHARED/nature/boxes_val.npy",
        "segment": f"segment {HORSES} --binary --cache --seed SEED",
        "segment-upernet": f"segment {HORSES} --binary --head upernet --finetune --width 64 --batch-size 8 --seed SEED",
        "segment-nuclei": f"segment --images {NUCLEI}/images --masks {NUCLEI}/masks --binary --cache --short-side 0 "
        "--val-share 0.4 --seed SEED",
        "detect-nuclei": f"detect --train-images {NUCLEI}/images --train-annotations from-masks:{NUCLEI}/masks "
        "--size 256 --width 64 --samples-per-image 128 --epochs 40 --batch-size 2 --val-share 0.4 --untrained "
        "--seed SEED",
    },
    figures={
        "46 classes, 10-NN top-1 %": ("knn", "top1", "untrained_top1"),
        "46 classes, linear top-1 %": ("linear", "top1", "untrained_top1"),
        "linear, 50 labels a class, top-1 %": ("linear", "few.50.run", "few.50.untrained"),
        "linear, 10 labels a class, top-1 %": ("linear", "few.10.run", "few.10.untrained"),
        "linear, 5 labels a class, top-1 %": ("linear", "few.5.run", "few.5.untrained"),
        "fine-tuned, 50 labels a class, top-1 %": ("finetune", "top1", "untrained_top1"),
        "horses, foreground by predicted loss, AUROC": (
            "foreground",
            "predicted_loss.auroc",
            "others.untrained.predicted_loss.auroc",
        ),
        "photographs, foreground by predicted loss, AUROC": (
            "foreground-boxes",
            "predicted_loss.auroc",
            "others.untrained.predicted_loss.auroc",
        ),
        "horses, linear segmentation, mean IoU %": ("segment", "miou", "untrained_miou"),
        "horses, UPerNet fine-tuned, mean IoU %": ("segment-upernet", "miou", "untrained_miou"),
        "nuclei, linear segmentation, mean IoU %": ("segment-nuclei", "miou", "untrained_miou"),
        "nuclei, detection, AP of boxes %": ("detect-nuclei", "ap", "untrained_ap"),
        "nuclei, detection, AP50 of boxes %": ("detect-nuclei", "ap50", "untrained_ap50"),
        "nuclei, detection, AP of masks %": ("detect-nuclei", "mask_ap", "untrained_mask_ap"),
    },
)

IMAGES = {"shapes": SHAPES, "photographs": PHOTOGRAPHS}


def run_json(command: list[str], file: Path) -> dict[str, Any]:
    """The JSON line of a hardpatch command, run once.

    Raises:
        SystemExit: The command failed, or the file is of another command.
    """
    if not file.is_file():
        print("hardpatch", *command, file=sys.stderr, flush=True)
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "hardpatch", *command, "--json"], stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            raise SystemExit(done.returncode)
        found = json.loads(done.stdout.splitlines()[-1])
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"command": command, "seconds": time.perf_counter() - start, "result": found}
        write_text_atomically(file, json.dumps(content) + "\n")
    kept: dict[str, Any] = json.loads(file.read_text())
    if kept["command"] != command:
        raise SystemExit(f"{file} is of another command: hardpatch {' '.join(kept['command'])}; choose another --out")
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
    parser.add_argument("images", choices=IMAGES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"), help="folder of the photographs")
    parser.add_argument("--only", nargs="+", help="these evaluations; the table has what is there")
    arguments = parser.parse_args()
    images = IMAGES[arguments.images]
    if unknown := set(arguments.only or ()) - set(images.evaluations):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(images.evaluations)}")
    results: dict[int, dict[str, dict[str, Any]]] = {}
    for seed in arguments.seeds:
        folder = arguments.out / f"seed{seed}"

        def words(text: str, seed: int = seed) -> list[str]:
            return text.replace("SEED", str(seed)).replace("SHARED", str(arguments.shared)).split()

        run = str(folder / "run")
        command = ["pretrain", *words(images.pretrain), "--no-figures", "--seed", str(seed), "--out", run]
        done = {"pretrain": run_json(command, folder / "pretrain.json")}
        for name, evaluation in images.evaluations.items():
            file = folder / f"{name}.json"
            if name in (arguments.only or images.evaluations) or file.is_file():
                done[name] = run_json(["evaluate", *words(evaluation), "--checkpoint", run], file)
        results[seed] = done
        write(results, arguments.images, arguments.out)


def write(results: dict[int, dict[str, dict[str, Any]]], name: str, out: Path) -> None:
    """The table of the seeds that are done, of the evaluations that all of them have."""
    common = [key for key in next(iter(results.values())) if all(key in done for done in results.values())]
    rows: dict[str, dict[str, list[float]]] = {}
    for figure, (evaluation, mine, theirs) in IMAGES[name].figures.items():
        if evaluation not in common:
            continue
        found = [with_few_labels(done[evaluation]["result"]) for done in results.values()]
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
    minutes = {key: statistics.fmean(done[key]["seconds"] for done in results.values()) / 60 for key in common}
    made_by = yaml.safe_load((out / f"seed{next(iter(results))}" / "run" / "config.yaml").read_text())["about"]
    made_by = {key: value.replace(str(out), "OUT") if key == "command" else value for key, value in made_by.items()}
    about = {"seeds": list(results), "minutes": minutes, "made_by": made_by}
    (out / f"{name}.json").write_text(json.dumps({**about, "figures": rows}, indent=2) + "\n")
    (out / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def spread(values: list[float], digits: int, *, sign: bool = False) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.fmean(values):{'+' if sign else ''}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
