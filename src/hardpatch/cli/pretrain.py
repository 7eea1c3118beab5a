"""``hardpatch pretrain``, ``hardpatch demo``."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict, dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from hardpatch.cli.evaluate import print_foreground
from hardpatch.cli.flags import parse
from hardpatch.cli.output import print_json, print_table
from hardpatch.runtime.errors import InputError


@dataclass(frozen=True)
class PretrainCommand:
    """Pre-train a ViT with Hard Patches Mining, or go on with a run that was stopped.

    The fields below are the config; a recipe or a YAML file gives them other defaults, flags override both.
    """

    out: str
    """Run folder."""
    recipe: str = "hpm"
    """Named starting point, see hardpatch recipes."""
    config: str | None = None
    """YAML file instead of a recipe."""
    branch_from: str | None = None
    """Run instead of a recipe, with a constant learning rate: go on in --out from where it had not yet fallen, with
    other --epochs (longer or shorter); the run stays as it is."""
    resume: Literal["auto", "never", "restart"] = "auto"
    """auto: go on with an unfinished run in the folder; never: refuse to; restart: start over."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


def pretrain(arguments: list[str]) -> None:
    """``hardpatch pretrain``."""
    import tyro

    from hardpatch.config.config import Config
    from hardpatch.config.recipes import recipe
    from hardpatch.config.values import load_config, validated

    # The recipe is looked up before the flags are parsed, so that --help shows its values as the defaults.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--config")
    first.add_argument("--branch-from", "--branch_from")
    first.add_argument("--out", default="")
    first.add_argument("--resume", default="auto")
    chosen, _ = first.parse_known_args(arguments)
    trunk = None
    given = {name: value for name in ("recipe", "config", "branch_from") if (value := getattr(chosen, name))}
    if len(given) > 1:
        raise InputError(f"{', '.join(given)}: give one, not both, got {', '.join(map(repr, given.values()))}")
    if chosen.branch_from:
        from hardpatch.training.branching import beginning_of_branch

        base, trunk = beginning_of_branch(chosen.branch_from, chosen.out, resume=chosen.resume)
    else:
        base = load_config(Path(chosen.config)) if chosen.config else recipe(chosen.recipe or "hpm")
    settings = Annotated[Config, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes]
    with_settings = make_dataclass(
        "PretrainCommand",
        [("settings", settings, field(default=base))],
        bases=(PretrainCommand,),
        namespace={"__doc__": PretrainCommand.__doc__},
        frozen=True,
    )
    command = parse(with_settings, "pretrain", arguments)

    from hardpatch.training.loop import train

    result = train(validated(asdict(command.settings)), Path(command.out), resume=command.resume, trunk=trunk)
    report_run(command.out, result, as_json=command.json)


def report_run(out: str, result: dict[str, Any], *, as_json: bool) -> None:
    """The figures of a run, and what to do with it."""
    from hardpatch.config.values import load_config
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
    folder = RunFolder(out)
    print(f"\nlook:  {folder.report_file}" if folder.report_file.is_file() else "")
    print(
        "use:   import hardpatch\n"
        f'       backbone = hardpatch.load_encoder("{out}")    # a plain timm model\n'
        "       features = backbone.forward_features(images)\n"
        f"next:  hardpatch evaluate knn --checkpoint {out} --train TRAIN --val VAL"
    )
    optimisation = load_config(folder.config_file).optimisation
    if optimisation.learning_rate_schedule == "constant":
        longer = shlex.join(["--branch-from", out, "--out", f"{out.rstrip('/')}-longer"])
        print(f"more:  hardpatch pretrain {longer} --epochs {2 * optimisation.epochs}")
    if as_json:
        print_json(result)


@dataclass(frozen=True)
class DemoCommand:
    """Pre-train on the embedded shapes, evaluate, draw, write a report: a few minutes on two CPU cores."""

    out: str = "runs/demo"
    """Run folder."""
    epochs: int | None = None
    """Passes over the 4,000 images; none: as in the recipe shapes-demo."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


def demo(arguments: list[str]) -> None:
    """``hardpatch demo``."""
    command = parse(DemoCommand, "demo", arguments)

    from hardpatch.tools.demo import run_demo

    result, found = run_demo(Path(command.out), epochs=command.epochs)
    print_foreground(found)
    print()
    report_run(command.out, result, as_json=command.json)
