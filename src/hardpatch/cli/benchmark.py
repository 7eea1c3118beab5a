"""``hardpatch benchmark``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hardpatch.cli.flags import parse
from hardpatch.cli.output import print_json, print_table
from hardpatch.runtime.errors import Interrupted


def benchmark_step(arguments: list[str]) -> None:
    """``hardpatch benchmark step``."""
    from hardpatch.config.benchmark import StepConfig

    config, as_json = parse(StepConfig, "benchmark step", arguments)

    from hardpatch.tools.benchmark import step

    next_command = "hardpatch pretrain --recipe hpm-fast-in-pixels --data IMAGES --out RUN"
    _report(step.run(config), config.out, next_command, as_json=as_json)


def benchmark_data(arguments: list[str]) -> None:
    """``hardpatch benchmark data``."""
    from hardpatch.config.benchmark import LoadingConfig

    config, as_json = parse(LoadingConfig, "benchmark data", arguments)

    from hardpatch.tools.benchmark import data

    result = data.run(config)
    print(f"{result['images']}; {result['device']}, one core")
    header, *rows = data.table(result)
    print_table(header, rows)
    for line in data.verdict(result):
        print(line)
    for name, lines in result.get("profile", {}).items():
        print(f"\nwhere the time of {name} goes:")
        print_table(("function", "share"), [(function, f"{share:.1%}") for function, share in lines.items()])
    if config.out:
        data.save(result, Path(config.out))
        print(f"look:  {Path(config.out).with_suffix('.png')}")
    print(
        "next:  hardpatch data pack SRC --out DIR    shards that are quick to read; "
        "hardpatch pretrain --cache ram, where they fit"
    )
    if as_json:
        print_json(result)


def benchmark_peers(arguments: list[str]) -> None:
    """``hardpatch benchmark peers``."""
    from hardpatch.config.benchmark import PeersConfig

    config, as_json = parse(PeersConfig, "benchmark peers", arguments)

    from hardpatch.tools.benchmark import peers

    _report(peers.run(config), config.out, "hardpatch benchmark step    what mining costs on top", as_json=as_json)


def _report(result: dict[str, Any], out: str, next_command: str, *, as_json: bool) -> None:
    from hardpatch.tools.benchmark import timing

    print(
        f"{result['model']} at {result['settings']['image_size']} px, batch {result['settings']['batch_size']}, "
        f"{result['precision']}{', compiled' if result['compiled'] else ''}, {result['device']}; {result['measured']}"
    )
    header, *rows = timing.table(result)
    print_table(header, rows)
    peaks = ", ".join(f"{name} {value:.2f}" for name, value in result["matmul_peak_tflops"].items())
    print(f"\nmeasured matrix peak, TFLOP/s: {peaks}; the share is of the bf16 one")
    for name, shares in result.get("profile", {}).items():
        print(f"\nwhere the time of {name} goes:")
        print_table(("operation", "share"), [(operation, f"{share:.1%}") for operation, share in shares.items()])
    if out:
        timing.save(result, Path(out))
        print(f"look:  {Path(out).with_suffix('.png')}")
    print(f"next:  {next_command}")
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
