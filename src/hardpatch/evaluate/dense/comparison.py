"""The same training and the same look at held-back images, for one encoder after the other."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from hardpatch.config.dense_evaluations import DenseConfig
from hardpatch.data.loader.loading import Normalise
from hardpatch.evaluate.contenders import Contender, folder_name
from hardpatch.evaluate.harness import Examples, Plan, Training
from hardpatch.method.schedules import adapted_warmup_steps, learning_rate
from hardpatch.runs.checkpoint import CheckpointFolder
from hardpatch.runtime import distributed
from hardpatch.runtime.claim import Claim
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import tracked
from hardpatch.runtime.seeding import Stream, derive_seed

GRADIENT_CLIP = 5.0
"""Largest norm of the gradient."""
INDIFFERENT = frozenset({
    "checkpoint", "against", "out", "val_images", "num_pictures", "checkpoint_minutes", "device", "workers",
    "untrained", "max_damaged",
})  # fmt: skip
"""Fields that cannot change a training: the encoder counts by its weights."""

Model = TypeVar("Model", bound=nn.Module)
Figures = TypeVar("Figures")


@dataclass(frozen=True)
class Lesson(Generic[Model]):
    """A model and what it is to learn."""

    model: Model
    """What is measured afterwards."""
    learner: nn.Module
    """The part of it that is trained: the model, or its head."""
    groups: list[dict[str, Any]]
    """Parameter groups of AdamW, optionally with ``lr_scale``."""
    examples: Examples
    loss: Callable[[nn.Module, Any], Tensor]
    """The mean loss of a collated batch, on whatever device it came."""


@dataclass(frozen=True)
class Measured(Generic[Model, Figures]):
    """A trained model and what it is worth."""

    contender: Contender
    model: Model
    figures: Figures
    steps: int


class Comparison(ABC, Generic[Model, Figures]):
    """Trains and measures the same on every encoder.

    Raises:
        InputError: No epoch.
    """

    indifferent: ClassVar[frozenset[str]] = frozenset()
    """Further fields of the config that cannot change a training."""

    def __init__(self, config: DenseConfig, folder: Path, device: torch.device, *, epochs: int, trained: bool) -> None:
        if epochs < 1:
            raise InputError(f"epochs: must be at least 1, got {epochs}")
        self.settings, self.folder, self.device, self.epochs = config, folder, device, epochs
        self.peak = config.learning_rate or (1e-4 if trained else 1e-3)

    @abstractmethod
    def prepare(self, contender: Contender) -> Lesson[Model]:
        """A model on an encoder, with its own seeded start, and what it is to learn."""

    @abstractmethod
    def evaluate(self, model: Model, contender: Contender) -> Figures:
        """Figures on the held-back images, on every process."""

    @abstractmethod
    def known_images(self) -> Any:
        """What the training images are known by."""

    def plan(self, num_images: int) -> Plan:
        """Steps for so many images.

        Raises:
            InputError: Fewer images than a step needs, or a batch that cannot be split over the processes.
        """
        config, processes = self.settings, distributed.world_size()
        if config.batch_size > num_images:
            raise InputError(f"batch_size: must be at most the {num_images} training images, got {config.batch_size}")
        if config.batch_size % processes:
            raise InputError(f"batch_size: must be divisible by the {processes} processes, got {config.batch_size}")
        steps = num_images // config.batch_size
        return Plan(
            config.batch_size, self.epochs * steps, steps, config.seed, config.checkpoint_minutes, config.workers,
            gradient_clip=GRADIENT_CLIP,
        )  # fmt: skip

    def measure(self, contender: Contender) -> Measured[Model, Figures]:
        """Train on an encoder, from where an earlier process left off if it was the same, and look at the rest."""
        lesson = self.prepare(contender)
        plan = self.plan(lesson.examples.number)
        decisive = {
            key: value for key, value in asdict(self.settings).items() if key not in INDIFFERENT | self.indifferent
        } | {"images": self.known_images(), "processes": distributed.world_size()}
        distributed.require_same(decisive)
        folder = self.folder / folder_name(contender.name)
        claim = distributed.on_every(lambda: Claim(folder) if distributed.is_main() else None)
        training = DenseTraining(
            lesson, plan, self.peak, name=contender.name, device=self.device, folder=folder,
            identity=identity(decisive, lesson.model),
        )  # fmt: skip
        try:
            training.resume()
            training.run()
        finally:
            if claim is not None:
                claim.release()
        lesson.model.eval()
        return Measured(contender, lesson.model, self.evaluate(lesson.model, contender), plan.total_steps)


class DenseTraining(Training):
    """AdamW with warm-up and half a cosine."""

    def __init__(
        self, lesson: Lesson[Any], plan: Plan, peak: float, *,
        name: str, folder: Path, device: torch.device, identity: str,
    ) -> None:  # fmt: skip
        super().__init__(
            lesson.learner, torch.optim.AdamW(lesson.groups, lr=peak, fused=device.type != "mps"), lesson.examples,
            plan, checkpoints=CheckpointFolder(
                folder, keep_last=2, holds="optimizer", if_damaged="remove that folder to train again"
            ), device=device,
            identity=identity,
        )  # fmt: skip
        self.lesson, self.peak, self.name = lesson, peak, name
        self.last_loss = torch.zeros(())

    def loss(self, model: nn.Module, batch: Any, place: tuple[int, int, int]) -> Tensor:
        """The lesson's."""
        return self.lesson.loss(model, batch)

    def learning_rate(self, step: int) -> float:
        """The rate of the head: the first step has some already, the last has some still."""
        total = self.plan.total_steps
        warmup = adapted_warmup_steps(total)
        return learning_rate(step + 1, peak=self.peak, warmup_steps=warmup, total_steps=total + 1)

    def after_step(self, loss: Tensor, norm: Tensor) -> None:
        """Remember the loss."""
        self.last_loss = loss

    def check_loss(self) -> None:
        """Is the loss finite?

        Raises:
            InputError: On one of the processes it is not.
        """
        if distributed.any_process(not torch.isfinite(self.last_loss)):
            raise InputError(f"learning_rate: the loss is {self.last_loss.item()} at step {self.step}; choose a lower "
                             f"one than {self.peak:g}")  # fmt: skip

    def progress(self, steps: Iterable[int]) -> Generator[int, None, None]:
        """The steps to come, with a bar."""
        yield from tracked(steps, f"training, {self.name}", images_per_item=self.plan.batch_size)


def identity(values: Mapping[str, Any], model: nn.Module) -> str:
    """A checksum of what decides a training: settings, data and the weights it starts from."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def mean_values(normalise: Normalise) -> list[int]:
    """The value of every channel that normalisation turns into about 0: what lies outside of an image."""
    return [round(value) for value in normalise.mean.flatten().tolist()]


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


def spread(num_images: int, count: int) -> list[int]:
    """Positions of at most so many images, spread over all."""
    positions: list[int] = torch.linspace(0, num_images - 1, min(count, num_images)).long().tolist()
    return positions
