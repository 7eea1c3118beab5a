"""Processes: one, or many under ``torchrun``, by the same code. There is always a process group, of size one too."""

from __future__ import annotations

import gc
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from importlib.metadata import version
from itertools import count
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from hardpatch.runtime.errors import InputError, Interrupted
from hardpatch.runtime.log import warn
from hardpatch.runtime.waiting import SAID_AFTER, Watch, wait_limit, what_is_kept

Item = TypeVar("Item")

_TIMEOUT = timedelta(days=7)
"""Of an exchange: whom to wait for, and how long, is for :mod:`hardpatch.runtime.waiting` to say."""
_watches: list[Watch] = []
_groups = count()


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the group that ``torchrun`` describes, or form one of size one; leave it at the end.

    Small messages between processes (a signal arrived, an accuracy) always go over gloo and the CPU, so that they
    never make the host wait for the device.
    """
    if dist.is_initialized():
        yield
        return
    if "RANK" not in os.environ:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            dist.destroy_process_group()
        return
    store, number, size = _meet()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=_TIMEOUT)
    if size > 1:
        _watches.append(Watch(number, size, next(_groups)))
    try:
        require_same({name: version(name) for name in ("hardpatch", "torch", "timm")})
        yield
    except RuntimeError as error:
        if size == 1 or not _is_lost(error):
            raise
        text = f"another process has gone, or cannot be reached ({str(error).splitlines()[0]}); {what_is_kept()}"
        if not is_main():  # whose last word is said on standard output
            warn(f"rank {number}: {text}")
        raise Interrupted(text) from error
    finally:
        while _watches:
            _watches.pop().leave()
        dist.destroy_process_group()


def _meet() -> tuple[Any, int, int]:
    """The store of the group, the number of this process and that of all.

    Raises:
        Interrupted: They have not all come within the limit.
    """
    limit, place = wait_limit(), f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    since = f"{datetime.now():%H:%M:%S}"
    told = threading.Timer(SAID_AFTER, lambda: warn(f"waiting for the other processes at {place} since {since}"))
    told.daemon = True
    told.start()
    try:
        met: tuple[Any, int, int] = next(dist.rendezvous("env://", timeout=limit))  # type: ignore[attr-defined]
        return met
    except dist.DistError as error:
        raise Interrupted(
            f"not all {os.environ.get('WORLD_SIZE')} processes have come to {place} since {since}: {error}"
        ) from error
    finally:
        told.cancel()


def _is_lost(error: RuntimeError) -> bool:
    """Did an exchange fail because another process has ended or cannot be reached?"""
    signs = (
        "Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "timed out",
        "remote process exited",
    )  # fmt: skip
    return any(sign in str(error) for sign in signs)


def arrived() -> None:
    """This process has come to an exchange with the others; for those that do not go through this module."""
    if _watches:
        _watches[-1].arrived()


def require_same(about: Mapping[str, object]) -> None:
    """Refuse to begin where the processes do not see the same; every process has to ask.

    Args:
        about: What has to be the same, by what it is to be called.

    Raises:
        InputError: Names a process and what it has; on every process.
    """
    (main_host, ours), *others = gather_objects((socket.gethostname(), {k: str(v) for k, v in about.items()}))
    for number, (host, theirs) in enumerate(others, 1):
        different = [
            f"{name}: {ours.get(name, 'nothing')} on rank 0 ({main_host}), "
            f"{theirs.get(name, 'nothing')} on rank {number} ({host})"
            for name in {**ours, **theirs}
            if ours.get(name) != theirs.get(name)
        ]
        if different:
            raise InputError(
                "processes: do not see the same, so they cannot work on it together:\n  " + "\n  ".join(different)
            )


def rank() -> int:
    """Number of this process, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Is this the process that writes files and talks to the user?"""
    return rank() == 0


def is_main_of_environment() -> bool:
    """Is this the main process, judged by ``torchrun``'s variables alone (before and after the group exists)?"""
    return os.environ.get("RANK", "0") == "0"


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        arrived()
        dist.barrier()


def any_process(flag: bool) -> bool:
    """True on every process if ``flag`` is true on one."""
    if world_size() == 1:
        return flag
    arrived()
    message = torch.tensor(int(flag))
    dist.all_reduce(message, op=dist.ReduceOp.MAX)
    return bool(message.item())


def gather_objects(item: Any) -> list[Any]:
    """What every process holds, in the order of ranks, on every process."""
    if world_size() == 1:
        return [item]
    arrived()
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, item)
    return gathered


def from_main(make: Callable[[], Item]) -> Item:
    """What ``make`` returns on the main process, on every process; an :class:`InputError` is raised on every one."""
    made: list[Any] = [None]
    if is_main():
        try:
            made = [make()]
        except InputError as error:
            made = [error]
    if world_size() > 1:
        arrived()
        dist.broadcast_object_list(made, src=0, device=torch.device("cpu"))
    if isinstance(made[0], InputError):
        raise made[0]
    item: Item = made[0]
    return item


def on_every(make: Callable[[], Item]) -> Item:
    """What ``make`` returns on each process; an :class:`InputError` of one is raised on every one, and names it."""
    made, problem = None, None
    try:
        made = make()
    except InputError as error:
        problem = error
    told = gather_objects(problem and (str(problem), socket.gethostname()))
    failed = [number for number, found in enumerate(told) if found is not None]
    if problem is not None and len(failed) == len(told):
        raise problem
    if failed:
        text, host = told[failed[0]]
        raise InputError(
            f"{text}\n(on rank {failed[0]}, {host}; {len(told) - len(failed)} other process(es) had no such problem)"
        )
    item: Item = made  # type: ignore[assignment]
    return item


def mean_over_processes(values: dict[str, float]) -> dict[str, float]:
    """The mean of each value over all processes."""
    if world_size() == 1:
        return values
    message = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(message)
    return dict(zip(values, (message / world_size()).tolist()))


def mean_of_tensor(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all processes, on its own device and without waiting for it."""
    if world_size() > 1:
        dist.all_reduce(value)
        value /= world_size()
    return value


def broadcast_from_main(value: torch.Tensor) -> None:
    """Give a tensor, in place, the main process's values on every process."""
    if world_size() > 1:
        dist.broadcast(value, src=0)


def choose_device(name: Literal["auto", "cpu", "cuda", "mps"]) -> torch.device:
    """The device of this process.

    Raises:
        InputError: The device asked for is not there.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if (name == "cuda" and not cuda) or (name == "mps" and not mps):
        raise InputError(f"device: {name!r} is not available here; choose auto or cpu")
    if name == "cuda" or (name == "auto" and cuda):
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        wanted, there = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if wanted > there:
            raise InputError(f"device: {wanted} processes on this machine need {wanted} GPUs; there are {there}")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if name == "mps" or (name == "auto" and mps):
        return torch.device("mps")
    return torch.device("cpu")


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def release_memory(device: torch.device) -> None:
    """Give back what models that are gone have held, so that others see it as free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_bf16(precision: str, device: torch.device) -> bool:
    """Does a run with this ``precision`` (auto, bf16, float32) compute under bf16 autocast there?"""
    return precision == "bf16" or (precision == "auto" and has_bf16(device))


def warn_of_emulated_bf16(precision: str, device: torch.device) -> None:
    """Tell the user, once and from the main process, that the bf16 that was asked for makes the run slower."""
    if precision == "bf16" and device.type in ("cpu", "cuda") and not has_bf16(device) and is_main():
        what = "processor" if device.type == "cpu" else "GPU"
        warn(
            f"precision: this {what} has no bf16 and emulates it, which is many times slower than float32 and saves "
            "nothing here; --precision auto (default) takes float32"
        )


def is_compiled(compile: str, device: torch.device) -> bool:
    """Does a run with this ``compile`` (auto, on, off) compile its blocks there?"""
    return compile == "on" or (compile == "auto" and device.type == "cuda")


def has_bf16(device: torch.device) -> bool:
    """Does the hardware compute in bf16, rather than emulate it?"""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False
