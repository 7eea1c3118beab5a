"""One student cut over many processes, each of which holds a share of every tensor (fully sharded).

A sharded student computes what a whole one does, to the order of sums. Before a transformer block runs, the processes
gather its parameters; afterwards each keeps its share alone. Parameters are gathered in float32 and autocast rounds
them where they are used, as it does in one process: a bf16 policy of ``fully_shard`` would round the weights of layer
norms, tokens and position tables, too, and change what is learnt.

Nothing outside sees shards: a checkpoint holds whole tensors, and what looks at the model gets a whole one.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from hardpatch.method.student import Student, Teacher
from hardpatch.runs.build import blocks
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import InputError

Tree = TypeVar("Tree")


def check_sharding(*, processes: int) -> None:
    """Can a model be sharded?

    Raises:
        InputError: There is only one process.
    """
    if processes == 1:
        raise InputError(
            "sharding: 'full' cuts the model over processes and needs at least 2 of them "
            "(torchrun --nproc-per-node 2 -m hardpatch pretrain ...), got 1; leave it at 'none', the result is the same"
        )


def shard(student: Student, teacher: Teacher | None, device: torch.device) -> None:
    """Cut student and teacher over all processes, in place; each keeps its share on ``device``.

    Both were built from one seed by every process, so nothing is sent. The optimizer must be made afterwards.
    """
    # Parts of a reshape: FSDP warns of views in general, and nothing changes these in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    # Class attention looks into the teacher's last block from outside: that block is gathered with the root.
    for block in blocks(student):
        fully_shard(block, mesh=mesh)
    fully_shard(student, mesh=mesh)
    register_fsdp_forward_method(student, "scout_scores")
    if teacher is None:
        return
    for block in blocks(teacher.model):
        if block is not last_block(teacher):
            fully_shard(block, mesh=mesh)
    # Resharded at once, unlike a student, which goes on with its backward pass: nothing that was gathered may outlive
    # the EMA's change of the shares.
    fully_shard(teacher, mesh=mesh, reshard_after_forward=True)
    for method in ("encode", "score", "encode_with_attention"):
        register_fsdp_forward_method(teacher, method)


def last_block(teacher: Teacher) -> nn.Module:
    """The last block of a teacher's encoder."""
    block: nn.Module = teacher.model.encoder.blocks[-1]
    return block


def is_sharded(student: Student) -> bool:
    """Does this process hold only a share of the student?"""
    return isinstance(student, FSDPModule)


def gathered(tree: Tree) -> Tree:
    """Whole tensors for shares, everywhere inside a tree; every process has to ask."""
    whole: Tree = tree_map_only(DTensor, DTensor.full_tensor, tree)
    return whole


def gathered_on_main(tree: Tree) -> Tree:
    """As :func:`gathered`, on the CPU of the main process alone; the others get empty tensors."""

    def whole(share: DTensor) -> Tensor:
        tensor = share.full_tensor()
        return tensor.cpu() if distributed.is_main() else tensor.new_empty(0)

    gathered_there: Tree = tree_map_only(DTensor, whole, tree)
    return gathered_there


def shares_of(saved: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this process holds of a model's whole tensors, sharded as those of ``like`` are; nothing is sent."""
    return {name: _share(tensor, like.get(name)) for name, tensor in saved.items()}


def shares_of_optimizer(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """As :func:`shares_of`, for an optimizer's state: each moment as its parameter is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {name: _share(value, parameters[number]) for name, value in values.items()}
        for number, values in saved["state"].items()
    }
    return {**saved, "state": state}


def _share(tensor: Tensor, like: Tensor | None) -> Tensor:
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
