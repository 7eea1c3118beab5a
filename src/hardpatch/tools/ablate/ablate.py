"""``hardpatch ablate``: fill a table honestly. Recipes x seeds, the same evaluations, equal epochs, compute and time.

    OUT/runs/ROW-seedS-DIGEST/     one run per row, seed and budget; DIGEST is of all that decides a result
    OUT/step-times-DIGEST.json     what a step of each row takes on this machine, where equal time is asked for
    OUT/untrained-DIGEST.json      the same evaluations of the untrained encoder
    OUT/SUITE.md  SUITE.csv  SUITE.png      the table, one line per run, the figure: written anew after every run

A run whose config is there already is not repeated, whichever suite made it; one that was killed goes on. Seeds are the
outer loop, so that a table cut short has the same seeds for every row it has.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from hardpatch.config.values import decisions
from hardpatch.runs.folder import RunFolder
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import DivergedError, InputError, Interrupted
from hardpatch.runtime.files import write_text_atomically
from hardpatch.runtime.log import say, warn
from hardpatch.runtime.outputs import make_output_folder
from hardpatch.runtime.signals import StopSignal
from hardpatch.tools.ablate.measure import Accuracies, Images, measure, measure_untrained, open_images
from hardpatch.tools.ablate.runs_to_do import Budget, Job, Rows, choose_rows, chosen_suite, digest, plan
from hardpatch.tools.ablate.step_times import StepTimes, TimedStep, known_by, step_times
from hardpatch.tools.ablate.suites import AblateConfig
from hardpatch.tools.ablate.table import Outcome, Table
from hardpatch.training.pretrain import train


def ablate(config: AblateConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Run what is missing of a suite, and write its table.

    Args:
        config: Suite, seeds, folder.
        fields: ``data``, and any other fields of :class:`hardpatch.config.config.Config` that are to be the same for
            every row. With ``val``, labelled like ``data``, the table has kNN and linear accuracies.

    Returns:
        The table, as in the ``--json`` line.

    Raises:
        InputError: A name, a field or the data breaks a rule, and nothing was trained; or every run diverged.
        Interrupted: A signal stopped a run after it was saved; the same call goes on.
    """
    rows = choose_rows(config, fields)
    first = next(iter(rows.configs.values()))
    images = open_images(first, str(fields.get("val", "")))
    make_output_folder(Path(config.out).expanduser())  # before runs lie in it
    device = distributed.choose_device(first.run.device)
    with StopSignal() as stop, distributed.process_group(device):
        times = _step_times(config, rows, device)
        jobs = plan(config, rows, times)
        done = [outcome for job in jobs if (outcome := _outcome(job, images))]
        distributed.require_same({"runs that are done (has every machine the same disk?)": len(done)})
        say(f"{config.suite}: {chosen_suite(config).about}\n{len(jobs)} runs, {len(done)} of them done")
        untrained = _untrained(Path(config.out).expanduser(), jobs, images, device)
        _write(config, fields, rows, jobs, images, untrained, times)
        for number, job in enumerate(jobs, 1):
            if distributed.any_process(stop.name is not None):
                raise Interrupted(f"stopped by {stop.name or 'a signal'} before run {number} of {len(jobs)}; the same "
                                  "command goes on from there")  # fmt: skip
            if _outcome(job, images) is None:
                distributed.barrier()  # the others must have looked before one of them finishes it
                say(f"run {number} of {len(jobs)}: {job.row}, seed {job.seed}, {job.epochs} epochs ({job.budget})")
                _run(job, images, device)
                distributed.barrier()
                _write(config, fields, rows, jobs, images, untrained, times)
    outcomes = [outcome for job in jobs if (outcome := _outcome(job, images))]
    if all(outcome.failed for outcome in outcomes):
        raise InputError(f"every run of the ablation failed; the first: {outcomes[0].failed}")
    return {
        "suite": config.suite,
        "runs": [asdict(outcome) for outcome in outcomes],
        "untrained": {seed: start.knn_top1 for seed, start in untrained.items()},
        "untrained_linear": {seed: start.linear_top1 for seed, start in untrained.items()},
        "table": str(Path(config.out).expanduser() / f"{config.suite}.md"),
    }


def _step_times(config: AblateConfig, rows: Rows, device: torch.device) -> StepTimes | None:
    """What a step of every row takes on this device; None where the table has no view at equal time.

    Raises:
        InputError: They were timed on another device.
    """
    if not config.equal_time:
        return None
    timed = {row: TimedStep.of(base, device) for row, base in sorted(rows.configs.items())}
    file = Path(config.out).expanduser() / f"step-times-{digest(known_by(timed))}.json"
    return distributed.from_main(lambda: step_times(timed, rows.reference, file, device))


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


def _outcome(job: Job, images: Images) -> Outcome | None:
    """What a run came to, if it is done and everything was measured on these images."""
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
        epochs=job.epochs,
        samples=samples,
        gflop_per_image=job.flops / 1e9,
        pflop=job.flops * samples / 1e15,
        seconds=result.get("seconds"),
        reconstruction_loss=result.get("reconstruction_loss"),
        knn_top1=figures.get("knn_top1"),
        linear_top1=figures.get("linear_top1"),
        rank_correlation=figures.get("rank_correlation"),
        foreground_auroc=figures.get("foreground_auroc"),
        failed=figures.get("failed"),
        folder=str(job.folder),
    )


def _untrained(out: Path, jobs: list[Job], images: Images, device: torch.device) -> dict[int, Accuracies]:
    """Accuracies of a random start for every seed; all rows of a seed have the same."""
    if images.val is None:
        return {}
    found = {}
    for seed, job in {job.seed: job for job in reversed(jobs)}.items():
        decided = decisions(job.config)
        known_by = {name: decided[name] for name in decided if name.startswith(("model.", "data."))}
        known_by["data.data"] = images.fingerprint
        file = out / f"untrained-{digest([known_by, seed])}.json"
        if not file.is_file():
            distributed.barrier()  # the others must have looked before it is there
            say(f"untrained encoder, seed {seed}")
            measured = measure_untrained(job.config, images, device)
            if distributed.is_main():
                make_output_folder(out)
                write_text_atomically(file, json.dumps(measured._asdict()) + "\n")
            distributed.barrier()
        found[seed] = Accuracies(**json.loads(file.read_text()))
    return dict(sorted(found.items()))


def _write(
    config: AblateConfig,
    fields: Mapping[str, Any],
    rows: Rows,
    jobs: list[Job],
    images: Images,
    untrained: dict[int, Accuracies],
    times: StepTimes | None,
) -> None:
    """Write the tables of what is done, with what a number needs beside it: who made it, and how."""
    if not distributed.is_main():
        return
    outcomes = [outcome for job in jobs if (outcome := _outcome(job, images))]
    if not outcomes:
        return
    made = [yaml.safe_load(RunFolder(outcome.folder).config_file.read_text())["about"] for outcome in outcomes]
    makers = sorted(
        {", ".join(f"{key} {run[key]}" for key in ("hardpatch", "git", "torch", "timm", "device")) for run in made}
    )
    about = {
        "command": shlex.join(["hardpatch", *sys.argv[1:]]),
        "scale": config.scale or "none",
        "accuracies": "of val" if images.val else "none, because no val was given; the rest is measured on data",
        "fields": ", ".join(f"{name} {value}" for name, value in fields.items()),
        "runs made by": "; ".join(makers),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    longer: dict[Budget, set[str]] = {}
    for job in jobs:
        if job.budget != "epochs":
            longer.setdefault(job.budget, set()).add(job.row)
    about_suite = chosen_suite(config).about
    table = Table(
        config.suite, jobs[0].row, rows.reference, about_suite, outcomes, longer, untrained, about, times or {}
    )
    table.write(Path(config.out).expanduser())
