"""``hpm ablate``: fill a table honestly. Recipes x seeds, the same evaluations, equal epochs and equal compute.

    OUT/runs/ROW-seedS-DIGEST/     one run per row, seed and budget; DIGEST is of all that decides a result
    OUT/untrained-DIGEST.json      the same evaluations of the untrained encoder
    OUT/SUITE.md  SUITE.csv  SUITE.png      the table, one line per run, the figure: written anew after every run

A run whose config is there already is not repeated, whichever suite made it; one that was killed goes on. Seeds are the
outer loop, so that a table cut short has the same seeds for every row it has.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml

from hpm import distributed
from hpm.ablation.suites import SUITES, AblateConfig, Suite
from hpm.ablation.table import Outcome, Table
from hpm.build import build_normalise, choose_attention
from hpm.checkpoint import write_text_atomically
from hpm.config import RESULT_SECTIONS, Config, resolve_schedule, suggest, with_fields
from hpm.data.loading import default_workers, measure_statistics
from hpm.data.sources import Source, class_indices, fingerprint, open_source
from hpm.errors import DivergedError, InputError, Interrupted
from hpm.evaluate.foreground import predicted_loss_auroc
from hpm.evaluate.knn import LabelledSplit, knn_accuracy, untrained_encoder
from hpm.flops import training_flops
from hpm.log import say, warn
from hpm.pretrain import train
from hpm.recipes import SCALES, recipe
from hpm.run_folder import LoadedRun, RunFolder
from hpm.seeding import Stream, derive_seed
from hpm.stopping import StopSignal
from hpm.visualize import measure_hardness, spread_images

NEIGHBOURS = 20
"""k of the kNN accuracy."""
NUM_HARDNESS_IMAGES = 256
"""Images on which predicted and true loss are compared."""


Budget = Literal["epochs", "compute"]


class Job(NamedTuple):
    """One run of the table."""

    row: str
    seed: int
    budget: Budget
    config: Config
    flops: float
    """Of one training step per image."""
    folder: Path


class Images(NamedTuple):
    """What is learnt from, and what is classified."""

    data: Source
    val: Source | None
    fingerprint: str
    """Of both: figures from other images are not figures of this table."""


def ablate(config: AblateConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Run what is missing of a suite, and write its table.

    Args:
        config: Suite, seeds, folder.
        fields: ``data``, and any other fields of :class:`hpm.config.Config` that are to be the same for every row.
            With ``val``, labelled like ``data``, the table has kNN accuracies.

    Returns:
        The table, as in the ``--json`` line.

    Raises:
        InputError: A name, a field or the data breaks a rule, and nothing was trained; or every run diverged.
        Interrupted: A signal stopped a run after it was saved; the same call goes on.
    """
    suite = _suite(config)
    jobs = plan(config, fields)
    images = _images(jobs[0].config, str(fields.get("val", "")))
    device = distributed.choose_device(jobs[0].config.run.device)
    with StopSignal() as stop, distributed.process_group(device):
        done = [outcome for job in jobs if (outcome := _outcome(job, images))]
        say(f"{config.suite}: {suite.about}\n{len(jobs)} runs, {len(done)} of them done")
        untrained = _untrained(Path(config.out).expanduser(), jobs, images, device)
        _write(config, fields, jobs, images, untrained)
        for number, job in enumerate(jobs, 1):
            if _outcome(job, images) is None:
                distributed.barrier()  # the others must have looked before one of them finishes it
                say(f"run {number} of {len(jobs)}: {job.row}, seed {job.seed}, {_epochs(job)} epochs ({job.budget})")
                _run(job, images, device)
                distributed.barrier()
                _write(config, fields, jobs, images, untrained)
            if distributed.any_process(stop.name is not None):
                raise Interrupted(f"stopped by {stop.name or 'a signal'} after run {number} of {len(jobs)}; the same "
                                  "command goes on from there")  # fmt: skip
    outcomes = [outcome for job in jobs if (outcome := _outcome(job, images))]
    if all(outcome.failed for outcome in outcomes):
        raise InputError(f"every run of the ablation failed; the first: {outcomes[0].failed}")
    return {
        "suite": config.suite,
        "runs": [asdict(outcome) for outcome in outcomes],
        "untrained": untrained,
        "table": str(Path(config.out).expanduser() / f"{config.suite}.md"),
    }


def plan(config: AblateConfig, fields: Mapping[str, Any]) -> list[Job]:
    """Every run of the table, checked; seeds are the outer loop.

    Raises:
        InputError: Names the field, the rule and the value.
    """
    suite = _suite(config)
    if not config.seeds or len(set(config.seeds)) < len(config.seeds) or min(config.seeds) < 0:
        raise InputError(f"seeds: must be different numbers from 0 on, at least one, got {config.seeds}")
    configs, data = _configs(config, suite, fields)
    flops = {row: training_flops(base) for row, base in configs.items()}
    budget_of = flops.get(suite.reference, max(flops.values()))
    jobs = []
    for seed in config.seeds:
        for row, base in configs.items():
            epochs = base.optimisation.epochs
            equal = max(1, round(epochs * budget_of / flops[row]))
            budgets: list[tuple[Budget, int]] = [("epochs", epochs)]
            if config.equal_compute and equal != epochs:
                budgets.append(("compute", equal))
            for budget, length in budgets:
                chosen = with_fields(base, {"seed": seed, "epochs": length})
                jobs.append(Job(row, seed, budget, chosen, flops[row], _folder(Path(config.out), row, chosen, data)))
    return jobs


def _configs(config: AblateConfig, suite: Suite, fields: Mapping[str, Any]) -> tuple[dict[str, Config], str]:
    """The config of every row, and the fingerprint of the training images.

    Raises:
        InputError: Names the field, the rule and the value.
    """
    if config.scale and config.scale not in SCALES:
        raise InputError(
            f"scale: no scale {config.scale!r}{suggest(config.scale, SCALES)}; there are {', '.join(SCALES)}"
        )
    configs = {row: recipe(f"{row}-{config.scale}" if config.scale else row) for row in suite.rows}
    _check_fields(fields, configs)
    # The ablation measures at the end, the same for all: looks during training would only take time.
    same = {"figures": False, "knn": False, **fields, "val": ""}
    first = with_fields(next(iter(configs.values())), same)
    source = _open(first.data.data, first, "data")
    if not first.data.mean and first.data.channels != 3:
        same["mean"], same["std"] = measure_statistics(source)
    different: dict[str, Config] = {}
    for row, base in configs.items():
        chosen = with_fields(base, same)
        resolve_schedule(chosen.optimisation, len(source))
        if twin := next((name for name, other in different.items() if other == chosen), None):
            warn(f"{row} is the same run as {twin} here; left out")
        else:
            different[row] = chosen
    return different, fingerprint(source)


def _suite(config: AblateConfig) -> Suite:
    """The suite, with the rows that were asked for.

    Raises:
        InputError: There is no such suite.
    """
    if config.suite not in SUITES:
        raise InputError(
            f"suite: no suite {config.suite!r}{suggest(config.suite, SUITES)}; there are {', '.join(SUITES)}"
        )
    suite = SUITES[config.suite]
    if not config.rows:
        return suite
    if len(set(config.rows)) < len(config.rows):
        raise InputError(f"rows: must be different, got {', '.join(config.rows)}")
    return suite._replace(rows=config.rows)


def _check_fields(fields: Mapping[str, Any], configs: Mapping[str, Config]) -> None:
    """Refuse fields that would make rows alike, or that the ablation sets itself.

    Raises:
        InputError: Names the field.
    """
    for name in fields:
        if name == "seed":
            raise InputError("seed: every row runs with several; give seeds")
        values = {
            row: value
            for row, config in configs.items()
            for section in dataclasses.asdict(config).values()
            for key, value in section.items()
            if key == name
        }
        if len({repr(value) for value in values.values()}) > 1:
            told = ", ".join(f"{row}: {value!r}" for row, value in values.items())
            raise InputError(f"{name}: cannot be the same for every row, because the rows differ in it ({told})")


def _folder(out: Path, row: str, config: Config, data: str) -> Path:
    """The run folder of a config on some images: one that is there already, whatever row made it, or a new one."""
    named = dataclasses.replace(config, data=dataclasses.replace(config.data, data=data))
    digest = _digest({section: asdict(getattr(named, section)) for section in RESULT_SECTIONS})
    runs = out.expanduser() / "runs"
    there = sorted(runs.glob(f"*-{digest}"))
    return there[0] if there else runs / f"{row}-seed{config.optimisation.seed}-{digest}"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _epochs(job: Job) -> int:
    return job.config.optimisation.epochs


def _open(spec: str, config: Config, field: str) -> Source:
    return open_source(spec, channels=config.data.channels, image_size=config.data.size, field=field)


def _images(base: Config, val_spec: str) -> Images:
    """Training and validation images; labels are needed on both where there is a validation source.

    Raises:
        InputError: Labels are missing or do not fit.
    """
    data = _open(base.data.data, base, "data")
    if not val_spec:
        say("no val: the table will have no accuracy, only losses and rank correlations")
        return Images(data, None, fingerprint(data))
    val = _open(val_spec, base, "val")
    for name, source in (("data", data), ("val", val)):
        if source.labels is None:
            raise InputError(f"{name}: for accuracies both data and val need labels, and {name} has none")
    class_indices(val.labels or [], sorted(set(data.labels or [])))
    if len(data) < NEIGHBOURS:
        raise InputError(f"data: needs at least {NEIGHBOURS} images for {NEIGHBOURS}-NN, got {len(data)}")
    return Images(data, val, f"{fingerprint(data)} {fingerprint(val)}")


def _run(job: Job, images: Images, device: torch.device) -> None:
    """Train and measure one run; one that diverges leaves a note instead of figures."""
    try:
        train(job.config, job.folder)
        figures: dict[str, Any] = measure(job.folder, images, device)
    except DivergedError as error:  # on every process alike
        warn(f"{job.row}, seed {job.seed}: {error}\n(remove {job.folder} to try again)")
        figures = {"failed": str(error).splitlines()[0]}
    if distributed.is_main():
        RunFolder(job.folder).save_evaluation("ablation", {"images": images.fingerprint, **figures})


@torch.no_grad()
def measure(folder: Path, images: Images, device: torch.device) -> dict[str, float]:
    """The figures of one run: kNN accuracy, rank correlation on full images, foreground AUROC where masks are known.

    Rank correlation is the mean over images of Spearman's between the teacher's scores of the full image and the
    student's loss on each patch, averaged over ten random masks.
    """
    loaded = LoadedRun(folder, device=device)
    config, figures = loaded.config, {}
    choose_attention(loaded.student, device)
    choose_attention(loaded.teacher, device)
    bf16 = config.run.precision != "float32" and distributed.has_bf16(device)
    if images.val is not None:
        figures["knn_top1"] = _knn(loaded.student.encoder, config, images.data, images.val, device, bf16)
    if loaded.student.predictor is not None and distributed.is_main():
        shown = images.val or images.data
        figures["rank_correlation"] = _rank_correlation(loaded, shown, bf16)
        if shown.groups() is not None:
            figures["foreground_auroc"] = predicted_loss_auroc(
                loaded.teacher, loaded.normalise, shown, size=config.data.size, device=device, bf16=bf16
            )
    return figures


def _rank_correlation(loaded: LoadedRun, shown: Source, bf16: bool) -> float:
    """In parts of a size that any device can hold."""
    generator = torch.Generator().manual_seed(derive_seed(0, Stream.FIGURES))
    parts = spread_images(shown, NUM_HARDNESS_IMAGES, loaded.config.data.size).split(32)
    total = 0.0
    for part in parts:
        hardness = measure_hardness(
            loaded.student, loaded.teacher, loaded.method, loaded.normalise(part.to(loaded.device)), share=0.0,
            bf16=bf16, generator=generator,
        )  # fmt: skip
        total += hardness.rank_correlation * len(part)
    return total / sum(len(part) for part in parts)


def _knn(
    encoder: torch.nn.Module, config: Config, data: Source, val: Source, device: torch.device, bf16: bool
) -> float:
    split = LabelledSplit(data, val, list(range(len(data))), list(range(len(val))), sorted(set(data.labels or [])))
    accuracy = knn_accuracy(
        encoder, split, build_normalise(config).to(device), size=config.data.size, ks=(NEIGHBOURS,),
        temperature=0.07, pooling="mean", device=device, bf16=bf16,
        workers=default_workers() if config.run.workers is None else config.run.workers,
    )  # fmt: skip
    return accuracy[NEIGHBOURS][0]


def _outcome(job: Job, images: Images) -> Outcome | None:
    """What a run came to, if it is done and was measured on these images."""
    folder = RunFolder(job.folder)
    file = folder.evaluations / "ablation.json"
    if not file.is_file():
        return None
    result, figures = folder.result() or {}, json.loads(file.read_text())
    if figures["images"] != images.fingerprint:
        return None
    samples = result.get("samples_seen", 0)
    return Outcome(
        row=job.row,
        seed=job.seed,
        budget=job.budget,
        epochs=_epochs(job),
        samples=samples,
        gflop_per_image=job.flops / 1e9,
        pflop=job.flops * samples / 1e15,
        seconds=result.get("seconds"),
        reconstruction_loss=result.get("reconstruction_loss"),
        knn_top1=figures.get("knn_top1"),
        rank_correlation=figures.get("rank_correlation"),
        foreground_auroc=figures.get("foreground_auroc"),
        failed=figures.get("failed"),
        folder=str(job.folder),
    )


def _untrained(out: Path, jobs: list[Job], images: Images, device: torch.device) -> dict[int, float]:
    """kNN accuracy of a random start for every seed; all rows of a seed have the same."""
    if images.val is None:
        return {}
    found = {}
    for job in _first_of_each_seed(jobs):
        sizes = dataclasses.replace(job.config.data, data="")
        file = (
            out / f"untrained-{_digest([asdict(job.config.model), asdict(sizes), images.fingerprint, job.seed])}.json"
        )
        if not file.is_file():
            distributed.barrier()
            say(f"untrained encoder, seed {job.seed}")
            encoder = untrained_encoder(job.config, device)
            choose_attention(encoder, device)
            bf16 = job.config.run.precision != "float32" and distributed.has_bf16(device)
            accuracy = _knn(encoder, job.config, images.data, images.val, device, bf16)
            if distributed.is_main():
                out.mkdir(parents=True, exist_ok=True)
                write_text_atomically(file, json.dumps({"knn_top1": accuracy}) + "\n")
            distributed.barrier()
        found[job.seed] = float(json.loads(file.read_text())["knn_top1"])
    return found


def _first_of_each_seed(jobs: list[Job]) -> Iterator[Job]:
    seen: set[int] = set()
    for job in jobs:
        if job.seed not in seen:
            seen.add(job.seed)
            yield job


def _write(
    config: AblateConfig, fields: Mapping[str, Any], jobs: list[Job], images: Images, untrained: dict[int, float]
) -> None:
    """Write the tables of what is done, with what a number needs beside it: who made it, and how."""
    if not distributed.is_main():
        return
    outcomes = [outcome for job in jobs if (outcome := _outcome(job, images))]
    if not outcomes:
        return
    made = [yaml.safe_load(RunFolder(outcome.folder).config_file.read_text())["about"] for outcome in outcomes]
    makers = sorted(
        {", ".join(f"{key} {run[key]}" for key in ("hpm", "git", "torch", "timm", "device")) for run in made}
    )
    about = {
        "command": shlex.join(["hpm", *sys.argv[1:]]),
        "scale": config.scale or "none",
        "fields": ", ".join(f"{name} {value}" for name, value in fields.items()),
        "runs made by": "; ".join(makers),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    longer = {job.row for job in jobs if job.budget == "compute"}
    table = Table(config.suite, jobs[0].row, _suite(config).about, outcomes, longer, untrained, about)
    table.write(Path(config.out).expanduser())
