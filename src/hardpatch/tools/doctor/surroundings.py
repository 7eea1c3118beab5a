"""Packages and machine: versions, processors, memory, settings, disk. Nothing here imports torch."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from hardpatch.runtime.extras import install
from hardpatch.runtime.machine import processor_quota, usable_cores
from hardpatch.tools.doctor import Finding

EXTRAS = {
    "datasets": "hf: sources",
    "http": "https:// sources",
    "s3": "s3:// sources",
    "dicom": "DICOM images",
    "dense": "hardpatch evaluate segment and detect",
    "hf": "hardpatch export --format hf",
    "onnx": "hardpatch export --format onnx",
}
"""What each set of optional packages is for."""

GIB = 2**30
LITTLE_MEMORY = 4 * GIB
LITTLE_SHARED_MEMORY = GIB
"""Batches go from data processes to training through /dev/shm; containers have 64 MiB by default."""
LITTLE_DISK = 10 * GIB
CHECKPOINT_BYTES = {"ViT-B": 2.2e9, "ViT-L": 5.7e9}
"""Student, teacher and two moments of AdamW, float32; the three newest are kept."""
SLOW_DISK = 50e6
TRIAL_BYTES = 32 * 2**20

SETTINGS = {
    "CUDA_LAUNCH_BLOCKING": "makes every step wait for the GPU: much slower, for debugging only",
    "TORCH_COMPILE_DISABLE": "switches torch.compile off",
    "TORCHDYNAMO_DISABLE": "switches torch.compile off",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "takes and gives back GPU memory each time: slow, for debugging only",
    "NCCL_P2P_DISABLE": "makes GPUs talk through the processor",
}
"""Variables left over from debugging that cost time, and why."""
TOLD = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def look_at_software() -> Iterator[Finding]:
    """Versions, packages that are missing or do not match, and what is not installed but could be."""
    there = ", ".join(
        f"{name} {value}" for name in ("hardpatch", "torch", "torchvision", "timm") if (value := _version(name))
    )
    yield Finding("versions", "ok", f"{platform.platform()}, Python {platform.python_version()}, {there}")
    if _version("hardpatch") is None:
        yield Finding(
            "packages", "problem", "hardpatch runs from a folder without being installed: what it needs is not known",
            "pip install -c constraints.txt . in its folder",
        )  # fmt: skip
        return
    try:
        broken = [told for package in ("hardpatch", "torchvision") for told in _unmet(package, extra="")]
        absent = {extra: use for extra, use in EXTRAS.items() if any(_unmet("hardpatch", extra=extra))}
    except ImportError:
        yield Finding("packages", "problem", "packaging is not installed", "pip install packaging")
        return
    if broken:
        advice = "install what is named, or hardpatch anew into a fresh environment, by its constraints file"
        yield Finding("packages", "problem", "; ".join(broken), advice)
    else:
        yield Finding("packages", "ok", "all that hardpatch needs are there, in versions that match")
    if absent:
        uses = "; ".join(f"{use}: {install(extra)}" for extra, use in absent.items())
        yield Finding("optional packages", "note", f"not installed, or too old: {', '.join(absent)}", uses)
    else:
        yield Finding("optional packages", "ok", "all there")


def _unmet(package: str, *, extra: str) -> Iterator[str]:
    """What an installed package asks for, with or without an extra, and does not find.

    Raises:
        ImportError: packaging is missing.
    """
    from packaging.requirements import Requirement
    from packaging.version import InvalidVersion, Version

    for line in metadata.requires(package) or () if _version(package) else ():
        wanted = Requirement(line)
        named = re.findall(r"""extra\s*==\s*["']([^"']+)["']""", line)
        if (named != [extra] if extra else bool(named)) or wanted.name == package:
            continue
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
            continue
        version = _version(wanted.name)
        if version is None:
            yield f"{package} needs {wanted.name}{wanted.specifier}, which is not installed"
            continue
        try:  # of builds between two releases, as NVIDIA's containers have them, the release that they become counts
            met = wanted.specifier.contains(version, prereleases=True) or (
                Version(version).is_prerelease and wanted.specifier.contains(Version(version).base_version)
            )
        except InvalidVersion:
            continue  # somebody's own numbering: nothing can be said of it
        if not met:
            yield f"{package} needs {wanted.name}{wanted.specifier}, here is {version}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def look_at_processors(environment: Mapping[str, str]) -> Finding:
    """How many this process may use, beside what the machine has and what was set."""
    machine, usable, quota = os.cpu_count() or 1, usable_cores(), processor_quota()
    found = f"{usable} of {machine} cores" if usable < machine else f"{machine} cores"
    set_threads, local = environment.get("OMP_NUM_THREADS", ""), int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if quota is not None and quota < machine and not set_threads:
        return Finding(
            "processors", "warning", f"{found}, by a quota that libraries do not know: they start {machine} threads",
            f"set OMP_NUM_THREADS={max(1, usable // local)}",
        )  # fmt: skip
    if set_threads == "1" and usable > 2 and "LOCAL_WORLD_SIZE" not in environment:
        advice = "on a CPU training takes one core then; unset it to take all"
        return Finding("processors", "note", f"{found}, OMP_NUM_THREADS=1", advice)
    if usable <= 2:
        advice = "enough to train on a CPU; a GPU wants 4 to 8 cores to be fed with images"
        return Finding("processors", "note", found, advice)
    return Finding("processors", "ok", found)


def look_at_memory(free: int) -> Finding:
    """Main memory that is free."""
    found = f"{free / GIB:.1f} GiB free"
    if free < LITTLE_MEMORY:
        return Finding(
            "memory", "warning", found, "ask for more, close other programs, or give --workers 0 --cache none"
        )
    return Finding("memory", "ok", found)


def look_at_shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Room for batches on their way from the data processes."""
    if not folder.is_dir():
        return Finding("shared memory", "ok", "not by /dev/shm on this system")
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.2f} GiB free in {folder}"
    if free < LITTLE_SHARED_MEMORY:
        return Finding(
            "shared memory", "warning", found,
            "data processes die of a bus error when it is full: start the container with --shm-size 8g, or give "
            "--workers 0",
        )  # fmt: skip
    return Finding("shared memory", "ok", found)


def look_at_settings(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Environment variables that change what a run does or costs."""
    left_over = {name: why for name, why in SETTINGS.items() if environment.get(name, "") not in ("", "0")}
    for name, why in left_over.items():
        yield Finding("settings", "warning", f"{name}={environment[name]} {why}", f"unset {name}")
    if not left_over:
        told = [f"{name}={environment[name]}" for name in TOLD if name in environment]
        yield Finding("settings", "ok", ", ".join(told) or "none that changes a run")


def look_at_launch(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Several tasks of a job that do not know each other would each train alone."""
    tasks = environment.get("SLURM_NTASKS", "1")
    if tasks not in ("", "1") and "RANK" not in environment:
        yield Finding(
            "launch", "warning", f"SLURM started {tasks} tasks, and none is told its rank: each would train alone",
            "docs/scaling.md has the lines for srun; or one task per machine, with torchrun",
        )  # fmt: skip


def look_at_folder(out: str) -> Iterator[Finding]:
    """Can runs be written there, how fast, and is there room? Leaves nothing behind."""
    try:
        wanted = Path(out).expanduser().absolute()
        folder = next(path for path in (wanted, *wanted.parents) if path.exists() or path.is_symlink())
        with tempfile.TemporaryDirectory(prefix=".hardpatch-doctor-", dir=folder) as scratch:
            seconds = _write(Path(scratch))
        free = shutil.disk_usage(folder).free
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of a user that there is not
        told = error.strerror if isinstance(error, OSError) else str(error)
        yield Finding("disk", "problem", f"out: {out!r} cannot be written to: {told}", "name another folder with --out")
        return
    rate = TRIAL_BYTES / seconds
    found = f"{free / GIB:,.0f} GiB free in {str(folder)!r}, {rate / 1e6:,.0f} MB/s"
    if free < LITTLE_DISK:
        sizes = ", ".join(f"of {model} {size / 1e9:.1f} GB" for model, size in CHECKPOINT_BYTES.items())
        yield Finding("disk", "warning", found, f"make room: of checkpoints three are kept, each {sizes}")
    elif rate < SLOW_DISK:
        yield Finding("disk", "warning", found, "slow: save less often (--checkpoint-steps), or write to a local disk")
    else:
        yield Finding("disk", "ok", found)


def _write(folder: Path) -> float:
    """Seconds to write and rename a file as checkpoints are."""
    content = os.urandom(TRIAL_BYTES)  # some file systems compress
    start = time.perf_counter()
    with (folder / "part").open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    (folder / "part").replace(folder / "whole")
    return time.perf_counter() - start
