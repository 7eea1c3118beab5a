"""Graphs without Python code of a model behind them: ONNX, and PyTorch's own ``torch.export``."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from hardpatch.config.commands import Output
from hardpatch.export.backbone import Backbone, Computed, Pooled, random_images

INPUT, OUTPUT = "images", "features"
"""Names in the graph."""

_LARGEST_FILE = 1_800_000_000
"""Bytes of weights in an ONNX file of its own; the format's limit is 2 GiB."""


def write_onnx(backbone: Backbone, to: Path, output: Output) -> None:
    """One ``.onnx`` file; weights beyond the format's limit lie beside it in ``.onnx.data``."""
    model = Pooled(backbone.vit, output)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    with _quiet():
        program = torch.onnx.export(
            model, (random_images(backbone, 2),), dynamo=True, verbose=False,
            input_names=[INPUT], output_names=[OUTPUT], dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
        )  # fmt: skip
        assert program is not None  # with dynamo=True there always is one
        program.model.metadata_props["hardpatch"] = json.dumps(about(backbone, output))
        program.save(to, external_data=size > _LARGEST_FILE)


def read_onnx(path: Path, backbone: Backbone) -> Computed:
    """Read it as a user of onnxruntime would."""
    import onnxruntime

    del backbone
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def write_program(backbone: Backbone, to: Path, output: Output) -> None:
    """One ``.pt2`` file."""
    with _quiet():
        program = torch.export.export(
            Pooled(backbone.vit, output), (random_images(backbone, 2),),
            dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
        )  # fmt: skip
        torch.export.save(program, to, extra_files={"hardpatch.json": json.dumps(about(backbone, output))})


def read_program(path: Path, backbone: Backbone) -> Computed:
    """Read it as a user of PyTorch would, without timm."""
    del backbone
    with _quiet():
        module = torch.export.load(path).module()

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        features: Tensor = module(images)
        return features

    return run


def about(backbone: Backbone, output: Output) -> dict[str, object]:
    """What a graph says of itself."""
    return {"output": output, "input": backbone.input, "encoder": backbone.arguments, "step": backbone.step}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters tell their own developers; what they write is checked afterwards."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)
