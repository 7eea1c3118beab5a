"""One model in several processes: a copy in each, whose gradients are averaged (DDP), or a share in each (FSDP)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from hardpatch.runtime import distributed

_BUFFERS = next(  # older versions of torch know the second name alone
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


def parallel(model: nn.Module, device: torch.device) -> Any:
    """The model as a step calls it: itself, or DDP around it where there are several processes and no shards.

    Buffers stay what each process makes of them: positions never change, and running means of batch norm are those of
    a process's own share until somebody gives all of them the main process's.
    """
    if distributed.world_size() == 1 or isinstance(model, FSDPModule):
        return model
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # Not static_graph: it learns the graph from its first backward pass, which must exchange (torch 2.14 stops with an
    # internal assertion otherwise), and accumulation begins with one that does not. The search for unused parameters,
    # which it would save, is off anyway.
    options: dict[str, Any] = {_BUFFERS: False}
    return DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True, **options
    )


@contextmanager
def exchanging(model: Any, *, last: bool) -> Iterator[None]:
    """Exchange gradients between processes only with the last micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(last)
        model.set_requires_gradient_sync(last)
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield
