"""``hardpatch pretrain``, ``hardpatch demo``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hardpatch.cli.flags import parse, parse_with_fields
from hardpatch.cli.output import print_json, print_section, print_table, show
from hardpatch.runtime.text import quoted


def pretrain(arguments: list[str]) -> None:
    """``hardpatch pretrain``."""
    from hardpatch.config.commands import PretrainCommand
    from hardpatch.config.plan import PlanConfig, check_starts
    from hardpatch.config.recipes import recipe
    from hardpatch.config.values import load_config, with_fields

    # The start is looked up before the flags are parsed, so that --help shows its values as the defaults.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("recipe", "config", "branch_from", "budget"):
        first.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name)
    first.add_argument("--out", default="")
    first.add_argument("--resume", default="auto")
    chosen, _ = first.parse_known_args(arguments)
    starts = {name: getattr(chosen, name) or None for name in ("recipe", "config", "branch_from")}
    check_starts(starts, chosen.budget)
    parent = None
    if chosen.branch_from:
        from hardpatch.training.branching import beginning_of_branch

        base, parent = beginning_of_branch(chosen.branch_from, chosen.out, resume=chosen.resume)
    else:
        base = load_config(Path(chosen.config)) if chosen.config else recipe(chosen.recipe or PlanConfig.method)
    planned = not any(starts.values()) or bool(chosen.budget)
    command, fields, as_json = parse_with_fields(PretrainCommand, "pretrain", arguments, base=base, planned=planned)
    is_known = chosen.config or chosen.branch_from

    from hardpatch.data.tools.parts import with_parts
    from hardpatch.tools.first_run import choose_config
    from hardpatch.training.pretrain import train

    fields = with_parts(fields)
    if is_known:
        config = with_fields(base, fields)
    else:
        config = choose_config(fields, command.out, recipe=command.recipe, budget=command.budget, resume=command.resume)
    result = train(config, Path(command.out), resume=command.resume, parent=parent)
    report_run(command.out, result, as_json=as_json)


def report_run(out: str, result: dict[str, Any], *, as_json: bool) -> None:
    """The figures of a run, and what to do with it."""
    from hardpatch.config.plan import duration
    from hardpatch.config.values import load_config
    from hardpatch.figures.report import what_next
    from hardpatch.runs.folder import RunFolder
    from hardpatch.runtime import distributed

    if not distributed.is_main_of_environment():
        return
    names = {
        "steps": "{:,}",
        "samples_seen": "{:,}",
        "seconds": "{:.0f}",
        "images_per_second": "{:.0f}",
        "reconstruction_loss": "{:.4f}",
        "predictor_rank_correlation": "{:+.3f}",
        "knn_top1": "{:.1f} %",
        "knn_top1_untrained": "{:.1f} %",
    }
    rows = [(name, form.format(result[name])) for name, form in names.items() if result.get(name) is not None]
    print_table(("figure", "value"), rows)
    parts = {"start": "start_seconds", "steps": "train_seconds", "looks": "looks_seconds",
             "checkpoints": "checkpoints_seconds"}  # fmt: skip
    if all(name in result for name in parts.values()):
        show("time:  " + ", ".join(f"{part} {duration(result[name])}" for part, name in parts.items()))
    if "verdict" in result:
        show(f"\n{result['verdict_sentence']}")
        for line in result["verdict_advice"]:
            show(f"mind:  {line}")
    folder = RunFolder(out)
    show(f"\nlook:  {folder.report_file}" if folder.report_file.is_file() else "")
    config = load_config(folder.config_file)
    show(
        "use:   import hardpatch\n"
        f"       backbone = hardpatch.load_encoder({out!r})    # a plain timm model\n"
        "       features = backbone.forward_features(images)\n"
        f"next:  {what_next(config, out, labelled='knn_top1' in result)[0].command}"
    )
    if config.optimisation.learning_rate_schedule == "constant":
        longer = " ".join(map(quoted, ["--branch-from", out, "--out", f"{out.rstrip('/')}-longer"]))
        show(f"more:  hardpatch pretrain {longer} --epochs {2 * config.optimisation.epochs}")
    if as_json:
        print_json(result)


def demo(arguments: list[str]) -> None:
    """``hardpatch demo``."""
    from hardpatch.config.commands import DemoCommand

    command, as_json = parse(DemoCommand, "demo", arguments)

    from hardpatch.evaluate import foreground
    from hardpatch.tools.demo import run_demo

    result, found = run_demo(Path(command.out), epochs=command.epochs)
    print_section(foreground.describe(found.figures()))
    report_run(command.out, result, as_json=as_json)
