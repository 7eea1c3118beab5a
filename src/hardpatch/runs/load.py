"""Models back out of a run."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from hardpatch.config.values import validated
from hardpatch.method.method import Method
from hardpatch.method.student import Student, Teacher
from hardpatch.method.targets.target import FittedTarget
from hardpatch.runs.build import (
    build_method,
    build_normalise,
    build_student,
    build_target,
    input_config,
    timm_arguments,
)
from hardpatch.runs.checkpoint import CheckpointFolder, about_weights, load_verified
from hardpatch.runs.folder import RunFolder
from hardpatch.runs.kinds import WrongKind, what_it_is
from hardpatch.runtime.errors import InputError


def locate_checkpoint(checkpoint: str | Path) -> dict[str, Any]:
    """Load the state of a run folder (its newest whole checkpoint) or of one ``.pt`` file.

    Raises:
        InputError: Nothing there, damaged, or another thing than a run; says what.
    """
    path = Path(checkpoint).expanduser()
    if not path.exists():
        raise InputError(f"checkpoint: {str(path)!r} does not exist")
    try:
        if path.is_file():
            return load_verified(path.resolve(), require_checksum=False)
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        if state := CheckpointFolder(folder, if_damaged="give another run, or a copy of this one").load_latest():
            return state
    except WrongKind:
        pass
    raise InputError(
        f"checkpoint: needs a run folder or a .pt of its checkpoints, and {str(path)!r} is "
        f"{what_it_is(path) or 'neither'}"
    )


class LoadedRun:
    """A trained student and teacher with their config.

    Args:
        checkpoint: A run folder, or one of its ``.pt`` files.
        device: Where to put the models.

    Raises:
        InputError: Nothing there, or damaged.
    """

    def __init__(self, checkpoint: str | Path, *, device: torch.device | None = None) -> None:
        state = locate_checkpoint(checkpoint)
        device = device or torch.device("cpu")
        self.config = validated(state["config"])
        self.step: int = state["step"]
        # The width of the target stands in the weights: a frozen model is not needed to read them.
        target_dim = len(state["student"]["reconstructor.head.weight"])
        self.student: Student = build_student(self.config, target_dim=target_dim)
        self.student.load_state_dict(state["student"])
        self.student.to(device).eval()
        self.teacher = Teacher(self.student)  # of a run without one: the student as it is
        if "teacher" in state:
            self.teacher.model.load_state_dict(state["teacher"])
        self.normalise = build_normalise(self.config).to(device)
        self.device = device
        self._target: dict[str, torch.Tensor] = state.get("target", {})

    @cached_property
    def method(self) -> Method:
        """The choices of the run, with the target as it was saved; a frozen target model is loaded only here.

        Raises:
            InputError: The target's model or tokenizer cannot be loaded any more.
        """
        target = build_target(self.config)
        if isinstance(target, FittedTarget):
            target.adopt(self._target)
        if isinstance(target, nn.Module):
            target.to(self.device)
        return build_method(self.config, self.student, target)


def load_teacher(checkpoint: str | Path) -> Teacher:
    """The EMA teacher of a run, in evaluation mode; ``teacher.predict_loss(images)`` says what is hard.

    The images must be normalised as in the run (``data.mean`` and ``data.std`` of its config; ImageNet's by default).

    Args:
        checkpoint: A run folder, or one of its ``.pt`` files.

    Raises:
        InputError: Nothing there, or damaged.
    """
    return LoadedRun(checkpoint).teacher


def load_encoder(checkpoint: str | Path) -> VisionTransformer:
    """The pre-trained backbone as a plain timm model in evaluation mode.

    How it wants its images (mean, standard deviation, size) stands in its ``pretrained_cfg``, where timm looks for it:
    ``timm.data.create_transform(**timm.data.resolve_model_data_config(backbone))``.

    Args:
        checkpoint: A run folder, its ``weights.safetensors``, or one of its ``.pt`` files.

    Raises:
        InputError: Nothing there, damaged, or a fine-tuned classifier.
    """
    backbone = load_backbone(checkpoint)
    if backbone.num_classes:
        raise InputError(f"checkpoint: {str(checkpoint)!r} is a fine-tuned classifier: load_classifier gives all of it")
    return backbone


def load_backbone(checkpoint: str | Path) -> VisionTransformer:
    """What :func:`load_encoder` gives, or a fine-tuned classifier with its head."""
    if weights := _weights_file(checkpoint):
        return load_timm_weights(weights)
    run = LoadedRun(checkpoint)
    run.student.encoder.pretrained_cfg.update(input_config(run.config))
    return run.student.encoder


def load_timm_weights(weights: Path, *, field: str = "checkpoint") -> VisionTransformer:
    """The model in a safetensors file of :func:`hardpatch.runs.checkpoint.save_weights`, in evaluation mode.

    Args:
        weights: The file.
        field: What to call it in a message.

    Raises:
        InputError: It holds no model of hardpatch.
    """
    arguments, wanted, state = _read_timm_weights(weights, field)
    model: VisionTransformer = timm.create_model(**arguments)
    model.load_state_dict(state)
    model.pretrained_cfg.update(wanted)
    return model.eval()


def arguments_of_encoder(checkpoint: str | Path) -> dict[str, Any]:
    """Arguments with which ``timm.create_model`` builds what :func:`load_encoder` returns for the same checkpoint.

    Raises:
        InputError: Nothing there, or damaged.
    """
    if weights := _weights_file(checkpoint):
        return _read_timm_weights(weights, "checkpoint")[0]
    return timm_arguments(LoadedRun(checkpoint).config)


def _weights_file(checkpoint: str | Path) -> Path | None:
    """The ``.safetensors`` that is meant or lies in the run folder that is meant, if there is one."""
    path = Path(checkpoint).expanduser()
    weights = RunFolder(path).weights_file if path.is_dir() else path
    if path.is_dir() and CheckpointFolder(weights.parent).steps():
        return None  # the checkpoint says the same, and has a checksum
    return weights if weights.suffix == ".safetensors" and weights.is_file() else None


def _read_timm_weights(weights: Path, field: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor]]:
    """How timm builds the model, how it wants its images, and its weights."""
    try:
        with safe_open(weights, framework="pt") as file:
            about = about_weights(file.metadata())
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return about["timm"], about["input"], state
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        what = what_it_is(weights) or f"no encoder of hardpatch, or damaged: {error}"
        raise InputError(f"{field}: {str(weights)!r} is {what}") from error
