"""What a training step needs of a device's memory, counted without a device: shapes alone, no numbers.

Counted are what stands for the whole run (parameters, gradients, moments, teacher) and what the forward pass keeps for
the backward pass. Not counted: temporary results, the allocator's gaps, the images, and what CUDA and NCCL take for
themselves. Blocks are counted without compilation; compiled ones keep no more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hardpatch.config.config import Config
from hardpatch.method.method import Method
from hardpatch.method.student import Student, Teacher
from hardpatch.runs.build import blocks, build_hpm, choose_attention, recompute_blocks

GATHERED_BLOCKS = 2
"""Blocks of which a sharded model holds all parameters at once: the one that runs, and the next."""


class StepMemory(NamedTuple):
    """Bytes that one process needs."""

    parameters: int
    """The student's, float32."""
    gradients: int
    """float32."""
    moments: int
    """AdamW's two, float32."""
    teacher: int
    """The EMA, float32."""
    target: int
    """Frozen models behind the target."""
    gathered: int
    """Whole blocks of a sharded model while they run: parameters and their gradients."""
    weight_copies: int
    """Autocast's bf16 copies of the weights, kept for the backward pass; checkpointed blocks keep none."""
    activations_per_view: int
    """Kept for the backward pass, for each view of a micro-batch."""
    recomputed_per_view: int
    """Bytes of one checkpointed block while it is computed again."""
    views: int
    """Views in a micro-batch."""

    @property
    def standing(self) -> int:
        """What is there between two steps, and the gradients."""
        return self.parameters + self.gradients + self.moments + self.teacher + self.target

    @property
    def total(self) -> int:
        """Bytes of a step."""
        return self.of(self.views)

    def of(self, views: int) -> int:
        """Bytes of a step with so many views in a micro-batch, where gradients are kept as they are here."""
        per_view = self.activations_per_view + self.recomputed_per_view
        return self.standing + self.gathered + self.weight_copies + views * per_view


def step_memory(
    config: Config, *, processes: int = 1, bf16: bool = True, device: torch.device | None = None
) -> StepMemory:
    """Count the memory of a run's step; ``sharding``, ``activation_checkpointing`` and ``micro_batch_size`` count.

    Args:
        config: Of the run.
        processes: Over which the batch, and a sharded model, are divided.
        bf16: Autocast.
        device: Where it would run; None: on CUDA. In bf16 on a CPU attention is not fused, and its
            matrices are kept.

    Raises:
        InputError: A size does not fit.
    """
    share = max(1, config.optimisation.batch_size // processes)
    views = min(share, config.run.micro_batch_size or share)
    model = build_hpm(config, counted_only=True)
    student, teacher, method, target = model.student, model.teacher, model.method, model.method.target
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad) * 4
    whole = _bytes(student)
    rest = whole - sum(_bytes(block) for block in blocks(student))
    sharded = config.run.sharding == "full" and processes > 1
    shards = processes if sharded else 1
    largest = max(_bytes(block) for block in blocks(student))
    kept = _kept(student, teacher, method, config, bf16=bf16, device=device or torch.device("cuda"))
    return StepMemory(
        parameters=whole // shards,
        gradients=trained // (shards if views == share else 1),  # shards exchange them only after the last micro-batch
        moments=2 * trained // shards,
        teacher=0 if teacher is None else whole // shards,
        target=_bytes(target) if isinstance(target, nn.Module) else 0,
        gathered=2 * (GATHERED_BLOCKS * largest + rest) if sharded else 0,
        weight_copies=kept.fixed,
        activations_per_view=kept.per_view,
        recomputed_per_view=kept.recomputed_per_view,
        views=views,
    )


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


class _Kept(NamedTuple):
    """What a forward pass keeps for the backward pass."""

    fixed: int
    per_view: int
    recomputed_per_view: int


def _kept(
    student: Student, teacher: Teacher | None, method: Method, config: Config, *, bf16: bool, device: torch.device
) -> _Kept:
    """Two passes of different size tell what is kept per view from what is kept once."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    choose_attention(student, device, bf16=bf16)
    for model in (student, teacher):
        if model is not None:
            _pretend(model, mode)
    masks = config.method.masks_per_image
    small, large = (_kept_at(student, teacher, method, config, mode, num_images=n, bf16=bf16) for n in (2, 4))
    per_view = (large.total - small.total) // (2 * masks)
    block = max(b - a for a, b in zip(small.inside_blocks, large.inside_blocks)) // (2 * masks)
    if not config.run.activation_checkpointing:
        return _Kept(small.total - 2 * masks * per_view, per_view, 0)
    recompute_blocks(student)
    small, large = (_kept_at(student, teacher, method, config, mode, num_images=n, bf16=bf16) for n in (2, 4))
    per_view = (large.total - small.total) // (2 * masks)
    return _Kept(small.total - 2 * masks * per_view, per_view, block)


def _pretend(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace a model's tensors on the meta device by ones that pretend to lie on a CPU, where autocast knows them."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    state = model.state_dict()
    with mode:
        pretended = {name: torch.empty(t.shape, dtype=t.dtype, device="cpu") for name, t in state.items()}
    model.load_state_dict(pretended, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


class _KeptAt(NamedTuple):
    total: int
    inside_blocks: list[int]


def _kept_at(
    student: Student, teacher: Teacher | None, method: Method, config: Config, mode: FakeTensorMode, *, num_images: int,
    bf16: bool,
) -> _KeptAt:  # fmt: skip
    """Bytes of all tensors that one forward pass saves, parameters apart, and how many of them inside each block."""
    parameters = {p.untyped_storage()._cdata for p in student.parameters()}
    kept: dict[int, int] = {}
    inside: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    def before(*_: object) -> None:
        inside.append(-sum(kept.values()))

    def after(*_: object) -> None:
        inside[-1] += sum(kept.values())

    hooks = [
        hook
        for block in blocks(student)
        for hook in (block.register_forward_pre_hook(before), block.register_forward_hook(after))
    ]
    with mode, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        images = torch.empty(num_images, config.data.channels, *config.data.size)
        noise = torch.empty(num_images * config.method.masks_per_image, student.positions.shape[1])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = method.step(student, teacher if method.needs_teacher else None, images, noise, num_hard=1)
    del losses  # until here nothing that was kept has been freed, so no two storages have had one address
    for hook in hooks:
        hook.remove()
    return _KeptAt(sum(kept.values()), inside)
