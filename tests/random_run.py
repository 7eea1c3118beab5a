"""A run folder of a tiny student with random weights: everything that reads a run, without training one."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from hardpatch.runs.checkpoint import CheckpointFolder
from hardpatch.runs.folder import RunFolder
from tiny import tiny_config, tiny_student


def random_run(path: Path, **changes) -> Path:
    """Student and teacher differ; 12 steps are said to lie behind them."""
    config = tiny_config(**changes)
    student = tiny_student(**changes)
    with torch.no_grad():
        table = student.encoder.pos_embed
        table += torch.randn(table.shape, generator=torch.Generator().manual_seed(7)) * 0.1
    folder = RunFolder(path)
    folder.write_config(config, torch.device("cpu"))
    CheckpointFolder(folder.checkpoints).save(
        {
            "step": 12,
            "student": student.state_dict(),
            "teacher": tiny_student(seed=1, **changes).state_dict(),
            "config": asdict(config),
        }
    )
    folder.result_file.write_text(json.dumps({"steps": 12, "reconstruction_loss": 0.75, "knn_top1": None}))
    return path
