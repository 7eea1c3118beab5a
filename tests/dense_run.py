"""A run folder with an untrained tiny encoder, made without training, and folders of small images with masks."""

from dataclasses import asdict

import numpy as np
import torch
from PIL import Image

from hardpatch.method.student import Teacher
from hardpatch.runs.build import build_student
from hardpatch.runs.checkpoint import CheckpointFolder
from hardpatch.runs.folder import RunFolder
from tiny import tiny_config


def write_run(path, **changes):
    """A run of a one-block encoder on 32-pixel images of 8-pixel patches, as pre-training would leave it."""
    config = tiny_config(**changes)
    student = build_student(config)
    folder = RunFolder(path)
    folder.write_config(config, torch.device("cpu"))
    CheckpointFolder(folder.checkpoints).save(
        {
            "step": 1,
            "config": asdict(config),
            "student": student.state_dict(),
            "teacher": Teacher(student).model.state_dict(),
        }
    )
    return path


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def write_blobs(folder, count, *, size=(40, 56), seed=0, value=255):
    """Dark noise with bright squares on a grid of 8 pixels; the masks are the squares. Returns (images, masks)."""
    random = np.random.default_rng(seed)
    for number in range(count):
        mask = np.zeros(size, dtype=np.uint8)
        for row, column in random.permutation(6).reshape(3, 2)[:2]:
            top, left = 8 * (row % 3), 8 * column
            mask[top : top + 12, left : left + 12] = 1
        image = random.integers(0, 60, (*size, 3)) + 180 * mask[..., None]
        save(folder / "images" / f"{number}.png", image.astype(np.uint8))
        save(folder / "masks" / f"{number}.png", mask * value)
    return folder / "images", folder / "masks"
