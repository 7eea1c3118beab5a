"""The steps of a run on a GPU that is not there: tensors without content that only say which device they lie on.

What differs from a CPU shows without one: which operations autocast runs in which precision there, tensors left on the
host, values that the host would have to wait for. Kernels, compilation and backward passes it does not show:
``benchmarks/cuda_agreement.py`` does, on a GPU.
"""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hardpatch.config.config import Config
from hardpatch.config.recipes import METHODS
from hardpatch.config.values import with_fields
from hardpatch.evaluate.features import pool
from hardpatch.method.student import Teacher
from hardpatch.method.targets.target import FittedTarget
from hardpatch.method.vit import class_attention, encode, whole_patches
from hardpatch.runs.build import (
    build_method,
    build_normalise,
    build_optimizer,
    build_student,
    build_target,
    choose_attention,
)
from hardpatch.training.gate import MiningGate
from tiny import TINY

CUDA = torch.device("cuda", 0)
PRECISIONS = pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])


class Transfers(TorchDispatchMode):
    """Notes whatever takes tensors of two devices, or makes one there out of one here: single numbers of the host,
    which go along with a kernel's arguments, apart."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, out))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and (leaf.ndim or leaf.device == CUDA)]
        if len({tensor.device for tensor in tensors}) > 1:
            self.seen.append(str(function))
        return out


class Pretended:
    """A place where tensors lie on a GPU that is not there."""

    def __init__(self):
        self.mode = FakeTensorMode()

    def move(self, module: nn.Module) -> None:
        frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
        state = {name: (tensor.shape, tensor.dtype) for name, tensor in module.state_dict().items()}
        module.to("meta")
        with self.mode:
            there = {name: torch.empty(shape, dtype=dtype, device=CUDA) for name, (shape, dtype) in state.items()}
            module.load_state_dict(there, assign=True)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name not in frozen)

    def images(self, count: int = 4) -> torch.Tensor:
        with self.mode:
            return torch.empty(count, 3, 32, 32, device=CUDA)

    def noise(self, count: int = 4) -> torch.Tensor:
        with self.mode:
            return torch.empty(count, 16, device=CUDA)


@pytest.fixture
def pretended(monkeypatch):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    return Pretended()


def built(config, pretended):
    """Student, teacher and method of a run, there."""
    target = build_target(config)
    if isinstance(target, FittedTarget):
        target.adopt({name: torch.zeros_like(tensor) for name, tensor in target.fitted_state().items()})
    student = build_student(config, target_dim=target.dim)
    choose_attention(student, CUDA, bf16=True)
    teacher = Teacher(student)
    for module in (student, teacher, target):
        if isinstance(module, nn.Module):
            pretended.move(module)
    return student, teacher, build_method(config, student, target)


def on_cuda(config):
    return with_fields(config, {"precision": "auto", "device": "cuda"})


def check_step(config, pretended, *, bf16):
    student, teacher, method = built(config, pretended)
    images, noise = pretended.images(), pretended.noise(4 * config.method.masks_per_image)
    with pretended.mode, Transfers() as transfers, torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        assert torch.is_autocast_enabled("cuda") == bf16
        losses = method.step(student, teacher if method.needs_teacher else None, images, noise, num_hard=2)
    assert transfers.seen == []
    assert {(loss.device, loss.dtype, loss.shape) for loss in losses} == {(CUDA, torch.float32, ())}
    return student, teacher


@pytest.mark.parametrize("name", METHODS)
@PRECISIONS
def test_a_step_of_every_method(name, bf16, pretended):
    if name == "beit-tokens":
        pytest.skip("its target is fitted to images: test_a_step_on_every_target")
    fields = METHODS[name].fields | {key: TINY[key] for key in TINY if key.endswith(("_depth", "_width", "_heads"))}
    config = on_cuda(with_fields(Config(), TINY | fields))
    check_step(config, pretended, bf16=bf16)


@pytest.mark.parametrize("target", ["pixels", "norm_pix", "hog", "ema_features", "tokens"])
@PRECISIONS
def test_a_step_on_every_target(target, bf16, pretended):
    fields = {"target": target, "predictor_view": "both"}
    check_step(on_cuda(with_fields(Config(), TINY | fields)), pretended, bf16=bf16)


@PRECISIONS
def test_no_data_weights_and_the_gate(bf16, pretended):
    """Pixels without data, the weights of a micro-batch, and a gate: nothing goes to the host."""
    config = on_cuda(with_fields(Config(), TINY | {"predictor_view": "both"}))
    student, teacher, method = built(config, pretended)
    normalise = build_normalise(config)
    pretended.move(normalise)
    noise = pretended.noise()
    with pretended.mode:
        pixels = torch.empty(4, 3, 32, 32, dtype=torch.uint8, device=CUDA)
        valid = torch.empty(4, 32, 32, dtype=torch.bool, device=CUDA)
        gate = MiningGate(0.3, CUDA)
    with pretended.mode, Transfers() as transfers, torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        whole = whole_patches(valid, (32, 32), (8, 8))
        batch = method.mask(student, teacher, normalise(pixels), noise, num_hard=gate.admit(2), valid=whole)
        counts = method.num_counted(batch)
        losses = method.learn(student, batch, counts / counts.clamp(min=1))
        gate.update(losses.rank_correlation)
    assert transfers.seen == []
    assert losses.total.device == gate.correlation.device == CUDA


def test_clipping_optimizer_and_average(pretended):
    config = on_cuda(with_fields(Config(), TINY))
    student, teacher, _ = built(config, pretended)
    optimizer = build_optimizer(config.optimisation, student)
    parameters = [p for p in student.parameters() if p.requires_grad]
    with pretended.mode, Transfers() as transfers:
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        norm = nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        teacher.update(student, 0.99)
    assert transfers.seen == []
    assert norm.device == CUDA
    assert {value.device for state in optimizer.state.values() for value in state.values()} == {CUDA}


@PRECISIONS
@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_features_and_attention(pooling, bf16, pretended):
    vit = build_student(with_fields(Config(), TINY)).encoder
    pretended.move(vit)
    images = pretended.images()
    with pretended.mode, torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        features = pool(encode(vit, images), vit, pooling)
        attention = class_attention(vit, images)
    assert (features.device, features.shape, attention.shape) == (CUDA, (4, 32), (4, 16))


def test_a_tensor_left_on_the_host_is_found(pretended):
    """What the tests here are for: a table that does not move with the model, a value that is read."""
    config = on_cuda(with_fields(Config(), TINY))
    student, teacher, method = built(config, pretended)
    images, noise = pretended.images(), pretended.noise()
    stray = copy.copy(student)
    with pretended.mode:
        stray.positions = nn.Buffer(torch.empty(1, 16, 32))
    with pytest.raises(RuntimeError, match="device"), pretended.mode:
        method.step(stray, teacher, images, noise, num_hard=2)
    with pretended.mode:
        index, numbers = torch.empty(2, dtype=torch.long), torch.empty(4, 3, 32, 32)
    for move in (
        lambda: images.to("cpu"), lambda: images[index], lambda: torch._foreach_copy_([images], [numbers]),
        lambda: numbers.to(CUDA),
    ):  # fmt: skip
        with pretended.mode, Transfers() as transfers:
            move()
        assert transfers.seen
    with pytest.raises(DataDependentOutputException), pretended.mode:
        noise.sum().item()
