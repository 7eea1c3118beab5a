"""What a run is made of, and the part of it that changes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hardpatch.config.config import Config
from hardpatch.data.loader.loading import Position
from hardpatch.data.sources import Source
from hardpatch.method.method import Method, Student, Teacher
from hardpatch.method.schedules import hard_share, hard_share_by_epoch, stage
from hardpatch.method.targets.tokens import KMeansTokenizer
from hardpatch.runs.build import Stage, build_student, choose_attention, input_config, timm_arguments
from hardpatch.runs.checkpoint import CheckpointFolder, save_weights
from hardpatch.runs.folder import RunFolder
from hardpatch.runs.schedule import Schedule, branching_step
from hardpatch.runtime import distributed
from hardpatch.training.gate import MiningGate
from hardpatch.training.sharding import gathered, gathered_on_main, is_sharded, shares_of, shares_of_optimizer


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
        """Whole tensors and plain values only, so that ``torch.load(weights_only=True)`` reads it.

        Where the models are sharded every process has to ask, and the main process alone gets them.
        """
        return {
            "images": images,
            "step": self.step,
            "seconds": self.seconds,
            "student": gathered_on_main(self.student.state_dict()),
            "teacher": gathered_on_main(self.teacher.model.state_dict()),
            "optimizer": gathered_on_main(self.optimizer.state_dict()),
            "gate": self.gate.correlation,
            "target": self.codebook.state_dict() if self.codebook is not None else {},
            "config": asdict(config),
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.step, self.seconds = saved["step"], saved["seconds"]
        for model, name in ((self.student, "student"), (self.teacher.model, "teacher")):
            model.load_state_dict(shares_of(saved[name], model.state_dict()))
        self.optimizer.load_state_dict(shares_of_optimizer(saved["optimizer"], self.optimizer))
        self.gate.correlation.copy_(saved["gate"])
        if self.codebook is not None:
            self.codebook.adopt(**saved["target"])

    def whole(self, config: Config) -> tuple[Student, Teacher]:
        """Student and teacher to look at: these, or whole copies where they are sharded; every process has to ask."""
        if not is_sharded(self.student):
            return self.student, self.teacher
        tensors, device = gathered(self.student.state_dict()), self.student.positions.device
        with torch.device("meta"):
            student = build_student(config, target_dim=len(tensors["reconstructor.head.weight"]))
            teacher = Teacher(student)
        student.load_state_dict(tensors, assign=True)
        teacher.model.load_state_dict(gathered(self.teacher.model.state_dict()), assign=True)
        for model in (student, teacher):
            choose_attention(model, device, bf16=distributed.is_bf16(config.run.precision, device))
        return student, teacher


@dataclass
class Run:
    """Everything a run needs, checked and put together."""

    config: Config
    folder: RunFolder
    device: torch.device
    bf16: bool
    compiled: bool
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
        """Images in a step; each has ``masks_per_image`` views."""
        return self.config.optimisation.batch_size // self.config.method.masks_per_image

    @property
    def files_per_step(self) -> int:
        """Different images of the source in a step; each is cropped ``crops_per_image`` times."""
        return self.images_per_step // self.config.data.crops_per_image

    @property
    def method(self) -> Method:
        """The choices of the run, for images of full size."""
        return self.stages[-1].method

    def stage(self, step: int) -> Stage:
        """The stage of a step; a batch that is kept for several steps stays in that of its first."""
        first = step - step % self.config.method.steps_per_batch
        return self.stages[-1] if len(self.stages) == 1 else self.stages[stage(first, self.schedule.ramp_steps)]

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
            "total_steps": schedule.ramp_steps,
        }
        if method.hard_share_unit == "epoch":
            return hard_share_by_epoch(step, **ends, steps_per_epoch=schedule.steps_per_epoch)  # type: ignore[arg-type]
        return hard_share(step, **ends)  # type: ignore[arg-type]

    @property
    def checkpoint_steps(self) -> int:
        """Steps between two scheduled checkpoints."""
        unit = self.config.method.steps_per_batch
        wanted = self.config.run.checkpoint_steps or max(1, math.ceil(self.schedule.total_steps / 10))
        return math.ceil(wanted / unit) * unit

    @property
    def branching_step(self) -> int | None:
        """The step whose checkpoint is kept so that a run of another length can branch off; None: none can."""
        return branching_step(self.config, self.schedule)

    @property
    def may_stop(self) -> bool:
        """Can a run go on from here exactly? Not in the middle of a batch that is kept for several steps."""
        return self.state.step % self.config.method.steps_per_batch == 0

    def save(self) -> None:
        """Save the state and the encoder; every process has to ask, the main process alone writes."""
        state = self.state.to_dict(self.config, self.images)
        if distributed.is_main():
            self.checkpoints.save(state)
            prefix = "encoder."
            save_weights(
                self.folder.weights_file,
                {name[len(prefix) :]: tensor for name, tensor in state["student"].items() if name.startswith(prefix)},
                timm_arguments(self.config),
                input_config(self.config),
            )
