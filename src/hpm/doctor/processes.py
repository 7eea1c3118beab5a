"""Under torchrun: do the processes find each other, have they the same versions, how fast do they exchange?"""

from __future__ import annotations

import os
import time
from typing import Any, Literal

import torch
import torch.distributed as dist

from hpm import distributed
from hpm.doctor.findings import Finding
from hpm.run_folder import versions

EXCHANGED = 64 * 2**20
"""Bytes."""
ROUNDS = 3


def look_at_processes(name: Literal["auto", "cpu", "cuda", "mps"], findings: list[Finding]) -> list[Finding]:
    """What the others of a group have seen that is not well, and how the group works; the same on every process.

    Args:
        name: Of the device.
        findings: What this process has seen by itself.
    """
    device = distributed.choose_device(name)
    with distributed.process_group(device):
        everyone = distributed.gather_objects((versions(device), findings))
        seen = [
            finding._replace(about=f"{finding.about}, process {rank}")
            for rank, (_, theirs) in enumerate(everyone)
            for finding in theirs
            if rank and finding.state in ("warning", "problem")
        ]
        return [*seen, _compare([theirs for theirs, _ in everyone]), _time_exchange(device)]


def _compare(everyone: list[dict[str, Any]]) -> Finding:
    there = {tuple(sorted(theirs.items())) for theirs in everyone}
    if len(there) == 1:
        return Finding("processes", "ok", f"{len(everyone)}, all with {_told(everyone[0])}")
    different = "; ".join(f"process {rank}: {_told(theirs)}" for rank, theirs in enumerate(everyone))
    return Finding("processes", "problem", f"not alike: {different}", "install the same versions on every machine")


def _told(about: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in about.items())


def _time_exchange(device: torch.device) -> Finding:
    tensor = torch.ones(EXCHANGED // 4, device=device)
    seconds = []
    for _ in range(ROUNDS + 1):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        distributed.synchronise(device)
        seconds.append(time.perf_counter() - start)
        tensor /= distributed.world_size()
    right = bool((tensor == 1).all())
    rate = EXCHANGED / min(seconds[1:])
    found = f"{EXCHANGED / 2**20:.0f} MiB summed over {distributed.world_size()} processes at {rate / 1e9:.2f} GB/s"
    if not right:
        return Finding(
            "exchange", "problem", f"{found}, and the sum is wrong", "look at NCCL's settings, NCCL_DEBUG=INFO"
        )
    local = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if device.type == "cuda" and rate < 1e9:
        where = (
            "GPUs of one machine should reach 10 and more"
            if local
            else "the network is slow: is it the right interface?"
        )
        return Finding("exchange", "warning", found, f"{where}; NCCL_DEBUG=INFO shows what it takes")
    return Finding("exchange", "ok", found)
