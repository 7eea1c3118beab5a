"""``hpm evaluate``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hpm.cli.flags import parse_with_json
from hpm.cli.output import print_json, print_table, save_evaluation


def evaluate_knn(arguments: list[str]) -> None:
    """``hpm evaluate knn``."""
    from hpm.evaluate.config import KnnConfig

    config, as_json = parse_with_json(KnnConfig, "evaluate knn", arguments)

    from hpm.distributed import is_main_of_environment
    from hpm.evaluate import knn

    result = knn.run(config)
    if not is_main_of_environment():
        return
    print_table(("k", "top-1 %"), [(str(k), f"{value:.2f}") for k, value in result.top1_by_k.items()])
    print(
        f"\nk = {result.k}: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %; the same encoder untrained "
        f"{result.untrained_top1:.2f} %   ({result.num_train:,} neighbours, {result.num_val:,} images classified)"
    )
    save_evaluation(config.checkpoint, "knn", asdict(result))
    print(f"next:  hpm visualize --checkpoint {config.checkpoint} --images {config.val!r} --out hard.png")
    if as_json:
        print_json(asdict(result))


def evaluate_foreground(arguments: list[str]) -> None:
    """``hpm evaluate foreground``."""
    from hpm.evaluate.config import ForegroundConfig

    config, as_json = parse_with_json(ForegroundConfig, "evaluate foreground", arguments)

    from hpm.distributed import is_main_of_environment
    from hpm.evaluate import foreground

    result = foreground.run(config)
    if not is_main_of_environment():
        return
    print_foreground(result)
    flat = foreground.as_json(result)
    save_evaluation(config.checkpoint, "foreground", flat)
    print(f"next:  hpm visualize --checkpoint {config.checkpoint} --images {config.images!r} --out hard.png")
    if as_json:
        print_json(flat)


def print_foreground(result: Any) -> None:
    """Every measure over all images and by level."""
    rows = [
        (name, *(f"{value:.3f}" for value in finding)) if finding else (name, "-", "-", "-")
        for name, finding in result.measures.items()
    ]
    print_table((f"{result.num_images:,} images", "AUROC", "AP", "pointing game"), rows)
    if result.by_group:
        groups = list(result.by_group)
        print()
        print_table(
            ("AUROC by level", *groups),
            [
                (name, *(f"{f.auroc:.3f}" if (f := result.by_group[g][name]) else "-" for g in groups))
                for name in result.measures
            ],
        )
