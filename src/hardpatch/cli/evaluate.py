"""``hardpatch evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from hardpatch.cli.flags import parse
from hardpatch.cli.output import print_json, print_table, save_evaluation


def evaluate_knn(arguments: list[str]) -> None:
    """``hardpatch evaluate knn``."""
    from hardpatch.config.evaluations import KnnConfig

    config, as_json = parse(KnnConfig, "evaluate knn", arguments)

    from hardpatch.evaluate.classify import knn
    from hardpatch.runtime.distributed import is_main_of_environment

    result = knn.run(config)
    if not is_main_of_environment():
        return
    print_table(("k", "top-1 %"), [(str(k), f"{value:.2f}") for k, value in result.top1_by_k.items()])
    print(
        f"\nk = {result.k}: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %; the same encoder untrained "
        f"{result.untrained_top1:.2f} %   ({result.num_train:,} neighbours, {result.num_val:,} images classified)\n"
    )
    print_standings(result.standings)
    # Neighbours by predicted loss are no measure of the features: beside the others, not in their place.
    name = "knn_hardness" if config.pooling == "hardness" else "knn"
    save_evaluation(config.checkpoint, name, as_plain(result))
    print(f"next:  hardpatch visualize --checkpoint {config.checkpoint} --images {config.val!r} --out hard.png")
    if as_json:
        print_json(as_plain(result))


def evaluate_linear(arguments: list[str]) -> None:
    """``hardpatch evaluate linear``."""
    from hardpatch.config.evaluations import LinearConfig

    config, as_json = parse(LinearConfig, "evaluate linear", arguments)

    from hardpatch.evaluate.classify import linear
    from hardpatch.runtime.distributed import is_main_of_environment

    result = linear.run(config)
    if not is_main_of_environment():
        return
    print_standings(result.standings)
    if result.few_labels:
        print()
        print_few_labels(result.few_labels)
    print()
    print_classes(result.per_class)
    setting = "learning rate" if config.mode == "sgd" else "C"
    told = ", ".join(f"{name} {value:g}" for name, value in result.chosen.items())
    print(
        f"\n{result.num_train:,} images of {result.num_classes} classes, {result.num_val:,} images classified; "
        f"{setting}: {told}" + ("" if result.held_out_top1 is None else " (chosen on a held-out tenth of train)")
    )
    name = "linear" if config.mode == "sgd" else "logistic"
    name += "_hardness" if config.pooling == "hardness" else ""
    save_evaluation(config.checkpoint, name, as_plain(result), config.out)
    if result.picture:
        print(f"look:  {result.picture}")
    print(f"next:  hardpatch visualize --checkpoint {config.checkpoint} --images {config.val!r} --out hard.png")
    if as_json:
        print_json(as_plain(result))


def print_standings(rows: Sequence[Any], *, what: str = "encoder") -> None:
    """Every encoder by the same protocol, and by how much this run is ahead of it."""
    print_table(
        (what, "top-1 %", "95 % interval", "top-5 %", "this run is ahead by"),
        [
            (
                row.name, f"{row.top1:.2f}", "{:.1f} to {:.1f}".format(*row.top1_interval), f"{row.top5:.2f}",
                "" if row.lead is None else f"{row.lead:+.2f} ({'{:+.1f} to {:+.1f}'.format(*row.lead_interval)})",
            )
            for row in rows
        ],
    )  # fmt: skip


def print_few_labels(items: Sequence[Any]) -> None:
    """Top-1 by labels per class (rows) and encoder (columns)."""
    names = list(dict.fromkeys(item.name for item in items))
    counts = list(dict.fromkeys(item.labels_per_class for item in items))
    found = {(item.labels_per_class, item.name): item for item in items}
    print_table(
        ("labels per class", *(f"{name}, top-1 %" for name in names)),
        [(str(count), *(_mean_and_spread(found[count, name]) for name in names)) for count in counts],
    )


def _mean_and_spread(item: Any) -> str:
    return f"{item.top1:.2f}" + ("" if item.deviation is None else f" ± {item.deviation:.2f}")


def evaluate_finetune(arguments: list[str]) -> None:
    """``hardpatch evaluate finetune``."""
    from hardpatch.config.evaluations import FinetuneConfig

    config, as_json = parse(FinetuneConfig, "evaluate finetune", arguments)

    from hardpatch.evaluate.classify import finetune
    from hardpatch.runtime.distributed import is_main_of_environment

    result = finetune.run(config)
    if not is_main_of_environment():
        return
    print_standings(result.standings, what="fine-tuned from")
    print()
    print_classes(result.per_class)
    print(
        f"\n{result.num_train:,} images of {result.num_classes} classes, {result.epochs} epochs in "
        f"{result.seconds / 60:.1f} minutes; {result.num_val:,} images classified, after the last epoch"
    )
    save_evaluation(config.checkpoint, "finetune", as_plain(result))
    print(f"look:  {result.folder}/confusion.png  {result.folder}/per_class.csv")
    if len(result.standings) == 1:
        print(
            "next:  the same command with --untrained, for what pre-training gave (costs the same again); or in Python:"
        )
    else:
        print("next, in Python:")
    print(
        "  import hardpatch, timm\n"
        f"  model = hardpatch.load_classifier({result.folder!r})    # a plain timm model\n"
        "  transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        '  names = model.pretrained_cfg["label_names"]; names[model(transform(image)[None]).argmax()]'
    )
    if as_json:
        print_json(as_plain(result))


def print_classes(per_class: Sequence[Any], *, most: int = 12) -> None:
    """Class by class; of many classes the worst and the best."""
    measured = sorted((item for item in per_class if item.num_images), key=lambda item: item.top1)
    some = measured if len(measured) <= most else [*measured[: most // 2], None, *measured[-(most // 2) :]]
    print_table(
        ("class", "images", "recognised %", "precision %", "mistaken for"),
        [
            (item.name, str(item.num_images), *map(_percent, (item.top1, item.precision)), item.mistaken_for)
            if item
            else ("...", "", "", "", "")
            for item in some
        ],
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def as_plain(result: Any) -> dict[str, Any]:
    """A result as plain values: named tuples as objects, too."""

    def plain(value: Any) -> Any:
        if hasattr(value, "_asdict"):
            return {key: plain(item) for key, item in value._asdict().items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return {item.name: plain(getattr(result, item.name)) for item in fields(result)}


def evaluate_foreground(arguments: list[str]) -> None:
    """``hardpatch evaluate foreground``."""
    from hardpatch.config.evaluations import ForegroundConfig

    config, as_json = parse(ForegroundConfig, "evaluate foreground", arguments)

    from hardpatch.evaluate import foreground
    from hardpatch.runtime.distributed import is_main_of_environment

    result = foreground.run(config)
    if not is_main_of_environment():
        return
    print_foreground(result)
    flat = foreground.as_json(result)
    save_evaluation(config.checkpoint, "foreground", flat)
    print(f"next:  hardpatch visualize --checkpoint {config.checkpoint} --images {config.images!r} --out hard.png")
    if as_json:
        print_json(flat)


IMAGE_ALONE = ("patch_variance", "edge_density")
"""Measures that are the same whatever model looks."""


def print_foreground(result: Any) -> None:
    """Every measure over all images and by level."""
    rows = [
        (name, *(f"{value:.3f}" for value in finding)) if finding else (name, *"-----")
        for name, finding in result.measures.items()
    ]
    print_table((f"{result.num_images:,} images", "AUROC", "AP", "pointing game", "best box IoU", "box IoU"), rows)
    for name, measures in result.others.items():
        known = {measure: finding for measure, finding in measures.items() if finding and measure not in IMAGE_ALONE}
        print()
        print_table(
            (name, "AUROC", "AP", "pointing game", "best box IoU", "box IoU"),
            [(measure, *(f"{value:.3f}" for value in finding)) for measure, finding in known.items()],
        )
    print(f"(box IoU: one threshold for all images; the whole image as a box: {result.whole_image_iou:.3f})")
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


def evaluate_segment(arguments: list[str]) -> None:
    """``hardpatch evaluate segment``."""
    from hardpatch.config.dense_evaluations import SegmentConfig

    config, as_json = parse(SegmentConfig, "evaluate segment", arguments)

    from hardpatch.evaluate.dense import segment
    from hardpatch.runtime.distributed import is_main_of_environment

    result = segment.run(config)
    if not is_main_of_environment():
        return
    total = max(1, sum(item.pixels for item in result.per_class))
    print_table(
        ("class", "IoU %", "untrained", "pixels %"),
        [
            (item.name, _two_places(item.iou), _two_places(item.untrained_iou), f"{100 * item.pixels / total:.2f}")
            for item in result.per_class
        ],
    )
    kind = "fine-tuned" if result.finetuned else "frozen"
    print(
        f"\n{result.head} head on the {kind} encoder: mean IoU {result.miou:.2f} %, pixel accuracy "
        f"{result.pixel_accuracy:.2f} %; the same encoder untrained {_two_places(result.untrained_miou)} %, "
        f"{_two_places(result.untrained_pixel_accuracy)} %   ({result.num_train:,} training images, "
        f"{result.num_val:,} validation images, {result.steps:,} steps, seed {config.seed})"
    )
    for name, miou in result.against.items():
        print(f"{name}: mean IoU {miou:.2f} %")
    figures = as_plain(result)
    save_evaluation(config.checkpoint, "segment", figures, config.out)
    if result.figure:
        print(f"look:  {result.figure}")
    if result.head == "linear":
        print("next:  the same with --head upernet --finetune    what the encoder can be trained to")
    else:
        print(f"next:  hardpatch visualize --checkpoint {config.checkpoint} --images {config.images!r} --out hard.png")
    if as_json:
        print_json(figures)


def evaluate_detect(arguments: list[str]) -> None:
    """``hardpatch evaluate detect``."""
    from hardpatch.config.dense_evaluations import DetectConfig

    config, as_json = parse(DetectConfig, "evaluate detect", arguments)

    from hardpatch.evaluate.dense import detect
    from hardpatch.runtime.distributed import is_main_of_environment

    result = detect.run(config)
    if not is_main_of_environment():
        return
    print_table(
        ("COCO AP %", "encoder", "untrained"),
        [
            ("boxes, IoU 0.5 to 0.95", _two_places(result.ap), _two_places(result.untrained_ap)),
            ("boxes, IoU 0.5", _two_places(result.ap50), _two_places(result.untrained_ap50)),
            ("masks, IoU 0.5 to 0.95", _two_places(result.mask_ap), _two_places(result.untrained_mask_ap)),
            ("masks, IoU 0.5", _two_places(result.mask_ap50), _two_places(result.untrained_mask_ap50)),
        ],
    )
    print(
        f"\nMask R-CNN on the {'frozen' if result.frozen else 'fine-tuned'} encoder: {result.num_train:,} training "
        f"images, {result.num_val:,} validation images with {result.num_val_instances:,} instances, "
        f"{result.steps:,} steps, seed {config.seed}"
    )
    for name, ap in result.against.items():
        print(f"{name}: AP of boxes {_two_places(ap)} %")
    save_evaluation(config.checkpoint, "detect", as_plain(result), config.out)
    if result.figure:
        print(f"look:  {result.figure}")
    if config.untrained:
        print(
            f"next:  hardpatch visualize --checkpoint {config.checkpoint} "
            f"--images {config.train_images!r} --out hard.png"
        )
    else:
        print("next:  the same with --untrained    what of this the pre-training gave")
    if as_json:
        print_json(as_plain(result))


def _two_places(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
