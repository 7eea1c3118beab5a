"""Pre-training: the loop, and everything around it that must not be seen in it.

Everything random is a function of the seed and the step (:mod:`hardpatch.runtime.seeding`), every schedule a function
of the step (:mod:`hardpatch.method.schedules`). So no random state is saved: a checkpoint holds what
:class:`hardpatch.training.state.State` lists, and a run that was killed ends bit-identical to one that was not.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from hardpatch.config.config import Config
from hardpatch.config.recipes import recipe as named_recipe
from hardpatch.config.rules import split_batch
from hardpatch.config.values import load_config, with_fields
from hardpatch.data.loader.loading import Batch, Position
from hardpatch.data.sources import Source, fingerprint
from hardpatch.method.method import Answers, Losses, Student, StudentOutput, Teacher
from hardpatch.method.schedules import ema_decay, untouched_share
from hardpatch.method.targets.tokens import KMeansTokenizer
from hardpatch.method.vit import patch_size
from hardpatch.runs.build import (
    Stage,
    build_normalise,
    build_optimizer,
    build_stages,
    build_student,
    build_target,
    choose_attention,
    compile_blocks,
    embedded_codebook,
    open_images,
    recompute_blocks,
)
from hardpatch.runs.checkpoint import CheckpointFolder
from hardpatch.runs.codebook import fit_codebook
from hardpatch.runs.folder import RunFolder
from hardpatch.runs.schedule import Schedule, branching_step, resolve_schedule
from hardpatch.runs.trackers import check_trackers
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import InputError, Interrupted
from hardpatch.runtime.files import write_text_atomically
from hardpatch.runtime.log import read_metrics, say, warn
from hardpatch.runtime.seeding import Stream, derive_seed, mask_noise
from hardpatch.runtime.signals import StopSignal
from hardpatch.training.batches import open_batches, training_images
from hardpatch.training.branching import beginning_of_branch, branched, cut, open_trunk, plant
from hardpatch.training.budget import keep_to_budget
from hardpatch.training.feeding import Feed, Meal
from hardpatch.training.gate import MiningGate, mining_threshold
from hardpatch.training.meter import Meter
from hardpatch.training.monitor import labelled_validation
from hardpatch.training.reporting import reporting
from hardpatch.training.sharding import check_sharding, exchanging, gathered, parallel, shard
from hardpatch.training.state import Run, State
from hardpatch.weights.adapt import start_from

Resume = Literal["auto", "never", "restart"]


def pretrain(
    data: str | Path,
    out: str | Path,
    *,
    recipe: str = "hpm",
    config: str | Path | None = None,
    branch_from: str | Path | None = None,
    resume: Resume = "auto",
    **fields: Any,
) -> dict[str, Any]:
    """Pre-train a ViT with Hard Patches Mining; what ``hardpatch pretrain`` runs.

    Args:
        data: Images to learn from: a folder, a list, a table, tar shards, or ``shapes:N``.
        out: The run folder.
        recipe: Named starting point, see :mod:`hardpatch.config.recipes`.
        config: A YAML file instead of a recipe.
        branch_from: A run instead of a recipe, with a constant learning rate: goes on in ``out`` from the last
            checkpoint before it fell, with other ``epochs``.
        resume: ``auto`` goes on with an unfinished run in ``out``; ``never`` refuses to; ``restart`` starts over.
        **fields: Any field of :class:`hardpatch.config.config.Config` by its name, e.g. ``epochs=100``.

    Returns:
        The figures of the run, as in ``result.json``.

    Raises:
        InputError: A field, the data or the folder breaks a rule.
        Interrupted: A signal stopped the run after it was saved.
    """
    if branch_from is not None and (config is not None or recipe != "hpm"):
        raise InputError(f"branch_from: takes the place of recipe and config, got {config or recipe!r} as well")
    trunk = None
    if branch_from is not None:
        base, trunk = beginning_of_branch(branch_from, out, resume=resume)
    else:
        base = load_config(Path(config)) if config is not None else named_recipe(recipe)
    return train(with_fields(base, {"data": str(data), **fields}), Path(out), resume=resume, trunk=trunk)


def train(config: Config, out: Path, *, resume: Resume = "auto", trunk: RunFolder | None = None) -> dict[str, Any]:
    """Run a whole config in a folder: start, go on or branch off a trunk, train, evaluate, report."""
    if trunk is not None:
        config = branched(open_trunk(trunk), config)
    device = distributed.choose_device(config.run.device)
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        stack.enter_context(distributed.process_group(device))
        stack.enter_context(_kernels(config.run.deterministic))
        folder = RunFolder(out)
        stack.callback(folder.release)
        run = prepare(config, folder, device=device, resume=resume, trunk=trunk)
        if run.state.step >= run.schedule.total_steps and (finished := run.folder.result()):
            say(f"{run.folder.path} holds a finished run of {run.schedule.total_steps} steps; nothing to do")
            return finished
        try:
            train_steps(run, stop)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"micro_batch_size: the device's memory is too small for {config.run.micro_batch_size or 'all'} "
                f"images at once; give a smaller one, the result stays the same ({str(error).splitlines()[0]})"
            ) from None
        return finish(run)


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


def prepare(
    config: Config, folder: RunFolder, *, device: torch.device, resume: Resume, trunk: RunFolder | None = None
) -> Run:
    """Check everything that can be checked before work starts, and put the run together.

    Args:
        config: Of the run.
        folder: Where it lives.
        device: Where it is trained.
        resume: As in :func:`pretrain`.
        trunk: The run that this one branches off; None: it begins afresh, or goes on.

    Raises:
        InputError: Names the field, the rule and the value.
    """
    distributed.from_main(lambda: check_trackers(config.run.trackers))  # only the main process needs them
    config = keep_to_budget(config)
    config, source = open_images(config)
    schedule = resolve_schedule(config.optimisation, len(source))
    position = _position(config)
    target = build_target(config)
    student = build_student(config, target_dim=target.dim)
    stages = build_stages(config, student, target)
    folder.check_usable(config, resume)
    distributed.barrier()  # before any process makes anything there
    labelled_validation(config)
    kept = branching_step(config, schedule)
    _check_disk(folder.path, student, config.run.keep_last + (kept is not None))

    checkpoints = CheckpointFolder(
        folder.checkpoints, keep_last=config.run.keep_last, keep_steps=config.run.keep_steps, kept=kept
    )
    sharded = config.run.sharding == "full"
    if not sharded:  # or only the shares go there
        student.to(device)
    if isinstance(target, nn.Module):
        target.to(device)
    bf16 = distributed.is_bf16(config.run.precision, device)
    choose_attention(student, device, bf16=bf16)
    teacher = Teacher(student)
    codebook = embedded_codebook(target)
    # Decided by one process: another may look when the first has written there.
    fresh = distributed.from_main(lambda: resume == "restart" or not checkpoints.steps())
    images = fingerprint(source)
    cuttings: list[dict[str, Any]] = []  # on the main process, which alone needs it
    if fresh and trunk is not None:
        distributed.from_main(
            lambda: cuttings.append(cut(trunk, config, schedule, images=images, num_images=len(source)))
        )
    elif fresh:
        _begin(config, source, student, teacher, codebook)
    if config.run.activation_checkpointing:
        recompute_blocks(student)
    if compiled := distributed.is_compiled(config.run.compile, device):
        compile_blocks(student, teacher)
    if sharded:
        shard(student, teacher, device)
    gate = MiningGate(mining_threshold(config), device)
    optimizer = build_optimizer(config.optimisation, student)
    state = State(student, teacher, optimizer, gate, codebook)
    if distributed.is_main():
        folder.claim()
        if resume == "restart":
            folder.clear()
        checkpoints.clear_temporary()
    if fresh and trunk is not None:
        distributed.from_main(lambda: _plant(trunk, cuttings[0], config, schedule, folder, device))
    distributed.barrier()
    if saved := checkpoints.load_latest():
        if saved["images"] != images:
            raise InputError(
                f"data: {config.data.data!r} does not hold the images this run began with ({saved['images']}; now "
                f"{images}): order and schedules would change. Bring them back, or start over with --resume restart"
            )
        state.load(saved)
        say(f"going on with {folder.path} at step {state.step} of {schedule.total_steps}")
    elif distributed.is_main():
        folder.write_config(config, device, schedule)
    return Run(config, folder, device, bf16, compiled, source, schedule, position, stages, state, checkpoints, images)


def _plant(
    trunk: RunFolder,
    cutting: dict[str, Any],
    config: Config,
    schedule: Schedule,
    folder: RunFolder,
    device: torch.device,
) -> None:
    """Start as a branch; config first and checkpoint last, so that a folder left half made is branched off again."""
    folder.write_config(config, device, schedule)
    plant(trunk, cutting, config, folder)


def _begin(
    config: Config, source: Source, student: Student, teacher: Teacher, codebook: KMeansTokenizer | None
) -> None:
    """What only a run that starts afresh needs: weights to start from, a codebook fitted to the images."""
    if config.model.init_from:
        say(start_from(config, student, teacher))
        distributed.barrier()  # the weights may be those of the run that restart is about to clear
    if codebook is not None:
        codebook.adopt(_fit_codebook(config, source, codebook))


def _fit_codebook(config: Config, source: Source, codebook: KMeansTokenizer) -> torch.Tensor:
    """Fit the codebook on the main process, for all of them.

    Raises:
        InputError: The images have too few different patches.
    """
    images, normalise = training_images(config, source), build_normalise(config)
    seed = config.optimisation.seed
    return distributed.from_main(
        lambda: fit_codebook(images, normalise, codebook.pixels, vocabulary=codebook.vocabulary, seed=seed)
    )


def _position(config: Config) -> Position:
    """Split the global batch over processes and micro-batches.

    Raises:
        InputError: It does not divide, or a micro-batch is larger than the share of a process.
    """
    processes = distributed.world_size()
    if config.run.sharding == "full":
        check_sharding(processes=processes)
    return Position(distributed.rank(), processes, split_batch(config, processes=processes))


def _check_disk(path: Path, student: Student, kept: int) -> None:
    """Refuse a run whose checkpoints cannot fit: student, teacher and two moments, one more than is kept.

    Raises:
        InputError: Too little space.
    """
    needed = 4 * 4 * sum(p.numel() for p in student.parameters()) * (kept + 1)
    needed -= sum(file.stat().st_size for file in path.glob("checkpoints/step_*.pt"))
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(
            f"out: {str(path)!r} needs about {needed / 1e9:.1f} GB for {kept} checkpoints (keep_last, and the one "
            f"before a cool-down) and one being written, and {free / 1e9:.1f} GB are free"
        )


def train_steps(run: Run, stop: StopSignal) -> None:
    """The loop: from the run's step to the last one.

    Raises:
        Interrupted: A signal arrived; the run is saved.
        InputError: The loss is not finite any more, too many images are damaged, or the disk is full.
    """
    config, state, schedule, device = run.config, run.state, run.schedule, run.device
    _announce(run)
    model = parallel(state.student, device)
    parameters = [p for p in state.student.parameters() if p.requires_grad]
    meter = Meter(device)
    slices = run.position.slices(config.optimisation.batch_size)
    opened = open_batches(run)
    with (
        reporting(run) as report,
        closing(opened.batches) as batches,  # workers leave before the process does
        opened.naming,
    ):

        def fetch() -> Batch:
            batch, damaged = meter.next_batch(batches)
            report.damaged(damaged)
            return batch

        feed = Feed(
            partial(_ask, run) if run.method.needs_teacher else None,
            build_normalise(config).to(device),
            patch=patch_size(state.student.encoder),
            steps_per_batch=config.method.steps_per_batch,
            num_micro_batches=len(slices),
        )
        report.start()
        meter.restart()
        for step in range(state.step, schedule.total_steps):
            for group in state.optimizer.param_groups:
                group["lr"] = schedule.learning_rate(step)
            torch.manual_seed(derive_seed(config.optimisation.seed, Stream.STEP, step, run.position.rank))
            stage = run.stage(step)
            noise = mask_noise(
                config.optimisation.seed, step,
                batch_size=config.optimisation.batch_size, num_patches=math.prod(stage.grid), device=device,
            )  # fmt: skip
            step_loss, correlation = torch.zeros(2, device=device)
            for number, meal in enumerate(feed.meals(step, stage, fetch)):
                with exchanging(model, last=number == len(slices) - 1):
                    losses = _forward(run, model, meal, noise[slices[number]], step)
                    (losses.total / len(slices)).backward()
                meter.add(losses)
                step_loss += losses.total.detach()
                correlation += losses.rank_correlation / len(slices)
            state.gate.update(correlation)
            norm = gathered(torch.nn.utils.clip_grad_norm_(parameters, config.optimisation.gradient_clip or math.inf))
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            if run.method.needs_teacher or state.student.predictor is not None:
                state.teacher.update(state.student, ema_decay(step, schedule.ema))
            meter.end_step(step, step_loss, norm)
            state.step = step + 1
            report.after_step(meter)
            if distributed.any_process(stop.name is not None) and run.may_stop:
                report.before_stop(meter)
                run.save()
                distributed.barrier()  # torchrun ends all processes with the first: not before the save is done
                raise Interrupted(
                    f"stopped by {stop.name or 'a signal to another process'} and saved at step {state.step} of "
                    f"{schedule.total_steps}; the same command goes on from there"
                )


def _ask(run: Run, stage: Stage, images: torch.Tensor) -> Answers:
    """What the teacher says, under the run's precision."""
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
        return stage.method.ask(run.state.teacher, images)


def _forward(run: Run, model: Callable[..., StudentOutput], meal: Meal, noise: torch.Tensor, step: int) -> Losses:
    """The method's step under the run's precision."""
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
        teacher = run.state.teacher if run.method.needs_teacher else None
        num_hard = run.state.gate.admit(run.num_hard(step))
        method = run.stage(step).method
        return method.step(
            model, teacher, meal.images, noise, num_hard=num_hard, answers=meal.answers, valid=meal.valid
        )


def _announce(run: Run) -> None:
    """Say what is about to happen, and warn of what would go wrong silently."""
    schedule, config = run.schedule, run.config
    if not distributed.is_main():
        return
    rows, columns = run.state.student.encoder.patch_embed.grid_size
    say(
        f"{len(run.source):,} images, {config.optimisation.epochs} epochs of {schedule.steps_per_epoch} steps of "
        f"{config.optimisation.batch_size}; {config.model.encoder} on {rows}x{columns} patches, "
        f"{run.method.num_hidden} hidden; {run.device.type}, {'bf16' if run.bf16 else 'float32'}, "
        f"{run.position.world_size} process(es), {run.position.num_micro_batches} micro-batch(es)"
    )
    if config.run.residual_precision == "bf16" and not run.bf16:
        warn("residual_precision bf16 is ignored: this run computes in float32 (--precision float32, or no bf16 here)")
    if schedule.ramp_steps > schedule.total_steps:
        side = f" and images of {run.stage(schedule.total_steps - 1).grid} patches" if len(run.stages) > 1 else ""
        warn(
            f"this run ends before its schedules do (schedule_epochs {config.optimisation.schedule_epochs}): with a "
            f"hard share of {run.hard_share(schedule.total_steps - 1):.2f}{side}; more epochs would reach their ends"
        )
    stale = untouched_share(schedule.ema, schedule.total_steps)
    if run.method.needs_teacher and stale > 0.05 and not config.model.init_from:
        warn(
            f"after this run the teacher will still be {stale:.0%} its own random start (EMA decay "
            f"{schedule.ema.start:g} to {schedule.ema.end:g} over {schedule.total_steps} steps): what it says will be "
            "close to noise. "
            + (
                "Train for more epochs or with a smaller batch."
                if config.optimisation.ema_start is None
                and config.optimisation.ema_end is None
                and config.optimisation.ema_ramp_epochs is None
                else "Leave ema_start, ema_end and ema_ramp_epochs unset to adapt them to the length of the run."
            )
        )


def finish(run: Run) -> dict[str, Any]:
    """Write ``result.json`` and the report of a run whose last step is done."""
    if not run.state.gate.is_open() and distributed.is_main():
        warn(
            "this run ended with random masks: the rank correlation of predicted and true loss, averaged over about "
            f"the last 50 steps from 0, is {float(run.state.gate.correlation):+.2f}, below mining_threshold "
            f"{run.state.gate.threshold:g}. Train longer, or lower --mining-threshold (0: mine from the first step)"
        )
    records = read_metrics(run.folder.path)
    training = [record for record in records if "reconstruction_loss" in record]
    knn = {record["step"]: record["knn_top1"] for record in records if "knn_top1" in record}
    result: dict[str, Any] = {
        "run": str(run.folder.path),
        "steps": run.state.step,
        "samples_seen": run.state.step * run.config.optimisation.batch_size,
        "seconds": run.state.seconds,
        "images_per_second": run.state.step * run.config.optimisation.batch_size / max(run.state.seconds, 1e-9),
        "reconstruction_loss": training[-1]["reconstruction_loss"] if training else None,
        "prediction_loss": training[-1]["prediction_loss"] if training else None,
        "predictor_rank_correlation": training[-1]["predictor_rank_correlation"] if training else None,
    }
    if costs := [record["overhead_over_mae"] for record in records if "overhead_over_mae" in record]:
        result["overhead_over_mae"] = costs[-1]
    if knn:
        result |= {"knn_top1": knn[max(knn)], "knn_top1_untrained": knn.get(0)}
    if distributed.is_main():
        write_text_atomically(run.folder.result_file, json.dumps(result, indent=2) + "\n")
        if run.config.run.figures:
            from hardpatch.figures.report import write_report

            write_report(run.folder)
    return result
