"""Pre-training from start to end, once its config is known."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from hardpatch.config.config import Config
from hardpatch.evaluate.reconstruction import Reconstruction, compare_reconstruction
from hardpatch.figures.hardness import spread_images
from hardpatch.method.schedules import untouched_share
from hardpatch.runs.build import build_normalise
from hardpatch.runs.folder import RunFolder
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.files import write_text_atomically
from hardpatch.runtime.log import read_metrics, say, warn
from hardpatch.runtime.seeding import Stream, derive_seed
from hardpatch.runtime.signals import StopSignal
from hardpatch.training.branching import branched, open_parent
from hardpatch.training.loop import train_steps
from hardpatch.training.monitor import labelled_validation
from hardpatch.training.preparation import prepare
from hardpatch.training.state import Resume, Run
from hardpatch.training.verdict import FEW_STEPS, Measured, Verdict, judge

RECONSTRUCTED = 64
"""Images on which the verdict on a run without labels stands."""


def train(config: Config, out: Path, *, resume: Resume = "auto", parent: RunFolder | None = None) -> dict[str, Any]:
    """Run a whole config in a folder: start, go on or branch off a parent, train, evaluate, report."""
    if parent is not None:
        config = branched(open_parent(parent), config)
    began = time.monotonic()
    device = distributed.choose_device(config.run.device)
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        stack.enter_context(distributed.process_group(device))
        stack.enter_context(_kernels(config.run.deterministic))
        folder = RunFolder(out)
        stack.callback(folder.release)
        with stop.at_once("before a step was made; the same command begins where this one did"):
            run = prepare(config, folder, device=device, resume=resume, parent=parent)
        if run.state.step >= run.schedule.total_steps and (finished := run.folder.result()):
            say(f"{run.folder.path} holds a finished run of {run.schedule.total_steps} steps; nothing to do")
            return finished
        run.spent["start"] = time.monotonic() - began
        try:
            train_steps(run, stop)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"micro_batch_size: the device's memory is too small for {config.run.micro_batch_size or 'all'} "
                f"images at once; give a smaller one, the result stays the same ({str(error).splitlines()[0]})"
            ) from None
        return finish(run, began)


@contextmanager
def _kernels(deterministic: bool) -> Iterator[None]:
    """Only deterministic kernels, where asked for."""
    before = torch.are_deterministic_algorithms_enabled()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses
    torch.use_deterministic_algorithms(deterministic or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def finish(run: Run, began: float) -> dict[str, Any]:
    """Write ``result.json`` and the report of a run whose last step is done.

    Args:
        run: The run.
        began: When this command did, by the monotonic clock.
    """
    if not run.state.gate.is_open() and distributed.is_main():
        warn(
            "this run ended with random masks: the rank correlation of predicted and true loss, averaged over about "
            f"the last 50 steps from 0, is {float(run.state.gate.correlation):+.2f}, below mining_threshold "
            f"{run.state.gate.threshold:g}. Train longer, or lower --mining-threshold (0: mine from the first step)"
        )
    records = read_metrics(run.folder.path)
    training = [record for record in records if "reconstruction_loss" in record]
    last = training[-1] if training else {}
    knn = {record["step"]: record["knn_top1"] for record in records if "knn_top1" in record}
    result: dict[str, Any] = {
        "run": str(run.folder.path),
        "steps": run.state.step,
        "samples_seen": run.state.step * run.config.optimisation.batch_size,
        "seconds": time.monotonic() - began,
        "train_seconds": run.state.seconds,
        "start_seconds": run.spent["start"],
        "looks_seconds": run.spent["looks"],
        "checkpoints_seconds": run.spent["checkpoints"],
        "images_per_second": run.state.step * run.config.optimisation.batch_size / max(run.state.seconds, 1e-9),
        **{name: last.get(name) for name in ("reconstruction_loss", "prediction_loss", "predictor_rank_correlation")},
    }
    if knn:
        result |= {"knn_top1": knn[max(knn)], "knn_top1_untrained": knn.get(0)}
    verdict = _verdict(run, training)
    result |= {"verdict": verdict.outcome, "verdict_sentence": verdict.sentence, "verdict_advice": verdict.advice}
    if distributed.is_main():
        write_text_atomically(run.folder.result_file, json.dumps(result, indent=2) + "\n")
        if run.config.run.figures:
            from hardpatch.figures.report import write_report

            try:
                write_report(run.folder)
            except Exception as error:  # drawn from files that may be damaged: the run is done, and its result written
                warn(f"could not write {run.folder.report_file}: {type(error).__name__}: {error}")
    return result


def _verdict(run: Run, records: list[dict[str, Any]]) -> Verdict:
    """What the run came to, by the rules; all processes take part."""
    before, after = distributed.from_main(lambda: [run.folder.right(s) for s in (0, run.schedule.total_steps)])
    right = (before, after) if before and after and len(before) == len(after) else None
    losses = [record["reconstruction_loss"] for record in records]
    method = run.method
    return judge(
        Measured(
            steps=run.state.step,
            images=len(run.source),
            losses=(losses[0], losses[-1]) if losses else None,
            right=right,
            reconstruction=_reconstruction(run) if right is None and run.state.step >= FEW_STEPS else None,
            rank_correlation=records[-1].get("predictor_rank_correlation") if records and method.guide else None,
            random_start=untouched_share(run.schedule.ema, run.schedule.total_steps)
            if method.needs_teacher and not run.config.model.init_from
            else None,
            mining_opened=None if method.guide is None else run.state.gate.is_open(),
            from_weights=bool(run.config.model.init_from),
        )
    )


def _reconstruction(run: Run) -> Reconstruction | None:
    """How well some images are reconstructed: of the validation, where there are, else of those it learnt from."""
    student = run.state.whole(run.config).student
    shown = spread_images(labelled_validation(run.config) or run.source, RECONSTRUCTED, run.config.data.size)
    normalise = build_normalise(run.config).to(run.device)
    with torch.compiler.set_stance("force_eager"):
        return compare_reconstruction(
            student, run.method, normalise(shown.pixels.to(run.device)), bf16=run.bf16, valid=shown.valid,
            generator=torch.Generator().manual_seed(derive_seed(run.config.optimisation.seed, Stream.FIGURES)),
        )  # fmt: skip
