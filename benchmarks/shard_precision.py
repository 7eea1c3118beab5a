"""Which precision of shards gives the gradients of one process? By two processes, on a CPU:

    torchrun --standalone --nproc-per-node 2 benchmarks/shard_precision.py

Relative difference of the gradients of a tiny student, whose weights are moved off their start, to those of DDP under
bf16 autocast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from hardpatch.config.config import Config
from hardpatch.config.values import with_fields
from hardpatch.method.student import Student, StudentOutput
from hardpatch.runs.build import blocks, build_method, build_student
from hardpatch.runtime.parallel import parallel
from hardpatch.training.sharding import gathered

SMALL = {
    "image_size": 32, "encoder": "vit_tiny_patch16_224", "patch_size": 8, "encoder_width": 64, "encoder_depth": 3,
    "encoder_heads": 2, "decoder_width": 64, "decoder_depth": 2, "decoder_heads": 2, "predictor_depth": 2,
    "mask": "random",
}  # fmt: skip
POLICIES = {
    "shards, autocast": (MixedPrecisionPolicy(), True),
    "shards, bf16 policy": (MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32), False),
}


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    expected = gradients(parallel(student(), torch.device("cpu")), autocast=True)
    say("DDP, float32", difference(gradients(parallel(student(), torch.device("cpu")), autocast=False), expected))
    for name, (policy, autocast) in POLICIES.items():
        sharded = student()
        for module in (*blocks(sharded), sharded):
            fully_shard(module, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
        say(name, difference(gradients(sharded, autocast=autocast), expected))
    dist.destroy_process_group()


def student() -> Student:
    """With layer norms off 1, as in a run."""
    made = build_student(with_fields(Config(), SMALL))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return made


def gradients(model: Callable[..., StudentOutput], *, autocast: bool) -> dict[str, Tensor]:
    """Of one step over all processes, whole."""
    method = build_method(with_fields(Config(), SMALL), student())
    generator = torch.Generator().manual_seed(dist.get_rank())
    images = torch.randn(4, 3, 32, 32, generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total = method.step(model, None, images, torch.rand(4, 16, generator=generator), num_hard=0).total
    total.backward()
    module = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(module, Student)
    return {name: gathered(p.grad).clone() for name, p in module.named_parameters() if p.grad is not None}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """Relative to ``expected``, over all gradients together."""
    apart = sum((found[name] - expected[name]).square().sum() for name in expected)
    size = sum(gradient.square().sum() for gradient in expected.values())
    return f"{float((torch.as_tensor(apart) / torch.as_tensor(size)).sqrt()):.2%}"


def say(name: str, what: str) -> None:
    if dist.get_rank() == 0:
        print(f"{name}: {what}", flush=True)


if __name__ == "__main__":
    main()
