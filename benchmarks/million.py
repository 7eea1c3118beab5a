"""A million images: how long it takes to list, shuffle and resume them, and how much memory all data workers take.

    python benchmarks/million.py --kinds folder txt csv parquet

Makes a folder of that many hard links to one small picture (1,000 sub-folders) and tables that list them, opens each
in a process of its own, and prints one JSON object: seconds for listing, for the fingerprint, for the first batch of a
run and for the first one when it goes on in the middle, with four data workers; peak memory of the main process, and
the proportional share (PSS) of all of them together, in MiB.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

FOLDERS = 1000
BATCH = 32
KINDS = ("folder", "txt", "csv", "parquet")


def make(folder: Path, count: int) -> None:
    """``count`` links below ``folder/images``, and tables that list them."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (90, 120, 60)).save(buffer, "PNG")
    names = []
    for number in range(FOLDERS):
        inside = folder / "images" / f"class_{number:04d}"
        inside.mkdir(parents=True)
        first = inside / f"{number:04d}_00000000.png"
        first.write_bytes(buffer.getvalue())
        for i in range(count // FOLDERS):
            path = f"{inside}/{number:04d}_{i:08d}.png"
            if i:
                os.link(first, path)
            names.append((path.removeprefix(f"{folder}/"), inside.name))
    (folder / "table.txt").write_text("".join(f"{path}\n" for path, _ in names))
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *names])
    import pyarrow
    import pyarrow.parquet

    columns = {"path": [path for path, _ in names], "label": [label for _, label in names]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "table.parquet")


def timed(call: Callable[[], object]) -> tuple[object, float]:
    start = time.perf_counter()
    return call(), round(time.perf_counter() - start, 2)


def pss(process: int) -> float:
    """Memory of a process, what it shares with others counted in shares, MiB."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("Pss:"))) / 1024


def children() -> list[int]:
    tasks = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    return [int(number) for number in tasks.read_text().split()]


def measure(spec: str, workers: int) -> dict[str, float]:
    """Open and read one source in this process."""
    import torch

    from hardpatch.data.loader.loading import Position, TrainingImages, TrainingOrder, training_batches
    from hardpatch.data.sources import fingerprint, open_source

    torch.set_num_threads(1)
    empty = pss(os.getpid())
    source, listing = timed(lambda: open_source(spec))
    assert not isinstance(source, tuple)
    _, printed = timed(lambda: fingerprint(source))  # type: ignore[arg-type]
    count = len(source)  # type: ignore[arg-type]

    def batches(first_step: int, num_steps: int = 8) -> Iterator[object]:
        images = TrainingImages(source, size=(16, 16), crop_scale=(1, 1), flip=False, seed=0)  # type: ignore[arg-type]
        order = TrainingOrder(
            count, batch_size=BATCH, first_step=first_step, total_steps=first_step + num_steps, seed=0,
            position=Position(),
        )  # fmt: skip
        return training_batches(images, order, workers=workers, pin_memory=False)

    figures = {"images": count, "listing_s": listing, "fingerprint_s": printed}
    for name, step in (("first_batch_s", 0), ("resume_s", count // BATCH // 2)):
        with closing(batches(step)) as run:  # type: ignore[type-var]
            _, figures[name] = timed(lambda run=run: next(run))  # type: ignore[misc]
            for _ in run:
                pass
    with closing(batches(count // BATCH, num_steps=40)) as run:  # type: ignore[type-var]
        for _ in range(20):
            next(run)
        shares = [pss(process) for process in (os.getpid(), *children())]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return figures | {
        "workers": len(shares) - 1, "main_before_mib": round(empty), "main_peak_mib": round(peak),
        "main_mib": round(shares[0]), "workers_mib": round(sum(shares[1:])), "together_mib": round(sum(shares)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--folder", help="where the links are made; empty: a temporary folder")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.workers)))
        return
    with TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        print(f"making {arguments.images:,} links", file=sys.stderr)
        make(folder, arguments.images)
        figures = {}
        for kind in arguments.kinds:
            spec = str(folder / "images" if kind == "folder" else folder / f"table.{kind}")
            command = [sys.executable, __file__, "--measure", spec, "--workers", str(arguments.workers)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            figures[kind] = json.loads(done.stdout.splitlines()[-1])
            print(f"{kind}: {figures[kind]}", file=sys.stderr)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
