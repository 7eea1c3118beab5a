"""``hardpatch plan``."""

from __future__ import annotations

from typing import Any

from hardpatch.cli.flags import parse_with_fields
from hardpatch.cli.output import print_json, print_table, show


def plan(arguments: list[str]) -> None:
    """``hardpatch plan``."""
    from hardpatch.config.plan import PlanConfig, duration

    config, given, as_json = parse_with_fields(PlanConfig, "plan", arguments, planned=True)

    from hardpatch.tools.plan.plan import run

    result = run(config, given)
    images = result["images"]
    labels = f"{images['classes']} classes" if images["classes"] else "no labels"
    show(f"{images['number']:,} images, about {images['width']}x{images['height']} px, {labels}; "
          f"{result['versions']['device']}, {result['processes']} process(es)\n")  # fmt: skip
    header = ("encoder", "parameters", "memory", "images/s", f"epochs in {config.budget}", "")
    print_table(header, [_cells(row, result, images["number"]) for row in result["candidates"]])
    show("~ reckoned by FLOPs, not timed; memory is counted, with a quarter on top; parameters with the decoders\n")
    chosen = result["config"]
    height, width = chosen["image_size"]
    patches = "the encoder's patches" if chosen["patch_size"] is None else f"patches of {chosen['patch_size']}"
    show(
        f"proposed: {result['encoder']} on {width}x{height} px in {patches}, {result['epochs']} epochs "
        f"({result['steps']:,} steps of {chosen['batch_size']}), about {duration(3600 * result['hours'])}"
    )
    for line in result["advice"]:
        show(f"mind:  {line}")
    show(f"next:  {result['command_from_file' if config.out else 'command']}")
    if as_json:
        print_json(result)


def _cells(row: dict[str, Any], result: dict[str, Any], num_images: int) -> tuple[str, ...]:
    notes = ["<- proposed"] if row["name"] == result["encoder"] else []
    if not row["fits"]:
        notes.append("does not fit")
    if num_images < row["min_images"]:
        notes.append(f"for {row['min_images']:,} images and more")
    if row["micro_batch_size"]:
        notes.append(f"micro-batches of {row['micro_batch_size']}")
    if row["activation_checkpointing"]:
        notes.append("recomputes activations")
    if row["sharding"] != "none":
        notes.append("sharded")
    rate = f"{'' if row['measured'] else '~'}{row['images_per_second']:.3g}"
    return (
        row["name"], f"{row['parameters'] / 1e6:.1f} M", f"{row['memory_bytes'] / 1e9:.1f} GB", rate,
        f"{row['epochs']:,}", ", ".join(notes),
    )  # fmt: skip
