"""Everything that can be checked before work starts, and the putting together of a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hardpatch.config.config import Config
from hardpatch.config.rules import split_batch
from hardpatch.data.loader.loading import Position
from hardpatch.data.sources import Source, fingerprint
from hardpatch.method.hpm import HPM
from hardpatch.method.student import Student
from hardpatch.method.targets.target import FittedTarget
from hardpatch.runs.build import (
    build_method,
    build_optimizer,
    build_student,
    build_target,
    choose_attention,
    compile_blocks,
    open_images,
    recompute_blocks,
)
from hardpatch.runs.checkpoint import CheckpointFolder
from hardpatch.runs.folder import RunFolder
from hardpatch.runs.schedule import Schedule, branching_step, resolve_schedule
from hardpatch.runs.trackers import check_trackers
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import say
from hardpatch.training.branching import copy_branch_point, find_branch_point
from hardpatch.training.fitting import fit_target
from hardpatch.training.gate import MiningGate, mining_threshold
from hardpatch.training.monitor import labelled_validation
from hardpatch.training.sharding import check_sharding, shard
from hardpatch.training.state import Resume, Run, State
from hardpatch.weights.adapt import start_from


def prepare(
    config: Config, folder: RunFolder, *, device: torch.device, resume: Resume, parent: RunFolder | None = None
) -> Run:
    """Check everything that can be checked before work starts, and put the run together.

    Args:
        config: Of the run.
        folder: Where it lives.
        device: Where it is trained.
        resume: As in :func:`pretrain`.
        parent: The run that this one branches off; None: it begins afresh, or goes on.

    Raises:
        InputError: Names the field, the rule and the value.
    """
    distributed.from_main(lambda: check_trackers(config.run.trackers))  # only the main process needs them
    config, source = open_images(config)
    schedule = resolve_schedule(config.optimisation, len(source))
    position = _position(config)
    target = build_target(config)
    student = build_student(config, target_dim=target.dim)
    method = build_method(config, student, target)
    folder.check_usable(config, resume)
    distributed.barrier()  # before any process makes anything there
    labelled_validation(config)
    kept = branching_step(schedule)
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
    model = HPM(student, method)
    # Decided by one process: another may look when the first has written there.
    fresh = distributed.from_main(lambda: resume == "restart" or not checkpoints.steps())
    images = fingerprint(source)
    branch_points: list[dict[str, Any]] = []  # on the main process, which alone needs it
    if fresh and parent is not None:
        distributed.from_main(
            lambda: branch_points.append(
                find_branch_point(parent, config, schedule, images=images, num_images=len(source))
            )
        )
    elif fresh:
        _begin(config, source, model)
    if config.run.activation_checkpointing:
        recompute_blocks(student)
    if compiled := distributed.is_compiled(config.run.compile, device):
        compile_blocks(*model.networks)
    if sharded:
        shard(student, model.teacher, device)
    gate = MiningGate(mining_threshold(config), device)
    optimizer = build_optimizer(config.optimisation, student)
    state = State(model, optimizer, gate)
    if distributed.is_main():
        folder.claim()
        if resume == "restart":
            folder.clear()
        checkpoints.clear_temporary()
    if fresh and parent is not None:
        distributed.from_main(lambda: _start_branch(parent, branch_points[0], config, schedule, folder, device))
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
    return Run(config, folder, device, bf16, compiled, source, schedule, position, state, checkpoints, images)


def _start_branch(
    parent: RunFolder,
    branch_point: dict[str, Any],
    config: Config,
    schedule: Schedule,
    folder: RunFolder,
    device: torch.device,
) -> None:
    """Start as a branch; config first and checkpoint last, so that a folder left half made is branched off again."""
    folder.write_config(config, device, schedule)
    copy_branch_point(parent, branch_point, config, folder)


def _begin(config: Config, source: Source, model: HPM) -> None:
    """What only a run that starts afresh needs: weights to start from, a target fitted to the images."""
    if config.model.init_from:
        say(start_from(config, model.student, model.teacher))
        distributed.barrier()  # the weights may be those of the run that restart is about to clear
    if isinstance(target := model.method.target, FittedTarget):
        target.adopt(fit_target(config, source, target))


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
