"""Memory counted from shapes: against a real step, real parameter counts and a formula."""

import pytest
import torch

from hardpatch.config.recipes import recipe
from hardpatch.config.values import with_fields
from hardpatch.cost.memory import step_memory
from hardpatch.method.student import Teacher
from hardpatch.runs.build import blocks, build_method, build_student, recompute_blocks
from tiny import tiny_config

DEEP = {"encoder_depth": 3, "decoder_depth": 2, "predictor_depth": 2}


def really_kept(config, views, *, bf16):
    """Bytes of what autograd keeps in a step of real tensors, parameters apart."""
    student = build_student(config)
    for block in blocks(student):
        block.attn.fused_attn = True
    if config.run.activation_checkpointing:
        recompute_blocks(student)
    parameters = {p.untyped_storage().data_ptr() for p in student.parameters()}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    images = torch.randn(views // config.method.masks_per_image, 3, 32, 32)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        method = build_method(config, student)
        _losses = method.step(student, Teacher(student), images, torch.rand(views, 16), num_hard=2)
    return sum(kept.values())


@pytest.mark.parametrize("changes", [
    {},
    {"activation_checkpointing": True, "predictor_view": "both"},
    {"decoder": "cross", "masks_per_image": 2, "decoded_share": 0.5, "activation_checkpointing": True},
])  # fmt: skip
@pytest.mark.parametrize("bf16", [False, True])
def test_what_is_kept_is_what_a_real_step_keeps(changes, bf16):
    config = tiny_config(**DEEP, **changes)
    memory = step_memory(config, bf16=bf16)
    assert memory.views == 8
    expected = memory.weight_copies + 8 * memory.activations_per_view
    assert expected == pytest.approx(really_kept(config, 8, bf16=bf16), rel=0.005)


def test_parameters_are_counted_and_divided():
    config = tiny_config(sharding="full", batch_size=16)
    alone, shared = step_memory(config), step_memory(config, processes=4)
    student = build_student(config)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert (alone.gradients, alone.moments) == (4 * trained, 8 * trained)
    assert alone.parameters == alone.teacher == sum(t.nbytes for t in student.state_dict().values())
    assert (shared.parameters, shared.moments) == (alone.parameters // 4, alone.moments // 4)
    assert (alone.views, shared.views) == (16, 4)
    assert alone.gathered == 0 < shared.gathered
    accumulating = step_memory(with_fields(config, {"micro_batch_size": 2}), processes=4)
    assert (accumulating.gradients, accumulating.views) == (alone.gradients, 2), "exchanged after the last micro-batch"


def test_bytes_that_a_block_keeps_per_token_and_channel():
    """bf16: two float32 residuals (8), inputs of the linear layers (2 + 2 + 2 + 8), query, key, value (6), GELU (8)."""
    config = recipe("hpm")
    memory, of_a_block = step_memory(config), 8 + 28
    assert memory.gradients == 4 * 137_269_760, "85.6 M of ViT-B/16 without its fixed positions, and two decoders"
    formula = of_a_block * (12 * 50 * 768 + 16 * 197 * 512)
    assert formula == pytest.approx(memory.activations_per_view, rel=0.05)
    recomputed = step_memory(with_fields(config, {"activation_checkpointing": True}))
    inputs = 4 * (12 * 50 * 768 + 16 * 197 * 512)
    assert inputs < recomputed.activations_per_view < 2 * inputs
    assert recomputed.recomputed_per_view == pytest.approx(of_a_block * 197 * 512, rel=0.05)  # a decoder's
