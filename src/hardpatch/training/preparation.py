"""Everything that can be checked before work starts, and the putting together of a run."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from hardpatch.config.config import Config
from hardpatch.config.rules import split_batch
from hardpatch.data.loader.loading import Position
from hardpatch.data.sources import Source, fingerprint
from hardpatch.data.tools.describe import say_scenes, say_what_is_left
from hardpatch.data.tools.parts import told_classes, warn_of_shared
from hardpatch.method.hpm import HPM
from hardpatch.method.method import Method
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
from hardpatch.runs.schedule import resolve_schedule
from hardpatch.runs.trackers import check_trackers
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import say
from hardpatch.runtime.waiting import note_kept
from hardpatch.training.branching import Branch
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
    config, source, images = _open_alike(config, device)
    schedule, position = resolve_schedule(config.optimisation, len(source)), _position(config)
    target = build_target(config)
    student = build_student(config, target_dim=target.dim)
    method = build_method(config, student, target)
    folder.check_usable(config, resume)
    distributed.barrier()  # before any process makes anything there
    if (val := labelled_validation(config)) is not None:
        distributed.from_main(lambda: warn_of_shared(source, val))
    say(told_classes(source))
    kept = schedule.branching_step
    _check_disk(folder.path, student, config.run.keep_last + (kept is not None))
    checkpoints = CheckpointFolder(
        folder.checkpoints, keep_last=config.run.keep_last, keep_steps=config.run.keep_steps, kept=kept
    )
    # Decided by one process: another may look when the first has written there.
    fresh = distributed.from_main(lambda: resume == "restart" or not checkpoints.steps())
    branch = Branch(parent, config, schedule, folder) if fresh and parent is not None else None
    if branch is not None:
        distributed.from_main(lambda: branch.find(images=images, num_images=len(source)))
    state, compiled = _put_together(config, source, student, method, device, begins=fresh and branch is None)
    if distributed.is_main():
        folder.claim()
        if resume == "restart" or (branch is None and not folder.has_begun):
            folder.clear()
        checkpoints.clear_temporary()
    if branch is not None:
        distributed.from_main(lambda: branch.start(device))
    distributed.barrier()
    note_kept(checkpoints.path)  # the main process may save alone
    saved = distributed.on_every(checkpoints.load_latest)
    there = "no checkpoint" if saved is None else f"a checkpoint of step {saved['step']}"
    distributed.require_same({f"newest in {str(folder.path)!r} (has every machine the same disk?)": there})
    if saved is not None:
        if saved["images"] != images:
            raise InputError(
                f"data: {config.data.data!r} does not hold the images this run began with ({saved['images']}; now "
                f"{images}): order and schedules would change. Bring them back, or start over with --resume restart"
            )
        state.load(saved)
        say(f"going on with {folder.path} at step {state.step} of {schedule.total_steps}")
    if distributed.is_main() and (saved is None or folder.is_config_damaged):
        folder.write_config(config, device, schedule)
    bf16 = distributed.is_bf16(config.run.precision, device)
    return Run(config, folder, device, bf16, compiled, source, schedule, position, state, checkpoints, images)


def _open_alike(config: Config, device: torch.device) -> tuple[Config, Source, str]:
    """The config with what is found in the images, the images, and their fingerprint: the same in every process.

    Raises:
        InputError: Nothing there, or processes do not see the same.
    """
    config, source = distributed.on_every(lambda: open_images(config))
    say_what_is_left(source)
    say_scenes(source, config.data.data, config.data.size)
    images = fingerprint(source)
    fields = {name: value for part in asdict(config).values() for name, value in part.items()}
    own = ("data", "val", "download_dir", "workers", "device")  # paths and machines may differ
    distributed.require_same(
        {"images": images, "device": device.type, "bf16": distributed.is_bf16(config.run.precision, device)}
        | {name: value for name, value in fields.items() if name not in own}
    )
    return config, source, images


def _put_together(
    config: Config, source: Source, student: Student, method: Method, device: torch.device, *, begins: bool
) -> tuple[State, bool]:
    """All that changes, on the device; and whether it is compiled.

    A run that ``begins`` afresh takes over the weights that it starts from, and its target is fitted to the images.
    """
    sharded = config.run.sharding == "full"
    if not sharded:  # or only the shares go there
        student.to(device)
    if isinstance(target := method.target, nn.Module):
        target.to(device)
    choose_attention(student, device, bf16=distributed.is_bf16(config.run.precision, device))
    model = HPM(student, method)
    if begins and config.model.init_from:
        say(start_from(config, student, model.teacher))
        distributed.barrier()  # the weights may be those of the run that restart is about to clear
    if begins and isinstance(target, FittedTarget):
        target.adopt(fit_target(config, source, target))
    if config.run.activation_checkpointing:
        recompute_blocks(student)
    if compiled := distributed.is_compiled(config.run.compile, device):
        compile_blocks(*model.networks)
    if sharded:
        shard(student, model.teacher, device)
    gate = MiningGate(mining_threshold(config), device)
    return State(model, build_optimizer(config.optimisation, student), gate), compiled


def _position(config: Config) -> Position:
    """Split the global batch over processes and micro-batches."""
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
