"""Activation checkpointing: the same numbers from less memory, with compiled blocks and with dropout too."""

import pytest
import torch
from torch._dynamo.utils import counters

from hardpatch.method.student import Teacher
from hardpatch.runs.build import blocks, build_method, compile_blocks, recompute_blocks
from tiny import TINY, assert_same_state, final_state, pretrain, tiny_config, tiny_student

DEEP = {"encoder_depth": 3, "decoder_depth": 2, "predictor_depth": 2, "predictor_view": "both"}


def step_of(student, **changes):
    """Total loss and gradients of one step on random images."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    noise = torch.rand(4, 16, generator=generator)
    method = build_method(tiny_config(**DEEP, **changes), student)
    torch.manual_seed(2)  # of dropout
    total = method.step(student, Teacher(student), images, noise, num_hard=3).total
    total.backward()
    return total.detach(), {name: p.grad for name, p in student.named_parameters() if p.requires_grad}


def assert_same_step(one, other):
    assert torch.equal(one[0], other[0])
    for name, gradient in one[1].items():
        assert torch.equal(gradient, other[1][name]), name


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_recomputed_blocks_draw_the_same_dropout(decoder):
    students = [tiny_student(decoder=decoder, **DEEP).train() for _ in range(2)]
    for student in students:
        for block in blocks(student):
            block.mlp.drop1.p = 0.3
    recompute_blocks(students[1])
    plain, recomputed = (step_of(student, decoder=decoder) for student in students)
    assert_same_step(plain, recomputed)
    assert not torch.equal(step_of(tiny_student(decoder=decoder, **DEEP), decoder=decoder)[0], plain[0]), "it drops"


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_only_the_inputs_of_blocks_are_kept(decoder):
    kept = []
    for recompute in (False, True):
        student = tiny_student(decoder=decoder, **DEEP)
        if recompute:
            recompute_blocks(student)
        weights = {p.untyped_storage().data_ptr() for p in student.parameters()}
        sizes = {}

        def pack(tensor, weights=weights, sizes=sizes):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step_of(student, decoder=decoder)
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.35 * kept[0]


@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_recomputed_blocks_compile_once_and_give_the_same_numbers():
    results = []
    for recompute in (False, True):
        torch._dynamo.reset()
        counters.clear()
        student = tiny_student(**DEEP).train()
        compile_blocks(student, backend="aot_eager")
        if recompute:
            recompute_blocks(student)
        step_of(student)
        compiled = counters["stats"]["unique_graphs"]
        student.zero_grad()
        results.append((*step_of(student), compiled, counters["stats"]["unique_graphs"]))
    plain, recomputed = results
    assert_same_step(plain, recomputed)
    assert recomputed[2] == recomputed[3] > 0, "nothing is compiled in the second step"
    assert recomputed[2] == plain[2], "nor for the sake of recomputation"


def test_a_run_is_the_same_bit_for_bit(tmp_path):
    for name, recompute in (("plain", False), ("recomputed", True)):
        values = TINY | DEEP | {"epochs": 1, "checkpoint_steps": 6, "activation_checkpointing": recompute}
        pretrain(values.pop("data"), tmp_path / name, **values)
    assert_same_state(final_state(tmp_path / "plain"), final_state(tmp_path / "recomputed"))
