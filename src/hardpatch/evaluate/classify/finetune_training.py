"""The loop of a fine-tuning, and what changes in it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from hardpatch.data.loader.loading import (
    Damage,
    Position,
    TrainingOrder,
    batches_in_order,
    default_workers,
    ordered_batches,
)
from hardpatch.data.sources import class_indices
from hardpatch.evaluate.classify.augment import FinetuneImages, LabelledBatch, Mixing, stack
from hardpatch.evaluate.classify.classifier import build_classifier, layer_groups
from hardpatch.evaluate.classify.finetune_settings import Recipe
from hardpatch.evaluate.classify.labelled_images import LabelledImages
from hardpatch.evaluate.contenders import Contender
from hardpatch.evaluate.features import none_readable, report_damage
from hardpatch.method.schedules import learning_rate
from hardpatch.runs.build import choose_attention
from hardpatch.runs.checkpoint import CheckpointFolder
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import DivergedError, InputError, Interrupted
from hardpatch.runtime.log import RunLog, say, tracked, warn
from hardpatch.runtime.seeding import Stream, derive_seed
from hardpatch.runtime.signals import StopSignal


class Classified(NamedTuple):
    """What a classifier says of the validation images."""

    ranked: Int[Tensor, "n k"]
    """Its five best classes (all, where there are fewer), best first."""
    indices: list[int]
    """Position of each row among the validation images."""
    damaged: list[Damage]
    top1: float
    """Percent."""
    top5: float
    """Percent."""


@dataclass
class State:
    """All that changes while training: what a checkpoint holds."""

    model: VisionTransformer
    optimizer: torch.optim.AdamW
    ema: ModelEmaV3 | None
    sums: Tensor
    """Loss and gradient norm, summed over the steps of this epoch, on the device."""
    step: int = 0
    seconds: float = 0.0
    last_loss: float = math.nan
    """Mean of the last whole epoch."""

    def to_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "last_loss": self.last_loss,
            "sums": self.sums,
            "model": self.model.state_dict(),
            "ema": {} if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.step, self.seconds, self.last_loss = saved["step"], saved["seconds"], saved["last_loss"]
        self.sums.copy_(saved["sums"])
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(saved["ema"])


@dataclass
class Finetuning:
    """Everything a fine-tuning needs, put together."""

    recipe: Recipe
    contender: Contender
    images: LabelledImages
    folder: Path
    checkpoints: CheckpointFolder
    device: torch.device
    bf16: bool
    workers: int
    val_epochs: int
    checkpoint_minutes: float
    max_damaged: float
    state: State
    damaged: dict[str, str] = field(default_factory=dict)
    """Every damaged training image seen so far by this process, and why."""

    @classmethod
    def start(
        cls,
        recipe: Recipe,
        contender: Contender,
        images: LabelledImages,
        *,
        folder: Path,
        checkpoints: CheckpointFolder,
        device: torch.device,
        bf16: bool,
        workers: int | None,
        val_epochs: int,
        checkpoint_minutes: float,
        max_damaged: float,
    ) -> Finetuning:
        """Build the classifier and its optimizer, and go on from the newest checkpoint where there is one."""
        model = build_classifier(
            contender.arguments,
            contender.encoder,
            num_classes=len(images.classes),
            drop_path=recipe.drop_path,
            seed=recipe.seed,
        ).to(device)
        choose_attention(model, device, bf16=bf16)
        groups = layer_groups(model, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay)
        optimizer = torch.optim.AdamW(groups, lr=recipe.peak_learning_rate, betas=recipe.betas, fused=True)
        ema = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay is not None else None
        state = State(model, optimizer, ema, torch.zeros(2, device=device))
        if distributed.is_main():
            checkpoints.clear_temporary()
        distributed.barrier()
        if saved := checkpoints.load_latest():
            state.load(saved)
            if state.step < recipe.total_steps:
                say(f"going on with {folder} at step {state.step} of {recipe.total_steps}")
        return cls(
            recipe, contender, images, folder, checkpoints, device, bf16,
            default_workers() if workers is None else workers, val_epochs, checkpoint_minutes, max_damaged, state,
        )  # fmt: skip

    @property
    def measured(self) -> VisionTransformer:
        """The weights that are measured and kept: the average where there is one."""
        model: VisionTransformer = self.state.model if self.state.ema is None else self.state.ema.module
        return model

    def learning_rate(self, step: int) -> float:
        """Of the last layer."""
        recipe = self.recipe
        return learning_rate(
            step, peak=recipe.peak_learning_rate, warmup_steps=recipe.warmup_steps, total_steps=recipe.total_steps,
            floor=recipe.min_learning_rate,
        )  # fmt: skip

    def save(self) -> None:
        """Save the state; the main process alone does.

        Raises:
            DivergedError: The loss or its gradient is not finite.
        """
        if not bool(torch.isfinite(self.state.sums).all()):
            saved = self.checkpoints.steps()
            raise DivergedError(
                f"the loss or its gradient was not finite before step {self.state.step + 1}; last good checkpoint: "
                f"{self.checkpoints.file(saved[-1]) if saved else 'none yet'}. Try a lower --base-learning-rate, "
                "--gradient-clip 1 or --precision float32 in a new folder"
            )
        if distributed.is_main():
            self.checkpoints.save(self.state.to_dict())

    def note_damage(self, damaged: list[Damage]) -> None:
        """Name every damaged image once."""
        for item in damaged:
            if item.name not in self.damaged:
                self.damaged[item.name] = item.reason
                warn(f"damaged image left out: {item.name}: {item.reason}")


def train_epochs(run: Finetuning, stop: StopSignal) -> Classified | None:
    """The loop: from the state's step to the last one.

    Returns:
        What the classifier says of the validation images after the last epoch; None where nothing was left to do.

    Raises:
        Interrupted: A signal arrived; the run is saved.
        InputError: The loss is not finite any more, or too many images are damaged.
    """
    recipe, state, classified = run.recipe, run.state, None
    if state.step >= recipe.total_steps:
        return None
    _announce(run)
    model = _parallel(state.model, run.device)
    mixing = Mixing(recipe, len(run.images.classes))
    last_save = since = time.monotonic()
    with _log(run) as log, closing(_batches(run)) as batches:
        for step in range(state.step, recipe.total_steps):
            state.model.train()
            _step(run, model, mixing, batches, step)
            state.step = step + 1
            if log:
                log.advance(state.step)
            if state.step % recipe.steps_per_epoch == 0:
                state.seconds += time.monotonic() - since
                classified = _end_epoch(run, log)
                since = time.monotonic()
            last = state.step == recipe.total_steps
            stopped = not last and distributed.any_process(stop.name is not None)
            if last or stopped or time.monotonic() - last_save >= 60 * run.checkpoint_minutes:
                state.seconds += time.monotonic() - since
                run.save()
                last_save = since = time.monotonic()
            if stopped:
                distributed.barrier()  # torchrun ends all processes with the first: not before the save is done
                raise Interrupted(
                    f"stopped by {stop.name or 'a signal to another process'} and saved at step {state.step} of "
                    f"{recipe.total_steps}; the same command goes on from there"
                )
    return classified


def _step(
    run: Finetuning, model: Callable[[Tensor], Tensor], mixing: Mixing, batches: Iterator[LabelledBatch], step: int
) -> None:
    """One optimizer step over all micro-batches."""
    recipe, state, rank = run.recipe, run.state, distributed.rank()
    for group in state.optimizer.param_groups:
        group["lr"] = run.learning_rate(step) * group["lr_scale"]
    torch.manual_seed(derive_seed(recipe.seed, Stream.STEP, step, rank))
    num_parts = recipe.batch_size // distributed.world_size() // recipe.micro_batch_size
    loss_of_step = torch.zeros((), device=run.device)
    for number in range(num_parts):
        batch = next(batches)
        run.note_damage(batch.damaged)
        images, targets = mixing(
            batch.images.to(run.device, non_blocking=True), batch.labels.to(run.device, non_blocking=True),
            place=(step, rank, number),
        )  # fmt: skip
        with (
            _sync(model, last=number == num_parts - 1),
            torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16),
        ):
            loss = F.cross_entropy(model(images).float(), targets) / num_parts
            loss.backward()
        loss_of_step += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), recipe.gradient_clip or math.inf)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.update(state.model, step=step + 1)
    state.sums += torch.stack([distributed.mean_of_tensor(loss_of_step), norm.detach()])


def _end_epoch(run: Finetuning, log: RunLog | None) -> Classified | None:
    """Record the epoch, with a look at the validation images where one is due.

    Raises:
        InputError: The loss is not finite any more, or too many images are damaged.
    """
    recipe, state = run.recipe, run.state
    epoch = state.step // recipe.steps_per_epoch
    loss, norm = (state.sums / recipe.steps_per_epoch).tolist()
    _check_damage(run)
    classified = None
    if math.isfinite(loss) and math.isfinite(norm) and (epoch % run.val_epochs == 0 or epoch == recipe.epochs):
        classified = classify(run)
    if math.isfinite(loss) and math.isfinite(norm):  # else save() tells it
        state.last_loss = loss
        state.sums.zero_()
    else:
        run.save()
    if log:
        seen = state.step * recipe.batch_size
        record = {
            "step": state.step, "epoch": epoch, "samples_seen": seen, "train_loss": loss, "gradient_norm": norm,
            "learning_rate": run.learning_rate(state.step - 1), "seconds": state.seconds,
            "images_per_second": seen / max(state.seconds, 1e-9),
            "seconds_left": state.seconds / state.step * (recipe.total_steps - state.step),
        }  # fmt: skip
        found = {"val_top1": classified.top1, "val_top5": classified.top5} if classified else {}
        log.record({**record, **found})
    return classified


@torch.no_grad()
def classify(run: Finetuning) -> Classified:
    """Classify the validation images, resized to cover the encoder's size and cut to the centre; each process a part.

    Raises:
        InputError: Too many of them are damaged.
    """
    val, model = run.images.val, run.measured
    mine = list(range(len(val)))[distributed.rank() :: distributed.world_size()]
    model.eval()
    normalise = run.contender.normalise
    ranked, kept, damaged = [], [], []
    batches = ordered_batches(val, size=run.contender.size, indices=mine, workers=run.workers)
    for batch in tracked(batches, "validation", total=-(-len(mine) // 128)):
        damaged += batch.damaged
        if batch.indices:
            with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
                logits = model(normalise(batch.images.to(run.device))).float()
            ranked.append(logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu())
            kept += batch.indices
    parts = distributed.gather_objects((torch.cat(ranked) if ranked else None, kept, damaged))
    found = [item for *_, part in parts for item in part]
    if not any(part for _, part, _ in parts):
        raise none_readable(found)
    report_damage({"val": (found, len(val))}, max_damaged=run.max_damaged)
    rows = torch.cat([part for part, *_ in parts if part is not None])
    indices = [index for _, part, _ in parts for index in part]
    labels = torch.from_numpy(class_indices([(val.labels or ())[i] for i in indices], run.images.classes))
    hits = rows == labels.unsqueeze(1)
    return Classified(
        rows, indices, found, float(hits[:, 0].double().mean() * 100), float(hits.any(dim=1).double().mean() * 100)
    )


def _check_damage(run: Finetuning) -> None:
    """Stop a run of whose training images too many are damaged.

    Raises:
        InputError: More than ``max_damaged`` of them.
    """
    everywhere = distributed.gather_objects(run.damaged)
    damaged = {name: reason for found in everywhere for name, reason in found.items()}
    if len(damaged) > run.max_damaged * len(run.images.train):
        name, reason = next(iter(damaged.items()))
        raise InputError(
            f"max_damaged: at most {run.max_damaged:.1%} of the images may be damaged, and {len(damaged)} of the "
            f"{len(run.images.train)} of train are; the first: {name}: {reason}"
        )


def _announce(run: Finetuning) -> None:
    """Say what is about to happen."""
    recipe = run.recipe
    say(
        f"{run.folder}: {len(run.images.train):,} images of {len(run.images.classes)} classes, {recipe.epochs} epochs "
        f"of {recipe.steps_per_epoch} steps of {recipe.batch_size}; peak lr {recipe.peak_learning_rate:.2g}, "
        f"warm-up {recipe.warmup_steps} steps, crops from {recipe.crop_scale[0]:g}, "
        f"{recipe.rand_augment or 'no RandAugment'}; {run.device.type}, {'bf16' if run.bf16 else 'float32'}, "
        f"{distributed.world_size()} process(es)"
    )


def _batches(run: Finetuning) -> Any:
    """Training batches from the state's step on."""
    recipe = run.recipe
    share = recipe.batch_size // distributed.world_size()
    order = TrainingOrder(
        len(run.images.train), batch_size=recipe.batch_size, first_step=run.state.step, total_steps=recipe.total_steps,
        seed=recipe.seed,
        position=Position(distributed.rank(), distributed.world_size(), share // recipe.micro_batch_size),
        blocks=run.images.train.blocks(),
    )  # fmt: skip
    images = FinetuneImages(
        run.images.train, run.images.classes, size=run.contender.size,
        normalise=copy.deepcopy(run.contender.normalise).cpu(), recipe=recipe,
        mean=tuple((run.contender.normalise.mean.flatten() / 255).tolist()),
    )  # fmt: skip
    return batches_in_order(
        images, order, collate=stack, workers=run.workers, pin_memory=run.device.type == "cuda",
        prepare=run.images.train.prepare,
    )  # fmt: skip


def _parallel(model: VisionTransformer, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The classifier, wrapped for several processes where there are several."""
    whole: Callable[[Tensor], Tensor] = model
    if distributed.world_size() == 1:
        return whole
    wrapped: Callable[[Tensor], Tensor] = DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False
    )
    return wrapped


def _sync(model: Callable[[Tensor], Tensor], *, last: bool) -> Any:
    """Exchange gradients between processes only with the last micro-batch of a step."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


@contextmanager
def _log(run: Finetuning) -> Iterator[RunLog | None]:
    """Files and bar, on the main process."""
    if not distributed.is_main():
        yield None
        return
    with RunLog(
        run.folder, total_steps=run.recipe.total_steps, first_step=run.state.step, description="fine-tuning"
    ) as log:
        yield log
