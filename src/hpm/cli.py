"""The command ``hpm``: parses, calls, prints. Everything it does can be done from Python as well.

Exit codes: 0 done; 2 the input was wrong; 3 stopped by a signal after saving, 130 by Ctrl-C without; 1 a fault of
hpm's.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from hpm.errors import InputError, Interrupted

USAGE = """\
usage: hpm COMMAND ...

  demo                   the main job on embedded data: pre-train, evaluate, figures, report
  pretrain               learn from images:  hpm pretrain --data photos/ --out runs/photos
  evaluate knn           accuracy of the k nearest neighbours, beside the untrained encoder
  evaluate foreground    how well the predicted loss finds objects, beside simple measures
  ablate                 compare recipes with several seeds, at equal epochs and at equal compute
  benchmark step         images per second: the published step, ours, the fast presets, MAE, in turns
  benchmark peers        our MAE mode beside transformers' and lightly's
  visualize              what is hard in given images, as a figure
  convert                published HPM and MAE checkpoints to ours and back
  recipes                the named starting points for pretrain

hpm COMMAND --help explains a command; hpm --version prints versions.
"""


@dataclass(frozen=True)
class PretrainCommand:
    """Pre-train a ViT with Hard Patches Mining, or go on with a run that was stopped.

    The fields below are the config; a recipe or a YAML file gives them other defaults, flags override both.
    """

    out: str
    """Run folder."""
    recipe: str = "hpm"
    """Named starting point, see hpm recipes."""
    config: str | None = None
    """YAML file instead of a recipe."""
    resume: Literal["auto", "never", "restart"] = "auto"
    """auto: go on with an unfinished run in the folder; never: refuse to; restart: start over."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


@dataclass(frozen=True)
class VisualizeCommand:
    """Draw images, their loss under ten masks, the predicted loss, the mask it leads to, and the reconstruction."""

    checkpoint: str
    """Run folder or checkpoint file."""
    images: str
    """Images, any source."""
    out: str
    """Figure to write, .png."""
    count: int = 8
    """How many images, spread over the source."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


@dataclass(frozen=True)
class DemoCommand:
    """Pre-train on the embedded shapes, evaluate, draw, write a report: a few minutes on two CPU cores."""

    out: str = "runs/demo"
    """Run folder."""
    epochs: int | None = None
    """Passes over the 4,000 images; none: as in the recipe shapes-demo."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and leave with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _dispatch(given)
    except InputError as error:
        _complain(str(error))
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _complain(
            f"the disk is full ({error.strerror}: {error.filename or 'while writing'}); the checkpoints before are "
            "whole: make room and run the same command again"
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        _complain("stopped by Ctrl-C; what was saved before is whole, and the same command goes on from there")
        raise SystemExit(130) from None
    except Interrupted as stopped:
        if os.environ.get("RANK", "0") == "0":
            _say(str(stopped))
        raise SystemExit(3) from None
    raise SystemExit(0)


def _dispatch(arguments: list[str]) -> None:
    commands: dict[tuple[str, ...], Callable[[list[str]], None]] = {
        ("demo",): _demo,
        ("pretrain",): _pretrain,
        ("evaluate", "knn"): _evaluate_knn,
        ("evaluate", "foreground"): _evaluate_foreground,
        ("ablate",): _ablate,
        ("benchmark", "step"): _benchmark_step,
        ("benchmark", "peers"): _benchmark_peers,
        ("visualize",): _visualize,
        ("convert",): _convert,
        ("recipes",): _recipes,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    if arguments[0] == "--version":
        print(_versions())
        return
    for words, command in commands.items():
        if tuple(arguments[: len(words)]) == words:
            command(arguments[len(words) :])
            return
    if arguments[0] in ("evaluate", "benchmark"):
        _no_second_word(arguments[0], arguments[1:], [words[1] for words in commands if words[0] == arguments[0]])
        return

    from hpm.config import suggest

    known = [" ".join(words) for words in commands]
    raise InputError(f"no command {arguments[0]!r}{suggest(arguments[0], known)}; there are {', '.join(known)}")


def _no_second_word(first: str, arguments: list[str], known: list[str]) -> None:
    """List the commands that begin with ``first``.

    Raises:
        InputError: None or an unknown one was given, rather than asked for the list.
    """
    from hpm.config import suggest

    lines = [line for line in USAGE.splitlines() if line.startswith(f"  {first} ")]
    listed = "\n".join([f"usage: hpm {first} NAME ...", "", *lines, "", f"hpm {first} NAME --help explains one."])
    if not arguments:
        raise InputError(f"{first}: needs a name: {', '.join(known)}\n\n{listed}")
    if arguments[0] not in ("-h", "--help"):
        what = {"evaluate": "evaluation"}.get(first, first)
        raise InputError(f"{first}: no {what} {arguments[0]!r}{suggest(arguments[0], known)}\n\n{listed}")
    print(listed)


def _parse(kind: type[Any], prog: str, arguments: list[str]) -> Any:
    """Parse flags into a dataclass; tyro prints help and complains about flags itself, with exit code 2.

    Commands import what they run only after this, so that ``--help`` need not wait for it.
    """
    import tyro

    return tyro.cli(kind, prog=f"hpm {prog}", args=arguments)


def _pretrain(arguments: list[str]) -> None:
    import tyro

    from hpm.config import Config, load_config, validated
    from hpm.recipes import recipe

    # The recipe is looked up before the flags are parsed, so that --help shows its values as the defaults.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--config")
    chosen, _ = first.parse_known_args(arguments)
    if chosen.config and chosen.recipe:
        raise InputError(f"config, recipe: give one, not both, got {chosen.config!r} and {chosen.recipe!r}")
    base = load_config(Path(chosen.config)) if chosen.config else recipe(chosen.recipe or "hpm")
    settings = Annotated[Config, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes]
    with_settings = make_dataclass(
        "PretrainCommand",
        [("settings", settings, field(default=base))],
        bases=(PretrainCommand,),
        namespace={"__doc__": PretrainCommand.__doc__},
        frozen=True,
    )
    command = _parse(with_settings, "pretrain", arguments)

    from hpm.pretrain import train

    result = train(validated(asdict(command.settings)), Path(command.out), resume=command.resume)
    _report_run(command.out, result, as_json=command.json)


def _report_run(out: str, result: dict[str, Any], *, as_json: bool) -> None:
    from hpm import distributed
    from hpm.run_folder import RunFolder

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
    _print_table(("figure", "value"), rows)
    folder = RunFolder(out)
    print(f"\nlook:  {folder.report_file}" if folder.report_file.is_file() else "")
    print(
        "use:   import hpm\n"
        f'       backbone = hpm.load_encoder("{out}")    # a plain timm model\n'
        "       features = backbone.forward_features(images)\n"
        f"next:  hpm evaluate knn --checkpoint {out} --train TRAIN --val VAL"
    )
    if as_json:
        _print_json(result)


def _evaluate_knn(arguments: list[str]) -> None:
    from hpm.evaluate.config import KnnConfig

    config, as_json = _parse_with_json(KnnConfig, "evaluate knn", arguments)

    from hpm.distributed import is_main_of_environment
    from hpm.evaluate import knn

    result = knn.run(config)
    if not is_main_of_environment():
        return
    _print_table(("k", "top-1 %"), [(str(k), f"{value:.2f}") for k, value in result.top1_by_k.items()])
    print(
        f"\nk = {result.k}: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %; the same encoder untrained "
        f"{result.untrained_top1:.2f} %   ({result.num_train:,} neighbours, {result.num_val:,} images classified)"
    )
    _save_evaluation(config.checkpoint, "knn", asdict(result))
    print(f"next:  hpm visualize --checkpoint {config.checkpoint} --images {config.val!r} --out hard.png")
    if as_json:
        _print_json(asdict(result))


def _evaluate_foreground(arguments: list[str]) -> None:
    from hpm.evaluate.config import ForegroundConfig

    config, as_json = _parse_with_json(ForegroundConfig, "evaluate foreground", arguments)

    from hpm.distributed import is_main_of_environment
    from hpm.evaluate import foreground

    result = foreground.run(config)
    if not is_main_of_environment():
        return
    _print_foreground(result)
    flat = foreground.as_json(result)
    _save_evaluation(config.checkpoint, "foreground", flat)
    print(f"next:  hpm visualize --checkpoint {config.checkpoint} --images {config.images!r} --out hard.png")
    if as_json:
        _print_json(flat)


def _print_foreground(result: Any) -> None:
    rows = [
        (name, *(f"{value:.3f}" for value in finding)) if finding else (name, "-", "-", "-")
        for name, finding in result.measures.items()
    ]
    _print_table((f"{result.num_images:,} images", "AUROC", "AP", "pointing game"), rows)
    if result.by_group:
        groups = list(result.by_group)
        print()
        _print_table(
            ("AUROC by level", *groups),
            [
                (name, *(f"{f.auroc:.3f}" if (f := result.by_group[g][name]) else "-" for g in groups))
                for name in result.measures
            ],
        )


def _ablate(arguments: list[str]) -> None:
    import tyro

    from hpm.ablation.suites import AblateConfig
    from hpm.config import Config

    settings = Annotated[Config, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes]
    with_settings = make_dataclass(
        "AblateCommand",
        [("settings", settings, field(default=Config())), ("json", bool, field(default=False))],
        bases=(AblateConfig,),
        namespace={"__doc__": AblateConfig.__doc__},
        frozen=True,
    )
    command = _parse(with_settings, "ablate", arguments)
    # Every row has defaults of its own: only the flags that were given hold for all of them.
    flags = {word.removeprefix("--").split("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
    given = flags | {name.removeprefix("no_") for name in flags}
    values = {name: value for part in asdict(command.settings).values() for name, value in part.items()}
    chosen = AblateConfig(**{item.name: getattr(command, item.name) for item in fields(AblateConfig)})

    from hpm import distributed
    from hpm.ablation.ablate import ablate

    result = ablate(chosen, {name: value for name, value in values.items() if name in given})
    if not distributed.is_main_of_environment():
        return
    print(Path(result["table"]).read_text())
    if (figure := Path(result["table"]).with_suffix(".png")).is_file():
        print(f"look:  {figure}")
    useful = sorted((run for run in result["runs"] if not run["failed"]), key=lambda r: r["rank_correlation"] is None)
    run = useful[0]["folder"]
    print(f"next:  hpm visualize --checkpoint {run} --images {values['data']!r} --out hard.png")
    if command.json:
        _print_json(result)


def _benchmark_step(arguments: list[str]) -> None:
    from hpm.benchmark.config import StepConfig

    config, as_json = _parse_with_json(StepConfig, "benchmark step", arguments)

    from hpm.benchmark import step

    _report_benchmark(step.run(config), config.out, as_json=as_json)
    print("next:  hpm pretrain --recipe hpm-fast-norm-pix --data IMAGES --out RUN")


def _benchmark_peers(arguments: list[str]) -> None:
    from hpm.benchmark.config import PeersConfig

    config, as_json = _parse_with_json(PeersConfig, "benchmark peers", arguments)

    from hpm.benchmark import peers

    _report_benchmark(peers.run(config), config.out, as_json=as_json)
    print("next:  hpm benchmark step    what mining costs on top")


def _report_benchmark(result: dict[str, Any], out: str, *, as_json: bool) -> None:
    from hpm.benchmark import step

    print(
        f"{result['model']} at {result['settings']['image_size']} px, batch {result['settings']['batch_size']}, "
        f"{result['precision']}{', compiled' if result['compiled'] else ''}, {result['device']}; {result['measured']}"
    )
    header, *rows = step.table(result)
    _print_table(header, rows)
    peaks = ", ".join(f"{name} {value:.2f}" for name, value in result["matmul_peak_tflops"].items())
    print(f"\nmeasured matrix peak, TFLOP/s: {peaks}; the share is of the bf16 one")
    if out:
        step.save(result, Path(out))
        print(f"look:  {Path(out).with_suffix('.png')}")
    if as_json:
        _print_json(result)


def _visualize(arguments: list[str]) -> None:
    command = _parse(VisualizeCommand, "visualize", arguments)

    from hpm.visualize import visualize

    correlation = visualize(command.checkpoint, command.images, Path(command.out), count=command.count)
    if math.isnan(correlation):
        print(f"{command.out}: true loss, masks and reconstruction; this run has no loss predictor")
        print(f"next:  hpm evaluate knn --checkpoint {command.checkpoint} --train TRAIN --val VAL")
    else:
        print(f"{command.out}: rank correlation of predicted and true loss {correlation:+.3f}")
        print(f"next:  hpm evaluate foreground --checkpoint {command.checkpoint} --images IMAGES --masks MASKS")
    if command.json:
        _print_json({"figure": command.out, "rank_correlation": correlation})


def _convert(arguments: list[str]) -> None:
    from hpm.weights.config import ConvertConfig

    config, as_json = _parse_with_json(ConvertConfig, "convert", arguments)

    from hpm.weights import convert

    result = convert.run(config)
    rows = [
        ("holds", ", ".join(result.parts)),
        ("teacher", result.teacher or "none"),
        ("encoder", f"{result.encoder}, {result.encoder_heads} heads"),
        ("image size", f"{result.image_size[0]}x{result.image_size[1]}, patches of {result.patch_size}"),
        ("tensors", str(result.tensors)),
    ]
    if result.decoder_heads is not None:
        rows.insert(3, ("decoders", f"{result.decoder_heads} heads"))
    if result.left_aside:
        rows.append(("left aside", ", ".join(result.left_aside)))
    _print_table((result.to, result.kind), rows)
    if result.kind == "checkpoint":
        print(
            f"\nnext:  hpm visualize --checkpoint {result.to} --images IMAGES --out hard.png\n"
            f"       hpm pretrain --init-from {result.to} --data IMAGES --out RUN"
        )
    elif result.kind == "encoder":
        print(f'\nuse:   import hpm\n       backbone = hpm.load_encoder("{result.to}")    # a plain timm model')
        print("       features = backbone.forward_features(images)")
    else:
        print(f'\nuse:   import torch\n       state = torch.load("{result.to}", weights_only=True)["model"]')
        print("       model.load_state_dict(state)    # build it with the heads above: the file does not say them")
    if as_json:
        _print_json(result._asdict())


def _demo(arguments: list[str]) -> None:
    command = _parse(DemoCommand, "demo", arguments)

    from hpm.demo import run_demo

    result, found = run_demo(Path(command.out), epochs=command.epochs)
    _print_foreground(found)
    print()
    _report_run(command.out, result, as_json=command.json)


def _recipes(arguments: list[str]) -> None:
    from hpm.ablation.suites import SUITES
    from hpm.recipes import METHODS, SCALES, TARGETS, shapes_demo

    if arguments and arguments[0] not in ("-h", "--help"):
        raise InputError(f"recipes: takes no arguments, got {arguments}")
    print("A recipe is METHOD[-TARGET][-SCALE]: hpm, mae-norm-pix, hpm-both-norm-pix-64px, mae-imagenet-800\n")
    for title, table in (
        ("METHOD", {**METHODS, "shapes-demo": shapes_demo}), ("TARGET", TARGETS), ("SCALE", SCALES),
    ):  # fmt: skip
        rows = [(name, (make.__doc__ or "").strip().splitlines()[0]) for name, make in table.items()]
        _print_table((title, "what it is"), rows)
        print()
    _print_table(("SUITE", "hpm ablate compares"), [(name, ", ".join(suite.rows)) for name, suite in SUITES.items()])
    print()
    print("Without a target: raw pixels, or the method's own. Without a scale: ViT-B/16, 224 px, 200 epochs.")
    print("next:  hpm pretrain --recipe NAME --data SRC --out RUN   (hpm pretrain --recipe NAME --help: its values)")


def _parse_with_json(kind: type[Any], prog: str, arguments: list[str]) -> tuple[Any, bool]:
    """Evaluations are configured by their own dataclass; ``--json`` is the command line's."""
    as_json = "--json" in arguments
    return _parse(kind, f"{prog} [--json]", [word for word in arguments if word != "--json"]), as_json


def _save_evaluation(checkpoint: str, name: str, figures: dict[str, Any]) -> None:
    """Keep an evaluation in the run folder and refresh its report."""
    from hpm.report import write_report
    from hpm.run_folder import RunFolder

    folder = RunFolder(checkpoint)
    if not folder.config_file.is_file():
        return
    try:
        folder.save_evaluation(name, figures)
        write_report(folder)
    except OSError as error:
        _say(f"could not keep the result in {folder.path}: {error.strerror}")


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain aligned table on standard output."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    for line in (header, ["-" * width for width in widths], *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def _print_json(figures: dict[str, Any]) -> None:
    """One line, in which a figure that is not there is null: NaN is no JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    print(json.dumps(plain(figures), allow_nan=False))


def _versions() -> str:
    from hpm.distributed import choose_device
    from hpm.run_folder import versions

    return ", ".join(f"{name} {value}" for name, value in versions(choose_device("auto")).items())


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _complain(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    print(f"hpm: {message}" if rank == "0" else f"hpm [process {rank}]: {message}", file=sys.stderr)
