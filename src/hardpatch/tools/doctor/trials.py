"""What may hang or break Python, tried in processes: ``python -m hardpatch.tools.doctor.trials NAME ARGUMENTS``.

The last line on standard output is a JSON list of findings; what broke is the last of them.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from hardpatch.tools.doctor import Finding
from hardpatch.tools.doctor.surroundings import look_at_folder

TINY = {
    "encoder": "vit_tiny_patch16_224", "encoder_depth": 2, "image_size": 32, "patch_size": 8, "decoder_width": 32,
    "decoder_depth": 1, "predictor_depth": 1, "decoder_heads": 2, "batch_size": 8,
}  # fmt: skip
"""A run whose step is tried."""
NUM_IMAGES = 64


class Step(NamedTuple):
    """What a training step comes to."""

    loss: float
    gradient_norm: float
    next_loss: float
    """After the optimizer has made its step."""

    def differs_from(self, expected: Step, *, bf16: bool = False) -> bool:
        """Is it another, beyond rounding? Between devices in float32 (TF32 in convolutions keeps to it), or by bf16."""
        tolerance = (3e-3, 3e-2, 3e-3) if bf16 else (1e-4, 1e-3, 1e-4)
        return not all(math.isclose(a, b, rel_tol=c) for a, b, c in zip(self, expected, tolerance))

    def __str__(self) -> str:
        return f"loss {self.loss:.6g}, gradient norm {self.gradient_norm:.6g}, loss after the step {self.next_loss:.6g}"


def try_device(name: str) -> Iterator[Finding]:
    """Import everything, find the device, and take a training step on it; on every GPU, where no other process does."""
    import os

    import torch
    import torchvision

    torchvision.ops.nms(torch.rand(2, 4), torch.rand(2), 0.5)  # fails where it was built for another torch

    from hardpatch.runtime import distributed
    from hardpatch.runtime.errors import InputError

    try:
        device = distributed.choose_device(name)  # type: ignore[arg-type]
    except InputError as error:
        yield Finding("device", "problem", str(error))
        return
    yield _describe(device)
    devices = [device]
    if device.type == "cuda" and "RANK" not in os.environ and torch.cuda.device_count() > 1:
        number = torch.cuda.device_count()
        yield Finding(
            "GPUs", "note", f"{number}", f"torchrun --nproc-per-node {number} -m hardpatch pretrain takes all of them"
        )
        devices = [torch.device("cuda", index) for index in range(number)]
    for one in devices:
        yield _try_step(one)


def _describe(device: Any) -> Finding:
    import torch

    from hardpatch.runtime import distributed

    bf16 = distributed.has_bf16(device)
    precision = "bf16" if bf16 else "no bf16, so float32"
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        free = torch.cuda.mem_get_info(device)[0]
        library = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        found = (
            f"{about.name}, {free / 2**30:.1f} of {about.total_memory / 2**30:.1f} GiB free, compute capability "
            f"{about.major}.{about.minor}, {library}, {precision}"
        )
        if free < about.total_memory / 2:
            return Finding("device", "warning", found, "other programs hold most of its memory: nvidia-smi shows which")
        if not bf16:
            return Finding("device", "warning", found, "GPUs before Ampere are several times slower")
        return Finding("device", "ok", found)
    found = f"{device.type.upper()}, {precision}"
    if device.type != "cpu":
        return Finding("device", "ok", found)
    driver = shutil.which("nvidia-smi") is not None
    if torch.version.cuda and not torch.cuda.is_available():
        return Finding(
            "device", "warning" if driver else "note",
            f"{found}; torch is built for CUDA {torch.version.cuda} and sees no GPU",
            "without a GPU: enough for 64-px images and small models. With one: is it given to this container or job "
            "(--gpus all, --gres=gpu:1), is CUDA_VISIBLE_DEVICES right, is the driver new enough?",
        )  # fmt: skip
    if driver and not torch.cuda.is_available():
        advice = "if nvidia-smi lists a GPU, install a torch for its driver: pytorch.org, Get started"
        return Finding("device", "warning", f"{found}; torch is built without CUDA, and there is nvidia-smi", advice)
    advice = "enough for 64-px images and small models; hardpatch plan says what is possible"
    return Finding("device", "note", found, advice)


def _try_step(device: Any) -> Finding:
    """A step of a tiny model, held against the CPU's."""
    import torch

    from hardpatch.runtime import distributed

    about = "training step" if device.index in (None, 0) else f"training step, GPU {device.index}"
    start = time.perf_counter()
    expected, found = take_step(torch.device("cpu")), take_step(device)
    told = f"loss {found.loss:.5f} and {found.next_loss:.5f} after it"
    if found.differs_from(expected):
        return Finding(
            about, "problem", f"on {device} {found}; on the CPU {expected}",
            "the device computes something else: look at its driver, and try --device cpu",
        )  # fmt: skip
    told += ", as on the CPU" if device.type != "cpu" else ""
    if distributed.has_bf16(device):
        rounded = take_step(device, bf16=True)
        if rounded.differs_from(expected, bf16=True):
            return Finding(
                about, "problem", f"in bf16 {rounded}; in float32 {expected}",
                "bf16 goes wrong here: give --precision float32",
            )  # fmt: skip
        told += f"; in bf16 {rounded.loss:.5f} and {rounded.next_loss:.5f}"
    return Finding(about, "ok", f"{told} ({time.perf_counter() - start:.1f} s)")


def take_step(device: Any, *, bf16: bool = False, compiled: bool = False) -> Step:
    """One step of a tiny model from fixed weights, images and noise."""
    import torch

    from hardpatch.config.config import Config
    from hardpatch.config.values import with_fields
    from hardpatch.method.method import Losses
    from hardpatch.runs.build import build_hpm, build_optimizer, choose_attention, compile_blocks

    config = with_fields(Config(), TINY)
    torch.manual_seed(0)
    model = build_hpm(config).to(device)
    student = model.student
    images, noise = torch.randn(8, 3, 32, 32).to(device), torch.rand(8, 16).to(device)
    for part in model.networks:
        choose_attention(part, device, bf16=bf16)
    if compiled:
        compile_blocks(*model.networks)

    def losses() -> Losses:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return model.step(images, noise, num_hard=4)

    optimizer = build_optimizer(config.optimisation, student)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    first = losses().total
    first.backward()
    norm = torch.nn.utils.clip_grad_norm_([p for p in student.parameters() if p.requires_grad], 5.0)
    optimizer.step()
    model.update_teacher(decay=0.9)
    with torch.no_grad():
        second = losses().total
    return Step(float(first.detach()), float(norm), float(second))


def try_compilation(name: str) -> Iterator[Finding]:
    """Compile the blocks of a tiny model, and take the same step with them, in the precision of a run."""
    from hardpatch.runtime import distributed

    device = distributed.choose_device(name)  # type: ignore[arg-type]
    bf16 = distributed.has_bf16(device)
    expected = take_step(device, bf16=bf16)
    start = time.perf_counter()
    try:
        found = take_step(device, bf16=bf16, compiled=True)
    except Exception as error:  # whatever it is, of whichever compiler: it is the finding
        yield Finding(
            "compilation", "problem", f"torch.compile fails: {str(error).strip().splitlines()[0]}",
            "install a C compiler and Python's headers (gcc, python3-dev), or give --compile off",
        )  # fmt: skip
        return
    seconds = time.perf_counter() - start
    if found.differs_from(expected, bf16=bf16):
        yield Finding("compilation", "problem", f"compiled: {found}; without: {expected}", "give --compile off")
        return
    yield Finding("compilation", "ok", f"loss {found.loss:.5f}, {expected.loss:.5f} without; {seconds:.0f} s")


def try_data_processes() -> Iterator[Finding]:
    """Start the data processes of a run on embedded images, and wait for their first batches."""
    from hardpatch.data.loader.loading import (
        Position,
        TrainingImages,
        TrainingOrder,
        default_workers,
        training_batches,
    )
    from hardpatch.data.sources import open_source
    from hardpatch.runtime.errors import InputError

    workers = default_workers()
    source = open_source(f"shapes:{NUM_IMAGES}", image_size=(64, 64), field="data")
    images = TrainingImages(source, size=(64, 64), crop_scale=(0.2, 1.0), flip=True, seed=0)
    steps = 4 * max(1, workers)
    order = TrainingOrder(NUM_IMAGES, batch_size=8, first_step=0, total_steps=steps, seed=0, position=Position())
    start = time.perf_counter()
    try:
        count = sum(len(batch.images) for batch in training_batches(images, order, workers=workers, pin_memory=False))
    except InputError as error:  # embedded images are never damaged
        advice = "shared memory or memory is short: start the container with --shm-size 8g, or give fewer --workers"
        yield Finding("data processes", "problem", str(error).partition(";")[0], advice)
        return
    seconds = time.perf_counter() - start
    who = f"{workers} gave" if workers else "none beside the training process, which made"
    yield Finding("data processes", "ok", f"{who} {count} images in {seconds:.1f} s, start included")


def try_images(source: str) -> Iterator[Finding]:
    """Look at the images and read some of them."""
    from hardpatch.config.config import Config
    from hardpatch.config.values import with_fields
    from hardpatch.data.images.decode import DecodeError
    from hardpatch.runtime.errors import InputError
    from hardpatch.tools.plan.images_found import open_images_of

    try:
        config, images, found = open_images_of(with_fields(Config(), {"data": source}), {})
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
    channels = "" if config.data.channels == 3 else f" in {config.data.channels} channels"
    told = (
        f"{found.number:,}, about {found.width}x{found.height} px{channels}, "
        f"{f'{found.classes} classes' if found.classes else 'no labels'}; {rate:,.0f} whole images/s on one core"
    )
    if damaged:
        told += f"; {len(damaged)} of {len(indices)} damaged, the first: {damaged[0]}"
        yield Finding("images", "warning", told, f"hardpatch data check {source} --out DIR lists them all")
    elif config.data.channels != 3:
        yield Finding("images", "note", told, f"give --channels {config.data.channels} to hardpatch pretrain")
    else:
        yield Finding("images", "ok", told)


TRIALS: dict[str, Callable[..., Iterator[Finding]]] = {
    "disk": look_at_folder,
    "device": try_device,
    "compilation": try_compilation,
    "data processes": try_data_processes,
    "images": try_images,
}
"""By what they look at."""

CAUSES = {
    "no kernel image is available": "this torch was not built for this GPU: install one that was (pytorch.org)",
    "CUDA driver version is insufficient": "the driver is too old for this torch: update it, or install an older torch",
    "torchvision::": "torch and torchvision do not match: install both anew, by the constraints file",
    "undefined symbol": "torch and torchvision do not match: install both anew, by the constraints file",
    "out of memory": "other programs hold the device's memory: nvidia-smi shows which",
}
"""What an error says, and what to do about it."""


def findings_of(name: str, *arguments: str) -> list[Finding]:
    """What a trial finds; what stops it is the last finding."""
    found: list[Finding] = []
    try:
        found.extend(TRIALS[name](*arguments))
    except Exception as error:  # broken packages and drivers raise anything
        traceback.print_exc()
        told = str(error).strip().splitlines() or [""]
        advice = next((what for said, what in CAUSES.items() if said in str(error)), "")
        found.append(Finding(name, "problem", f"{type(error).__name__}: {told[0]}".removesuffix(": "), advice))
    return found


if __name__ == "__main__":
    print(json.dumps(findings_of(*sys.argv[1:])), flush=True)
