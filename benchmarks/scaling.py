"""Memory and communication of a training step, counted from shapes without a GPU: the tables of docs/scaling.md.

python benchmarks/scaling.py [--models vit_base_patch16_224 ...] [--processes 8] [--tflops 395]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from hardpatch.config.config import Config
from hardpatch.config.recipes import recipe
from hardpatch.config.values import with_fields
from hardpatch.cost.flops import training_flops
from hardpatch.cost.memory import step_memory
from hardpatch.runs.build import build_student

VIEWS = 256
"""Views of a process in a step, in the table of memory."""
BANDWIDTHS = {"450 GB/s": 450e9, "50 GB/s": 50e9}
"""Of a GPU, to others, each way: NVLink of the fourth generation; a network card of 400 Gbit/s."""


@dataclass(frozen=True)
class Assumptions:
    """What is not counted but assumed."""

    processes: int
    gigabytes: float
    tflops: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="timm names",
                        default=["vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224"])  # fmt: skip
    parser.add_argument("--processes", type=int, default=8, help="over which a model is sharded")
    parser.add_argument("--gigabytes", type=float, default=72, help="of a GPU that are free for the step")
    parser.add_argument("--tflops", type=float, default=395, help="TFLOP/s that a GPU is assumed to reach")
    arguments = parser.parse_args()
    assumed = Assumptions(arguments.processes, arguments.gigabytes, arguments.tflops)
    table(
        ("model", "sharding", "checkpointing", "standing GB", "once GB", "a view MB", f"{VIEWS} views GB",
         f"views in {assumed.gigabytes:g} GB"),
        [memory_row(model, sharding, recompute, assumed) for model in arguments.models for sharding in ("none", "full")
         for recompute in (False, True)],
    )  # fmt: skip
    table(
        ("model", "parameters M", "GFLOP/view", "views/s", "checkpoint GB", "sharding", "sent GB",
         *(f"ms at {name}" for name in BANDWIDTHS), *(f"views to hide it at {name}" for name in BANDWIDTHS)),
        [row for model in arguments.models for row in communication_rows(model, assumed)],
    )  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print Markdown."""
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def configured(model: str, assumed: Assumptions, name: str = "hpm", **fields: object) -> Config:
    return with_fields(recipe(name), {"encoder": model, "batch_size": VIEWS * assumed.processes, **fields})


def memory_row(model: str, sharding: str, recompute: bool, assumed: Assumptions) -> tuple[str, ...]:
    config = configured(model, assumed, sharding=sharding, activation_checkpointing=recompute)
    memory = step_memory(config, processes=assumed.processes)
    once = memory.gathered + memory.weight_copies
    view = memory.activations_per_view + memory.recomputed_per_view
    fit = int((assumed.gigabytes * 1e9 - memory.standing - once) // view)
    return (
        model.removesuffix("_224"), sharding, "yes" if recompute else "no", f"{memory.standing / 1e9:.2f}",
        f"{once / 1e9:.2f}", f"{view / 1e6:.0f}", f"{memory.total / 1e9:.1f}", f"{max(0, fit):,}",
    )  # fmt: skip


def communication_rows(model: str, assumed: Assumptions) -> list[tuple[str, ...]]:
    """What a GPU sends in a step of one micro-batch when there are many of them, and how long that takes.

    DDP reduces float32 gradients in a ring, twice their size. Shards gather the student for the forward and for the
    backward pass and the teacher (without its reconstructor's blocks) once, and scatter the gradients: each once.
    """
    config = configured(model, assumed)
    student = build_student(config)
    size = 4 * sum(p.numel() for p in student.parameters())
    idle = 4 * sum(p.numel() for p in student.reconstructor.blocks.parameters())
    flops = training_flops(config)
    backward = training_flops(configured(model, assumed, "random+lpred")) * 2 / 3  # a step without a teacher
    rows = []
    for sharding, sent in (("none", 2 * size), ("full", 4 * size - idle)):
        seconds = [sent / bandwidth for bandwidth in BANDWIDTHS.values()]
        hiding = backward if sharding == "none" else flops  # gathers hide behind the forward passes, too
        views = [second * assumed.tflops * 1e12 / hiding for second in seconds]
        rows.append((
            model.removesuffix("_224"), f"{size / 4e6:.0f}", f"{flops / 1e9:.0f}",
            f"{assumed.tflops * 1e12 / flops:,.0f}", f"{4 * size / 1e9:.1f}", sharding, f"{sent / 1e9:.1f}",
            *(f"{second * 1e3:.1f}" for second in seconds), *(f"{number:.0f}" for number in views),
        ))  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
