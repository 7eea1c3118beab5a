"""What may hang or break Python, each tried in a process of its own: ``python -m hpm.doctor.trials NAME ARGUMENTS``.

The last line on standard output is a JSON list of findings.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from hpm.doctor.findings import Finding

TOLERANCE = 1e-4
"""Of a loss on the device to that of the CPU, both in float32, relative."""
BF16_TOLERANCE = 0.03
TINY = {
    "encoder": "vit_tiny_patch16_224", "encoder_depth": 2, "image_size": 32, "patch_size": 8, "decoder_width": 32,
    "decoder_depth": 1, "predictor_depth": 1, "decoder_heads": 2, "batch_size": 8,
}  # fmt: skip
"""A run whose step is tried."""
NUM_IMAGES = 64


def try_device(name: str) -> Iterator[Finding]:
    """Import everything, find the device, and take a training step on it."""
    import torch
    import torchvision

    torchvision.ops.nms(torch.rand(2, 4), torch.rand(2), 0.5)  # fails where it was built for another torch

    from hpm import distributed

    device = distributed.choose_device(name)  # type: ignore[arg-type]
    yield _describe(device)
    yield from _try_step(device)


def _describe(device: Any) -> Finding:
    import torch

    from hpm import distributed

    bf16 = distributed.has_bf16(device)
    precision = "bf16" if bf16 else "no bf16, so float32"
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        free = torch.cuda.mem_get_info(device)[0]
        found = (
            f"{about.name}, {free / 2**30:.1f} of {about.total_memory / 2**30:.1f} GiB free, compute capability "
            f"{about.major}.{about.minor}, CUDA {torch.version.cuda}, {precision}"
        )
        if free < about.total_memory / 2:
            return Finding("device", "warning", found, "other programs hold most of its memory: nvidia-smi shows which")
        if not bf16:
            return Finding("device", "warning", found, "GPUs before Ampere are several times slower")
        return Finding("device", "ok", found)
    if device.type == "cpu" and shutil.which("nvidia-smi") and not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        return Finding(
            "device", "warning", f"CPU, although there is nvidia-smi: torch {torch.__version__} {built}",
            "if nvidia-smi lists a GPU, install a torch for its driver (pytorch.org, Get started), and look at "
            "CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    found = f"{device.type.upper()}, {precision}"
    if device.type == "cpu":
        return Finding(
            "device", "note", found, "fine for 64-px images and small models; hpm plan says what is possible"
        )
    return Finding("device", "ok", found)


def _try_step(device: Any) -> Iterator[Finding]:
    """One step of a tiny model, held against the CPU's."""
    import torch

    from hpm import distributed

    start = time.perf_counter()
    expected, found = _loss(torch.device("cpu")), _loss(device)
    seconds = time.perf_counter() - start
    if not math.isclose(found, expected, rel_tol=TOLERANCE):
        yield Finding(
            "training step", "problem", f"the loss on {device} is {found:.6g}, on the CPU {expected:.6g}",
            "the device computes something else: look at its driver, and try --device cpu",
        )  # fmt: skip
        return
    told = f"loss {found:.5f} on {device}, {expected:.5f} on the CPU ({seconds:.1f} s)"
    if distributed.has_bf16(device):
        rounded = _loss(device, bf16=True)
        told += f", {rounded:.5f} in bf16"
        if not math.isclose(rounded, expected, rel_tol=BF16_TOLERANCE):
            yield Finding("training step", "problem", told, "bf16 goes wrong here: give --precision float32")
            return
    yield Finding("training step", "ok", told)


def _loss(device: Any, *, bf16: bool = False, compiled: bool = False) -> float:
    """Of one step of a tiny model from fixed weights, images and noise, after its backward pass."""
    import torch

    from hpm.build import build_method, build_student, compile_blocks
    from hpm.config import Config, with_fields
    from hpm.method import Teacher

    config = with_fields(Config(), TINY)
    torch.manual_seed(0)
    student = build_student(config)
    images = torch.randn(8, 3, 32, 32).to(device)
    noise = torch.rand(8, 16).to(device)
    method = build_method(config, student.to(device))
    teacher = Teacher(student)
    if compiled:
        compile_blocks(student, teacher)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        losses = method.step(student, teacher, images, noise, num_hard=4)
    losses.total.backward()
    gradients = torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None]).norm()
    if not torch.isfinite(gradients):
        return math.nan
    return float(losses.total.detach())


def try_compilation(name: str) -> Iterator[Finding]:
    """Compile the blocks of a tiny model, and take the same step with them."""
    from hpm import distributed

    device = distributed.choose_device(name)  # type: ignore[arg-type]
    expected = _loss(device)
    start = time.perf_counter()
    try:
        found = _loss(device, compiled=True)
    except Exception as error:  # whatever it is, of whichever compiler: it is the finding
        yield Finding(
            "compilation", "problem", f"torch.compile fails: {str(error).strip().splitlines()[0]}",
            "install a C compiler and Python's headers (gcc, python3-dev), or give --compile off",
        )  # fmt: skip
        return
    told = f"loss {found:.5f}, {expected:.5f} without; {time.perf_counter() - start:.0f} s for four graphs"
    same = math.isclose(found, expected, rel_tol=TOLERANCE)
    yield Finding("compilation", "ok" if same else "problem", told, "" if same else "give --compile off")


def try_data_processes() -> Iterator[Finding]:
    """Start the data processes of a run on embedded images, and wait for their first batches."""
    from hpm.data.loading import (
        Position,
        TrainingImages,
        TrainingOrder,
        default_workers,
        training_batches,
    )
    from hpm.data.sources import open_source

    workers = default_workers()
    source = open_source(f"shapes:{NUM_IMAGES}", image_size=(64, 64), field="data")
    images = TrainingImages(source, size=(64, 64), crop_scale=(0.2, 1.0), flip=True, seed=0)
    steps = 4 * max(1, workers)
    order = TrainingOrder(NUM_IMAGES, batch_size=8, first_step=0, total_steps=steps, seed=0, position=Position())
    start = time.perf_counter()
    count = sum(len(batch.images) for batch in training_batches(images, order, workers=workers, pin_memory=False))
    seconds = time.perf_counter() - start
    yield Finding("data processes", "ok", f"{workers} of them gave {count} images in {seconds:.1f} s, start included")


def try_images(source: str) -> Iterator[Finding]:
    """Read some of the images."""
    from hpm.data.decode import DecodeError
    from hpm.data.sources import open_source
    from hpm.errors import InputError

    try:
        images = open_source(source, image_size=(224, 224), field="data")
    except InputError as error:
        yield Finding("images", "problem", str(error))
        return
    damaged, start = [], time.perf_counter()
    indices = images.spread(NUM_IMAGES)
    for index in indices:
        try:
            images.read(index)
        except (DecodeError, OSError) as error:
            damaged.append(f"{images.name(index)}: {error}")
    rate = len(indices) / (time.perf_counter() - start)
    labels = f"{len(set(images.labels))} classes" if images.labels else "no labels"
    found = f"{len(images):,}, {labels}; {len(indices)} read whole at {rate:,.0f} images/s on one core"
    if damaged:
        state: Any = "problem" if len(damaged) == len(indices) else "warning"
        told = f"{found}; {len(damaged)} damaged, the first: {damaged[0]}"
        yield Finding("images", state, told, f"hpm data check {source} --out DIR lists them all")
    else:
        yield Finding("images", "ok", found)


TRIALS: dict[str, Callable[..., Iterator[Finding]]] = {
    "device": try_device,
    "compilation": try_compilation,
    "data processes": try_data_processes,
    "images": try_images,
}
"""By what they look at."""


if __name__ == "__main__":
    found = list(TRIALS[sys.argv[1]](*sys.argv[2:]))
    print(json.dumps(found), flush=True)
