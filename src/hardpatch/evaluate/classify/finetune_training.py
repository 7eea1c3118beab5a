"""The training of a fine-tuning: what a step's loss is, what an epoch ends with, what a checkpoint holds."""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hardpatch.config.evaluations import FinetuneConfig
from hardpatch.data.loader.loading import Damage, default_workers, ordered_batches
from hardpatch.data.sources import class_indices
from hardpatch.evaluate.classify.augment import FinetuneImages, LabelledBatch, Mixing, stack
from hardpatch.evaluate.classify.classifier import build_classifier, layer_groups
from hardpatch.evaluate.classify.finetune_settings import FinetuneSettings
from hardpatch.evaluate.classify.labelled_images import LabelledImages
from hardpatch.evaluate.contenders import Contender
from hardpatch.evaluate.features import none_readable, refuse_damage, report_damage
from hardpatch.evaluate.harness import Examples, Plan, Training
from hardpatch.method.schedules import learning_rate
from hardpatch.runs.build import choose_attention
from hardpatch.runs.checkpoint import CheckpointFolder
from hardpatch.runs.folder import RunFolder
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import DivergedError
from hardpatch.runtime.log import RunLog, say, tracked, warn


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


class Finetuning(Training):
    """A classifier that starts from an encoder, and everything it needs."""

    model: VisionTransformer

    def __init__(
        self,
        settings: FinetuneSettings,
        config: FinetuneConfig,
        contender: Contender,
        images: LabelledImages,
        folder: RunFolder,
        device: torch.device,
        decisive: dict[str, Any],
    ) -> None:
        self.decisive = decisive
        """What makes it this training: in every checkpoint, since ``config.yaml`` may be damaged."""
        self.settings, self.config, self.contender, self.images = settings, config, contender, images
        self.folder = folder.path
        self.bf16 = distributed.is_bf16(config.precision, device)
        self.workers = default_workers() if config.workers is None else config.workers
        model = build_classifier(
            contender.arguments, contender.encoder, num_classes=len(images.classes), drop_path=settings.drop_path,
            seed=settings.seed,
        ).to(device)  # fmt: skip
        choose_attention(model, device, bf16=self.bf16)
        groups = layer_groups(model, weight_decay=settings.weight_decay, layer_decay=settings.layer_decay)
        augmented = FinetuneImages(
            images.train, images.classes, size=contender.size, settings=settings,
            normalise=copy.deepcopy(contender.normalise).cpu(),
            mean=tuple((contender.normalise.mean.flatten() / 255).tolist()),
        )  # fmt: skip
        super().__init__(
            model,
            torch.optim.AdamW(groups, lr=settings.peak_learning_rate, betas=settings.betas, fused=True),
            Examples(augmented, len(images.train), stack, images.train),
            Plan(
                settings.batch_size, settings.total_steps, settings.steps_per_epoch, settings.seed,
                config.checkpoint_minutes, self.workers,
                settings.batch_size // distributed.world_size() // settings.micro_batch_size, settings.gradient_clip,
            ),
            checkpoints=CheckpointFolder(folder.checkpoints, keep_last=2, holds="model"),
            device=device,
        )  # fmt: skip
        self.parameters = list(model.parameters())
        self.mixing = Mixing(settings, len(images.classes))
        self.sums = torch.zeros(2, device=device)
        """Loss and gradient norm, summed over the steps of this epoch."""
        self.last_loss = math.nan
        """Mean of the last whole epoch."""
        self.damaged: dict[str, str] = {}
        """Every damaged training image seen so far by this process, and why."""
        self.classified: Classified | None = None
        """What the classifier says of the validation images, at the last look."""
        self.log: RunLog | None = None

    def learning_rate(self, step: int) -> float:
        """The rate of the last layer."""
        settings = self.settings
        return learning_rate(
            step, peak=settings.peak_learning_rate, warmup_steps=settings.warmup_steps,
            total_steps=settings.total_steps, floor=settings.min_learning_rate,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Sums of the epoch, and what makes it this training."""
        return {"last_loss": self.last_loss, "sums": self.sums, "decisive": self.decisive}

    def load_state(self, saved: dict[str, Any]) -> None:
        """Take them over."""
        self.last_loss = saved["last_loss"]
        self.sums.copy_(saved["sums"])

    def progress(self, steps: Iterable[int]) -> Generator[int, None, None]:
        """Say what is about to happen, then a bar and records of the epochs."""
        settings, total = self.settings, self.plan.total_steps
        say(
            f"{self.folder}: {len(self.images.train):,} images of {len(self.images.classes)} classes, "
            f"{settings.epochs} epochs of {settings.steps_per_epoch} steps of {settings.batch_size}; "
            f"peak lr {settings.peak_learning_rate:.2g}, warm-up {settings.warmup_steps} steps, "
            f"crops from {settings.crop_scale[0]:g}, {settings.rand_augment or 'no RandAugment'}; "
            f"{self.device.type}, {'bf16' if self.bf16 else 'float32'}, {distributed.world_size()} process(es)"
        )
        if not distributed.is_main():
            yield from steps
            return
        with RunLog(self.folder, total_steps=total, first_step=self.step, description="fine-tuning") as self.log:
            yield from steps

    def loss(self, model: nn.Module, batch: LabelledBatch, place: tuple[int, int, int]) -> Tensor:
        """Cross entropy against smoothed targets of mixed images."""
        for item in batch.damaged:
            if item.name not in self.damaged:  # every one is named once
                self.damaged[item.name] = item.reason
                warn(f"damaged image left out: {item.name}: {item.reason}")
        images, targets = self.mixing(
            batch.images.to(self.device, non_blocking=True), batch.labels.to(self.device, non_blocking=True),
            place=place,
        )  # fmt: skip
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return F.cross_entropy(model(images).float(), targets)

    def after_step(self, loss: Tensor, norm: Tensor) -> None:
        """Add to the epoch's sums, move the bar."""
        self.sums += torch.stack([distributed.mean_of_tensor(loss), norm])
        if self.log:
            self.log.advance(self.step)

    def check_loss(self) -> None:
        """Are loss and gradient finite?

        Raises:
            DivergedError: They are not.
        """
        if not bool(torch.isfinite(self.sums).all()):
            saved = self.checkpoints.steps()
            raise DivergedError(
                f"the loss or its gradient was not finite before step {self.step + 1}; last good checkpoint: "
                f"{self.checkpoints.file(saved[-1]) if saved else 'none yet'}. Try a lower --base-learning-rate, "
                "--gradient-clip 1 or --precision float32 in a new folder"
            )

    def end_epoch(self) -> None:
        """Record the epoch, with a look at the validation images where one is due.

        Raises:
            InputError: The loss is not finite any more, or too many images are damaged.
        """
        settings, epoch = self.settings, self.step // self.settings.steps_per_epoch
        found = {name: why for part in distributed.gather_objects(self.damaged) for name, why in part.items()}
        report = {"train": ([Damage(*item) for item in found.items()], len(self.images.train))}
        refuse_damage(report, max_damaged=self.config.max_damaged)
        self.check_loss()
        self.last_loss, norm = (self.sums / settings.steps_per_epoch).tolist()
        self.sums.zero_()
        figures = {}
        if epoch % self.config.val_epochs == 0 or epoch == settings.epochs:
            self.classified = self.classify()
            figures = {"val_top1": self.classified.top1, "val_top5": self.classified.top5}
        if self.log:
            seen = self.step * settings.batch_size
            self.log.record({
                "step": self.step, "epoch": epoch, "samples_seen": seen, "train_loss": self.last_loss,
                "gradient_norm": norm, "learning_rate": self.learning_rate(self.step - 1), "seconds": self.seconds,
                "images_per_second": seen / max(self.seconds, 1e-9),
                "seconds_left": self.seconds / self.step * (settings.total_steps - self.step), **figures,
            })  # fmt: skip

    @torch.no_grad()
    def classify(self) -> Classified:
        """Classify the validation images, resized to cover the encoder's size, cut to the centre; each process a part.

        Raises:
            InputError: Too many of them are damaged.
        """
        val, model = self.images.val, self.model
        mine = list(range(len(val)))[distributed.rank() :: distributed.world_size()]
        model.eval()
        normalise = self.contender.normalise
        ranked, kept, damaged = [], [], []
        batches = ordered_batches(val, size=self.contender.size, indices=mine, workers=self.workers)
        for batch in tracked(batches, "validation", total=-(-len(mine) // 128)):
            damaged += batch.damaged
            if batch.indices:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    logits = model(normalise(batch.images.to(self.device))).float()
                ranked.append(logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu())
                kept += batch.indices
        parts = distributed.gather_objects((torch.cat(ranked) if ranked else None, kept, damaged))
        found = [item for *_, part in parts for item in part]
        if not any(part for _, part, _ in parts):
            raise none_readable(found)
        report_damage({"val": (found, len(val))}, max_damaged=self.config.max_damaged)
        rows = torch.cat([part for part, *_ in parts if part is not None])
        indices = [index for _, part, _ in parts for index in part]
        labels = torch.from_numpy(class_indices([(val.labels or ())[i] for i in indices], self.images.classes))
        hits = rows == labels.unsqueeze(1)
        return Classified(
            rows, indices, found, float(hits[:, 0].double().mean() * 100), float(hits.any(dim=1).double().mean() * 100)
        )
