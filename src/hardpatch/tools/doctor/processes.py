"""Under torchrun: do the processes find each other, have they the same versions, how fast do they exchange?"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from datetime import timedelta
from importlib.metadata import version

import torch
import torch.distributed as dist

from hardpatch.config.commands import DoctorConfig
from hardpatch.runs.folder import versions
from hardpatch.runtime import distributed
from hardpatch.tools.doctor import Finding

EXCHANGED = 64 * 2**20
"""Bytes."""
ROUNDS = 3
SLOW = 1e9
TRIALS_OF_THE_FIRST = 4
"""One process of a machine tries more than the others, which wait for it: disk, data processes, images."""


def look_at_processes(config: DoctorConfig, findings: list[Finding]) -> Iterator[Finding]:
    """What the others of a group have seen that is not well, and how the group works; the same on every process.

    Args:
        config: Device, and how long to wait for the others.
        findings: What this process has seen by itself.
    """
    device = distributed.choose_device(config.device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=TRIALS_OF_THE_FIRST * config.seconds))
    except (RuntimeError, ValueError) as error:
        yield Finding(
            "processes", "problem", f"process {os.environ['RANK']} did not find the others: {_first_line(error)}",
            "have all been started, can each reach MASTER_ADDR:MASTER_PORT, and has none found a problem of its own?",
        )  # fmt: skip
        return
    try:
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if device.type == "cuda" else "none"
        about = {"Python": platform.python_version(), "torchvision": version("torchvision"), "NCCL": nccl}
        everyone = distributed.gather_objects(({**about, **versions(device)}, findings))
        for rank, (_, theirs) in enumerate(everyone):
            for finding in theirs:
                if rank and finding.state in ("warning", "problem"):
                    yield finding._replace(about=f"{finding.about}, process {rank}")
        yield from compare([about for about, _ in everyone])
        yield _time_exchange(device)
    except RuntimeError as error:
        advice = "NCCL_DEBUG=INFO says more; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the network to take"
        yield Finding("exchange", "problem", _first_line(error), advice)
    finally:
        dist.destroy_process_group()


def compare(everyone: list[dict[str, str]]) -> Iterator[Finding]:
    """Are all alike? Devices may differ, versions must not.

    Args:
        everyone: Versions and device of each process.
    """
    different = sorted({name for about in everyone for name in about if about[name] != everyone[0][name]})
    same = ", ".join(f"{name} {value}" for name, value in everyone[0].items() if name not in different)
    told = []
    for name in different:
        values = [about[name] for about in everyone]
        kinds = [f"{v} on {values.count(v)} (process {values.index(v)} first)" for v in dict.fromkeys(values)]
        told.append(f"{name}: {', '.join(kinds)}")
    not_alike = f"not alike: {'; '.join(told)}"
    if set(different) - {"device"}:
        yield Finding("processes", "problem", not_alike, "install the same versions on every machine")
    elif different:
        yield Finding("processes", "warning", not_alike, "every step waits for the slowest")
    else:
        yield Finding("processes", "ok", f"{len(everyone)}, all with {same}")


def _time_exchange(device: torch.device) -> Finding:
    place = device if device.type == "cuda" else torch.device("cpu")
    tensor = torch.ones(EXCHANGED // 4, device=place)
    seconds = []
    for _ in range(ROUNDS + 1):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        distributed.synchronise(place)
        seconds.append(time.perf_counter() - start)
        tensor /= distributed.world_size()
    rate = EXCHANGED / min(seconds[1:])
    found = f"{EXCHANGED / 2**20:.0f} MiB summed over {distributed.world_size()} processes at {rate / 1e9:.2f} GB/s"
    if not bool((tensor == 1).all()):
        return Finding("exchange", "problem", f"{found}, and the sum is wrong", "NCCL_DEBUG=INFO says more")
    if device.type == "cuda" and rate < SLOW:
        advice = "GPUs of one machine reach 10 and more, a fast network 5: NCCL_DEBUG=INFO shows which way is taken"
        return Finding("exchange", "warning", found, advice)
    return Finding("exchange", "ok", found)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
