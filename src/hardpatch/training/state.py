"""What a run is made of, and the part of it that changes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from hardpatch.config.config import Config
from hardpatch.data.loader.loading import Position
from hardpatch.data.sources import Source
from hardpatch.method.hpm import HPM
from hardpatch.method.method import Method
from hardpatch.method.schedules import hard_share, hard_share_by_epoch
from hardpatch.method.targets.target import FittedTarget
from hardpatch.runs.build import build_student, choose_attention, input_config, timm_arguments
from hardpatch.runs.checkpoint import CheckpointFolder, save_weights
from hardpatch.runs.folder import RunFolder
from hardpatch.runs.schedule import Schedule
from hardpatch.runtime import distributed
from hardpatch.runtime.waiting import note_kept
from hardpatch.training.gate import MiningGate
from hardpatch.training.sharding import gathered, gathered_on_main, is_sharded, shares_of, shares_of_optimizer

Resume = Literal["auto", "never", "restart"]
"""What to do with a folder that holds a run: go on with it, refuse, or start over."""


@dataclass
class State:
    """All that changes while training, and what was fitted to the images before: what a checkpoint holds."""

    model: HPM
    optimizer: torch.optim.Optimizer
    gate: MiningGate
    step: int = 0
    seconds: float = 0.0

    def to_dict(self, config: Config, images: str) -> dict[str, Any]:
        """Whole tensors and plain values only, so that ``torch.load(weights_only=True)`` reads it.

        Where the models are sharded every process has to ask, and the main process alone gets them.
        """
        target, teacher = self.model.method.target, self.model.teacher
        return {
            "images": images,
            "step": self.step,
            "seconds": self.seconds,
            "student": gathered_on_main(self.model.student.state_dict()),
            **({} if teacher is None else {"teacher": gathered_on_main(teacher.model.state_dict())}),
            "optimizer": gathered_on_main(self.optimizer.state_dict()),
            "gate": self.gate.correlation,
            "target": target.fitted_state() if isinstance(target, FittedTarget) else {},
            "config": asdict(config),
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.model.student.load_state_dict(shares_of(saved["student"], self.model.student.state_dict()))
        if self.model.teacher is not None:
            averaged = self.model.teacher.model
            averaged.load_state_dict(shares_of(saved["teacher"], averaged.state_dict()))
        self.optimizer.load_state_dict(shares_of_optimizer(saved["optimizer"], self.optimizer))
        self.gate.correlation.copy_(saved["gate"])
        if isinstance(target := self.model.method.target, FittedTarget):
            target.adopt(saved["target"])

    def whole(self, config: Config) -> HPM:
        """The model to look at: this one, or a whole copy where it is sharded; every process has to ask."""
        if not is_sharded(self.model.student):
            return self.model
        tensors, device = gathered(self.model.student.state_dict()), self.model.student.positions.device
        with torch.device("meta"):
            student = build_student(config, target_dim=len(tensors["reconstructor.head.weight"]))
            whole = HPM(student, self.model.method)
        student.load_state_dict(tensors, assign=True)
        bf16 = distributed.is_bf16(config.run.precision, device)
        choose_attention(student, device, bf16=bf16)
        if whole.teacher is not None and self.model.teacher is not None:
            whole.teacher.model.load_state_dict(gathered(self.model.teacher.model.state_dict()), assign=True)
            choose_attention(whole.teacher, device, bf16=bf16)
        return whole


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
    state: State
    checkpoints: CheckpointFolder
    images: str
    """Fingerprint of the training images."""
    spent: dict[str, float] = field(default_factory=lambda: {"start": 0.0, "looks": 0.0, "checkpoints": 0.0})
    """Seconds of this command beside its steps."""

    @property
    def method(self) -> Method:
        """The choices of the run."""
        return self.state.model.method

    def hard_share(self, step: int) -> float:
        """a_t."""
        method, schedule = self.config.method, self.schedule
        if self.method.guide is None:
            return 0.0
        share = hard_share
        if method.hard_share_unit == "epoch":
            share = partial(hard_share_by_epoch, steps_per_epoch=schedule.steps_per_epoch)
        return share(step, start=method.hard_share_start, end=method.hard_share_end, total_steps=schedule.ramp_steps)

    @property
    def checkpoint_steps(self) -> int:
        """Steps between two scheduled checkpoints."""
        return self.config.run.checkpoint_steps or max(1, math.ceil(self.schedule.total_steps / 10))

    def save(self) -> None:
        """Save the state and the encoder; every process has to ask, the main process alone writes."""
        state = self.state.to_dict(self.config, self.images)
        if distributed.is_main():
            note_kept(self.checkpoints.file(self.state.step))
            self.checkpoints.save(state)
            prefix = "encoder."
            save_weights(
                self.folder.weights_file,
                {name[len(prefix) :]: tensor for name, tensor in state["student"].items() if name.startswith(prefix)},
                timm_arguments(self.config),
                input_config(self.config),
            )
