"""What this process may use of the machine: processors and memory, as the system, a container or a job's control group
(versions 1 and 2, Docker, SLURM, systemd) allows."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Cores that this process may use, at least 1: those it may run on, and no more than its quota rounded up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = processor_quota()
    return max(1, allowed if quota is None else min(allowed, math.ceil(quota)))


def processor_quota() -> float | None:
    """Cores that control groups grant; None: as many as there are."""
    quotas = []
    for folder in _own_groups("cpu"):
        quota, period = [*_read(folder / "cpu.max").split(), "", ""][:2]  # "max 100000" or "400000 100000"
        if not quota:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def free_memory() -> int:
    """Bytes that can still be taken: of the machine, or of the control group that allows less."""
    found = []
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            found.append(1024 * int(line.split()[1]))
    for folder in _own_groups("memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            found.append(int(limit) - int(used) + _cached_files(folder))
    return max(0, min(found)) if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _cached_files(folder: Path) -> int:
    """Bytes that a group uses for files it has read, which it gives back when they are needed."""
    counted = {}
    for line in _read(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        counted[name] = value
    kinds = ("total_inactive_file", "total_active_file")
    if kinds[0] not in counted:  # version 2, whose figures include the groups inside
        kinds = ("inactive_file", "active_file")
    return sum(int(counted[kind]) for kind in kinds if counted.get(kind, "").isdigit())


def _own_groups(controller: str) -> Iterator[Path]:
    """This process's control group and those around it, as far as they can be seen: a limit of any of them holds."""
    for line in _read(OWN_GROUPS).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        base = next((folder for folder in (GROUPS / controllers, GROUPS / controller) if folder.is_dir()), GROUPS)
        base = base if controllers else GROUPS
        folder = base / path.lstrip("/")
        while folder != base and base in folder.parents:
            yield folder
            folder = folder.parent
        yield base


def _read(file: Path) -> str:
    """What stands in a file; nothing where it is not there or must not be read."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
