"""What a run is made of, and the part of it that changes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hpm import distributed
from hpm.build import Stage, input_config, timm_arguments
from hpm.checkpoint import CheckpointFolder, save_weights
from hpm.config import Config, Schedule
from hpm.data.loading import Position
from hpm.data.sources import Source
from hpm.method import Method, Student, Teacher
from hpm.mining import MiningGate
from hpm.run_folder import RunFolder
from hpm.schedules import hard_share, hard_share_by_epoch, learning_rate, stage
from hpm.tokens import KMeansTokenizer


@dataclass
class State:
    """All that changes while training, and what was fitted to the images before: what a checkpoint holds."""

    student: Student
    teacher: Teacher
    optimizer: torch.optim.Optimizer
    gate: MiningGate
    codebook: KMeansTokenizer | None = None
    step: int = 0
    seconds: float = 0.0

    def to_dict(self, config: Config, images: str) -> dict[str, Any]:
        """Tensors and plain values only, so that ``torch.load(weights_only=True)`` reads it."""
        return {
            "images": images,
            "step": self.step,
            "seconds": self.seconds,
            "student": self.student.state_dict(),
            "teacher": self.teacher.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "gate": self.gate.correlation,
            "target": self.codebook.state_dict() if self.codebook is not None else {},
            "config": asdict(config),
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.student.load_state_dict(saved["student"])
        self.teacher.model.load_state_dict(saved["teacher"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.gate.correlation.copy_(saved["gate"])
        if self.codebook is not None:
            self.codebook.adopt(**saved["target"])


@dataclass
class Run:
    """Everything a run needs, checked and put together."""

    config: Config
    folder: RunFolder
    device: torch.device
    bf16: bool
    source: Source
    schedule: Schedule
    position: Position
    stages: tuple[Stage, ...]
    state: State
    checkpoints: CheckpointFolder
    images: str
    """Fingerprint of the training images."""

    @property
    def images_per_step(self) -> int:
        """Different images in a step; each has ``masks_per_image`` views."""
        return self.config.optimisation.batch_size // self.config.method.masks_per_image

    @property
    def method(self) -> Method:
        """The choices of the run, for images of full size."""
        return self.stages[-1].method

    def stage(self, step: int) -> Stage:
        """The stage of a step; a batch that is kept for several steps stays in that of its first."""
        first = step - step % self.config.method.steps_per_batch
        return self.stages[-1] if len(self.stages) == 1 else self.stages[stage(first, self.schedule.total_steps)]

    def num_hard(self, step: int) -> int:
        """``int(M * a_t)``."""
        share = self.hard_share(step)
        return int(self.stage(step).method.num_hidden * share)

    def hard_share(self, step: int) -> float:
        """a_t."""
        method, schedule = self.config.method, self.schedule
        if self.method.guide is None:
            return 0.0
        ends = {
            "start": method.hard_share_start,
            "end": method.hard_share_end,
            "total_steps": schedule.total_steps,
        }
        if method.hard_share_unit == "epoch":
            return hard_share_by_epoch(step, **ends, steps_per_epoch=schedule.steps_per_epoch)  # type: ignore[arg-type]
        return hard_share(step, **ends)  # type: ignore[arg-type]

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        schedule = self.schedule
        return learning_rate(
            step,
            peak=schedule.peak_learning_rate,
            warmup_steps=schedule.warmup_steps,
            total_steps=schedule.total_steps,
        )

    @property
    def checkpoint_steps(self) -> int:
        """Steps between two scheduled checkpoints."""
        unit = self.config.method.steps_per_batch
        wanted = self.config.run.checkpoint_steps or max(1, math.ceil(self.schedule.total_steps / 10))
        return math.ceil(wanted / unit) * unit

    @property
    def may_stop(self) -> bool:
        """Can a run go on from here exactly? Not in the middle of a batch that is kept for several steps."""
        return self.state.step % self.config.method.steps_per_batch == 0

    def save(self) -> None:
        """Save the state and the encoder; the main process alone does."""
        if distributed.is_main():
            self.checkpoints.save(self.state.to_dict(self.config, self.images))
            save_weights(
                self.folder.weights_file,
                self.state.student.encoder.state_dict(),
                timm_arguments(self.config),
                input_config(self.config),
            )
