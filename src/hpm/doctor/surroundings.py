"""What the machine gives a run: processors, memory, limits, settings, disk. Needs no torch."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from hpm.doctor.findings import Finding

GIB = 2**30
LITTLE_MEMORY = 4 * GIB
LITTLE_SHARED_MEMORY = GIB
"""Batches go from data processes to training through /dev/shm; containers have 64 MiB by default."""
FEW_FILES = 4096
LITTLE_DISK = 10 * GIB
"""A checkpoint of ViT-B holds student, teacher and optimizer: 2.2 GB, and three are kept at a time at most."""
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


def look_at_processors(environment: Mapping[str, str]) -> Finding:
    """How many this process may use, beside what the machine has and what was set."""
    machine = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    quota = processor_quota()
    usable = min(allowed, machine, quota or machine)
    found = f"{usable:g} of {machine} cores" if usable < machine else f"{machine} cores"
    threads = environment.get("OMP_NUM_THREADS")
    if quota and quota < allowed:
        return Finding(
            "processors", "warning", f"{found} by the container's quota; libraries start {allowed} threads anyway",
            f"set OMP_NUM_THREADS={max(1, int(quota))} and give --workers {max(0, int(quota) - 1)}",
        )  # fmt: skip
    if threads == "1" and usable > 2 and "LOCAL_WORLD_SIZE" not in environment:
        return Finding(
            "processors",
            "note",
            f"{found}, OMP_NUM_THREADS=1",
            "on a CPU training takes one core; unset it to take all",
        )
    if usable <= 2:
        return Finding(
            "processors", "note", found, "fine to train on a CPU; a GPU wants 4 to 8 cores to be fed with images"
        )
    return Finding("processors", "ok", found)


def processor_quota() -> float | None:
    """Cores that the control group grants; None: as many as there are."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else float(quota) / float(period)
    except (OSError, ValueError):
        return None


def look_at_memory(free: int) -> Finding:
    """Main memory that is free."""
    found = f"{free / GIB:.1f} GiB free"
    if free < LITTLE_MEMORY:
        return Finding("memory", "warning", found, "close other programs, or give --workers 0 and --cache none")
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
            "data processes die of a bus error when it is full: start the container with --shm-size 8g, "
            "or give --workers 0",
        )  # fmt: skip
    return Finding("shared memory", "ok", found)


def look_at_open_files() -> Finding:
    """How many files may be open at once."""
    try:
        import resource

        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except (ImportError, ValueError):
        return Finding("open files", "ok", "not limited as on Unix")
    if 0 < allowed < FEW_FILES:
        return Finding(
            "open files", "note", f"at most {allowed:,}", f"ulimit -n {FEW_FILES} before you start many data processes"
        )
    return Finding("open files", "ok", f"up to {allowed:,}")


def look_at_settings(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Environment variables that change what a run does or costs."""
    left_over = {name: why for name, why in SETTINGS.items() if environment.get(name, "0") not in ("", "0")}
    for name, why in left_over.items():
        yield Finding("settings", "warning", f"{name}={environment[name]} {why}", f"unset {name}")
    if not left_over:
        told = [
            f"{name}={environment[name]}" for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS") if name in environment
        ]
        yield Finding("settings", "ok", ", ".join(told) or "none that changes a run")


def look_at_folder(out: str) -> Finding:
    """Can runs be written there, how fast, and is there room? Leaves nothing behind."""
    wanted = Path(out).expanduser()
    folder = next(path for path in (wanted, *wanted.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".hpm-doctor-", dir=folder) as scratch:
            seconds = _write(Path(scratch))
    except OSError as error:
        return Finding(
            "disk",
            "problem",
            f"{str(folder)!r} cannot be written to: {error.strerror}",
            "name another folder with --out",
        )
    free, rate = shutil.disk_usage(folder).free, TRIAL_BYTES / seconds
    found = f"{free / GIB:,.0f} GiB free in {str(folder)!r}, {rate / 1e6:,.0f} MB/s"
    if free < LITTLE_DISK:
        return Finding("disk", "warning", found, "make room: checkpoints of ViT-B take 2.2 GB each, of ViT-L 5.7 GB")
    if rate < SLOW_DISK:
        return Finding("disk", "warning", found, "slow: save less often (--checkpoint-steps), or write to a local disk")
    return Finding("disk", "ok", found)


def _write(folder: Path) -> float:
    """Seconds to write and rename a file as checkpoints are."""
    start = time.perf_counter()
    with (folder / "part").open("wb") as file:
        file.write(bytes(TRIAL_BYTES))
        file.flush()
        os.fsync(file.fileno())
    (folder / "part").replace(folder / "whole")
    return time.perf_counter() - start
