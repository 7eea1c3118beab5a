"""Memory of a training step, counted from shapes (no GPU needed), as the Markdown table of docs/scaling.md.

    python benchmarks/memory.py [--models vit_base_patch16_224 ...] [--processes 8] [--gigabytes 72] [--recipe hpm]
"""

from __future__ import annotations

import argparse

from hpm.config import Config, with_fields
from hpm.memory import StepMemory, step_memory
from hpm.recipes import recipe

MODELS = ("vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--gigabytes", type=float, default=72, help="of a GPU that are free for the step")
    parser.add_argument("--recipe", default="hpm")
    arguments = parser.parse_args()
    print(f"Recipe {arguments.recipe}, bf16 autocast, {arguments.processes} processes; 'fit' in {arguments.gigabytes:g} GB.\n")
    print("| model | sharding | checkpointing | parameters M | standing GB | once GB | a view MB | at 256 views GB | views that fit |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|")
    for model in arguments.models:
        for sharding in ("none", "full"):
            for recompute in (False, True):
                fields = {"encoder": model, "sharding": sharding, "activation_checkpointing": recompute}
                config = with_fields(recipe(arguments.recipe), {**fields, "batch_size": 256 * arguments.processes})
                print(row(config, step_memory(config, processes=arguments.processes), arguments))


def row(config: Config, memory: StepMemory, arguments: argparse.Namespace) -> str:
    once = memory.gathered + memory.weight_copies
    view = memory.activations_per_view + memory.recomputed_per_view
    shards = arguments.processes if config.run.sharding == "full" else 1
    fit = max(0, int((arguments.gigabytes * 1e9 - memory.standing - once) // view))
    cells = (
        config.model.encoder,
        config.run.sharding,
        "yes" if config.run.activation_checkpointing else "no",
        f"{memory.parameters * shards / 4e6:.0f}",
        f"{memory.standing / 1e9:.2f}",
        f"{once / 1e9:.2f}",
        f"{view / 1e6:.0f}",
        f"{memory.total / 1e9:.1f}",
        f"{fit:,}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
