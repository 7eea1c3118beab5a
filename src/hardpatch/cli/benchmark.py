"""``hardpatch benchmark``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hardpatch.cli.flags import parse
from hardpatch.cli.output import print_json, print_table, show
from hardpatch.runtime.errors import Interrupted


def benchmark_step(arguments: list[str]) -> None:
    """``hardpatch benchmark step``."""
    from hardpatch.config.benchmark import StepConfig

    config, as_json = parse(StepConfig, "benchmark step", arguments)

    from hardpatch.tools.benchmark import step

    next_command = "hardpatch plan --help    # sizes and length for images and a time"
    report_steps(step.run(config), config.out, next_command, as_json=as_json)


def benchmark_data(arguments: list[str]) -> None:
    """``hardpatch benchmark data``."""
    from hardpatch.config.benchmark import LoadingConfig

    config, as_json = parse(LoadingConfig, "benchmark data", arguments)

    from hardpatch.tools.benchmark import data
    from hardpatch.tools.benchmark.presentation import loader_table, save

    result = data.run(config)
    show(f"{result['images']}; {result['device']}, one core")
    header, *rows = loader_table(result)
    print_table(header, rows)
    for line in data.verdict(result):
        show(line)
    if config.out:
        save(result, Path(config.out), "images_per_second_per_core", "plain", f"{result['images']}; {result['device']}")
        show(f"look:  {Path(config.out).with_suffix('.png')}")
    show("next:  hardpatch data pack --help    # shards that are quick to read; or --cache ram, where images fit")
    if as_json:
        print_json(result)


def report_steps(result: dict[str, Any], out: str, next_command: str, *, as_json: bool) -> None:
    """Print what steps take, save it where a file is named, and leave with the code that the measuring earned.

    Raises:
        Interrupted: A signal stopped it, and less was measured than was asked for.
    """
    from hardpatch.tools.benchmark.presentation import save, step_table

    about = (
        f"{result['model']} at {result['settings']['image_size']} px, batch {result['settings']['batch_size']}, "
        f"{result['precision']}{', compiled' if result['compiled'] else ''}, {result['device']}; {result['measured']}"
    )
    show(about)
    header, *rows = step_table(result)
    print_table(header, rows)
    peaks = ", ".join(f"{name} {value:.2f}" for name, value in result["matmul_peak_tflops"].items())
    show(f"\nmeasured matrix peak, TFLOP/s: {peaks}; the share is of the first")
    if out:
        save(result, Path(out), "images_per_second", "reference" if result["ratio_to_reference"] else "mae", about)
        show(f"look:  {Path(out).with_suffix('.png')}")
    show(f"next:  {next_command}")
    if as_json:
        print_json(result)
    if result["failed"]:
        sys.exit(f"error: {', '.join(result['failed'])} failed, see above; the figures are of the others")
    rounds = len(next(iter(result["images_per_second_rounds"].values())))
    if result["stopped_by"] and (rounds < result["settings"]["rounds"] or result["left_out"]):
        raise Interrupted(
            f"stopped by {result['stopped_by']}: the figures are of {rounds} of {result['settings']['rounds']} rounds"
            + (f", without {', '.join(result['left_out'])}" if result["left_out"] else "")
        )
