"""The loop that trains a head, and the encoder below it where asked: exact in its seeds, going on after a kill."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from hardpatch.config.dense_evaluations import DenseConfig
from hardpatch.data.loader.loading import Normalise, Position, TrainingOrder
from hardpatch.method.schedules import adapted_warmup_steps, learning_rate
from hardpatch.runs.checkpoint import CheckpointFolder
from hardpatch.runs.folder import RunFolder
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import InputError, Interrupted
from hardpatch.runtime.log import say, tracked
from hardpatch.runtime.seeding import Stream, derive_seed
from hardpatch.runtime.signals import StopSignal, ignore_in_worker, signals_held

GRADIENT_CLIP = 5.0
"""Largest norm of the gradient."""
CHECK_STEPS = 50
"""Steps between two looks at the loss; each makes the host wait for the device."""


class Plan(NamedTuple):
    """How a training goes."""

    batch_size: int
    """Images per step, all processes together."""
    total_steps: int
    peak_learning_rate: float
    seed: int
    checkpoint_minutes: float
    workers: int


@dataclass(frozen=True)
class Task:
    """What is trained on what."""

    model: nn.Module
    groups: list[dict[str, Any]]
    """Parameter groups of AdamW, optionally with ``lr_scale``."""
    images: Dataset[Any]
    """Takes (pass, index); what it returns must follow from these."""
    num_images: int
    collate: Callable[[list[Any]], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    """Of a collated batch, on whatever device it came."""
    name: str
    """Beside the bar."""


def check_training(config: DenseConfig) -> None:
    """Refuse values that no training can have, before any work.

    Raises:
        InputError: One of them.
    """
    for field, wrong, rule in (
        ("val_share", not 0 < config.val_share < 1, "between 0 and 1"),
        ("batch_size", config.batch_size < 1, "at least 1"),
        ("learning_rate", config.learning_rate is not None and config.learning_rate <= 0, "above 0"),
        ("layer_decay", not 0 < config.layer_decay <= 1, "above 0 and at most 1"),
        ("weight_decay", config.weight_decay < 0, "at least 0"),
        ("width", config.width < 1, "at least 1"),
        ("num_pictures", config.num_pictures < 0, "at least 0"),
        ("workers", config.workers < 0, "at least 0"),
        ("checkpoint_minutes", config.checkpoint_minutes <= 0, "above 0"),
    ):
        if wrong:
            raise InputError(f"{field}: must be {rule}, got {getattr(config, field)}")


def output_folder(config: DenseConfig, name: str) -> Path:
    """Where pictures and checkpoints go.

    Raises:
        InputError: No folder is named and the checkpoint is a file, or it cannot be made.
    """
    run = RunFolder(config.checkpoint)
    if not config.out and not run.config_file.is_file():
        raise InputError(f"out: name a folder; {config.checkpoint!r} is no run folder that could hold one")
    folder = Path(config.out).expanduser() if config.out else run.evaluations / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out: cannot make {str(folder)!r}: {error.strerror}") from error
    return folder


def mean_values(normalise: Normalise) -> list[int]:
    """The value of every channel that normalisation turns into about 0: what lies outside of an image."""
    return [round(value) for value in normalise.mean.flatten().tolist()]


def make_plan(config: DenseConfig, *, epochs: int, num_images: int, trained: bool) -> Plan:
    """Steps and learning rate.

    Raises:
        InputError: Fewer images than a step needs, or a batch that cannot be split over the processes.
    """
    if epochs < 1:
        raise InputError(f"epochs: must be at least 1, got {epochs}")
    if config.batch_size > num_images:
        raise InputError(f"batch_size: must be at most the {num_images} training images, got {config.batch_size}")
    if config.batch_size % distributed.world_size():
        raise InputError(
            f"batch_size: must be divisible by the {distributed.world_size()} processes, got {config.batch_size}"
        )
    return Plan(
        batch_size=config.batch_size,
        total_steps=epochs * (num_images // config.batch_size),
        peak_learning_rate=config.learning_rate or (1e-4 if trained else 1e-3),
        seed=config.seed,
        checkpoint_minutes=config.checkpoint_minutes,
        workers=config.workers,
    )


def identity(values: Mapping[str, Any], model: nn.Module) -> str:
    """A checksum of what decides a training: settings, data and the weights it starts from."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def train(task: Task, plan: Plan, *, device: torch.device, checkpoints: Path, identity: str) -> None:
    """Train the model in place, from where an earlier process left off if it was the same training.

    Args:
        task: What is trained on what.
        plan: How.
        device: Where the model is.
        checkpoints: Folder for going on after a kill.
        identity: Of :func:`identity`; a checkpoint with another one is passed over, and said so.

    Raises:
        Interrupted: A signal arrived; the state is saved.
        InputError: The loss is not finite any more.
    """
    folder = CheckpointFolder(checkpoints, keep_last=1)
    optimizer = torch.optim.AdamW(task.groups, lr=plan.peak_learning_rate, fused=device.type != "mps")
    first = _go_on(folder, task, optimizer, identity)
    if first == plan.total_steps:
        return
    model = _parallel(task.model, device)
    parameters = [p for group in task.groups for p in group["params"]]
    warmup = adapted_warmup_steps(plan.total_steps)
    saved_at = time.monotonic()

    def save(step: int) -> None:
        if distributed.is_main():
            folder.save({"step": step, "identity": identity, "student": task.model.state_dict(),
                         "optimizer": optimizer.state_dict()})  # fmt: skip

    task.model.train()
    with StopSignal() as stop, closing(_batches(task, plan, first, device)) as batches:
        bar = tracked(range(first, plan.total_steps), f"training, {task.name}", images_per_item=plan.batch_size)
        for step in bar:
            rate = learning_rate(
                step + 1, peak=plan.peak_learning_rate, warmup_steps=warmup, total_steps=plan.total_steps + 1
            )
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            batch = next(batches)  # before the seed is set: the first batch of a process draws as well
            torch.manual_seed(derive_seed(plan.seed, Stream.STEP, step, distributed.rank()))
            loss = task.loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done, last = step + 1, step + 1 == plan.total_steps
            stopped = distributed.any_process(stop.name is not None)
            due = distributed.any_process(time.monotonic() - saved_at > 60 * plan.checkpoint_minutes)
            looked_at = stopped or due or last or done % CHECK_STEPS == 0
            if looked_at and distributed.any_process(not torch.isfinite(loss)):
                raise InputError(f"learning_rate: the loss is {loss.item()} at step {done}; choose a lower one than "
                                 f"{plan.peak_learning_rate:g}")  # fmt: skip
            if stopped or due or last:
                save(done)
                saved_at = time.monotonic()
            if stopped and not last:
                distributed.barrier()
                raise Interrupted(f"stopped by {stop.name or 'a signal to another process'} and saved at step {done} "
                                  f"of {plan.total_steps}; the same command goes on from there")  # fmt: skip
    for buffer in task.model.buffers():  # running means of a process's own share: all take the main process's
        distributed.broadcast_from_main(buffer)
    task.model.eval()


def _go_on(folder: CheckpointFolder, task: Task, optimizer: torch.optim.Optimizer, identity: str) -> int:
    """Load what an earlier process saved; the step to go on from."""
    if distributed.is_main():
        folder.clear_temporary()
    saved = folder.load_latest() if folder.steps() else None
    distributed.barrier()  # all have read before the main process clears or writes
    if saved is None:
        return 0
    if saved.get("identity") != identity:
        say(f"{folder.path} holds another training (other settings, images or weights); this one starts over")
        if distributed.is_main():
            for file in folder.path.glob("step_*.pt*"):
                file.unlink()
        return 0
    task.model.load_state_dict(saved["student"])
    optimizer.load_state_dict(saved["optimizer"])
    task.model.eval()
    step = int(saved["step"])
    say(f"{task.name}: going on with {folder.path} at step {step}")
    return step


def _batches(task: Task, plan: Plan, first_step: int, device: torch.device) -> Generator[Any, None, None]:
    """Collated batches of this process's share, from ``first_step`` on."""
    order = TrainingOrder(
        task.num_images, batch_size=plan.batch_size, first_step=first_step, total_steps=plan.total_steps,
        seed=plan.seed, position=Position(distributed.rank(), distributed.world_size()),
    )  # fmt: skip
    loader = DataLoader(
        task.images, batch_sampler=order, collate_fn=task.collate, num_workers=plan.workers,
        pin_memory=device.type == "cuda", worker_init_fn=ignore_in_worker,
    )  # fmt: skip
    with signals_held():
        batches = iter(loader)
    yield from batches


def _parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, wrapped for several processes where there are several."""
    if distributed.world_size() == 1:
        return model
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def held_back(num_images: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Training and validation images of one set, drawn by the seed, each in order.

    Raises:
        InputError: One of the two would be empty.
    """
    num_val = round(num_images * share)
    if not 0 < num_val < num_images:
        raise InputError(f"val_share: {share} of {num_images} images leaves no training or no validation images")
    generator = torch.Generator().manual_seed(derive_seed(seed, Stream.ORDER))
    order = torch.randperm(num_images, generator=generator).tolist()
    return sorted(order[num_val:]), sorted(order[:num_val])
