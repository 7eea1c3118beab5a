"""The method: losses against slow loops, the teacher, where gradients go, what the student may see."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch._subclasses.fake_tensor import FakeTensorMode

from hardpatch.config.config import Config
from hardpatch.config.values import with_fields
from hardpatch.method import masks
from hardpatch.method.choices import MASKS
from hardpatch.method.losses import absolute_loss, rank_correlation, relative_loss
from hardpatch.method.masks import hide_top, split_patches
from hardpatch.method.method import Method
from hardpatch.method.student import Student, Teacher
from hardpatch.method.targets.pixels import PixelTarget
from hardpatch.method.vit import class_attention, create_encoder, encode, grid_size, patchify, unpatchify
from hardpatch.runs.build import build_method, build_student
from hardpatch.runtime.errors import InputError
from hiding import hide
from tiny import TINY

torch.set_num_threads(1)
PATCH, SIZE, GRID, NUM_PATCHES, NUM_HIDDEN = (8, 8), (32, 24), (4, 3), 12, 8


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny_student(*, predictor_depth=1, target_dim=192):
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch16_224", image_size=SIZE, patch_size=8, width=16, depth=2, heads=2)
    return Student(
        encoder, target_dim=target_dim, decoder_dim=16, decoder_depth=1, decoder_heads=2,
        predictor_depth=predictor_depth,
    )  # fmt: skip


def tiny_method(policy=masks.hard, predicted_loss=relative_loss, weight=1.0, view="masked"):
    target = PixelTarget(PATCH, channels=3, normalise=True)
    return Method(target, policy, GRID, NUM_HIDDEN, predicted_loss, weight, predictor_view=view)


def some_images(batch=3):
    return torch.randn(batch, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def some_noise(batch=3):
    return torch.rand(batch, NUM_PATCHES, generator=torch.Generator().manual_seed(2))


def slow_relative_loss(scores, patch_loss):
    total, pairs = 0.0, 0
    for s, loss in zip(scores.tolist(), patch_loss.tolist(), strict=True):
        for i in range(len(s)):
            for j in range(len(s)):
                if loss[i] != loss[j]:
                    p, harder = 1 / (1 + math.exp(s[j] - s[i])), float(loss[i] > loss[j])
                    total -= harder * math.log(p + 1e-6) + (1 - harder) * math.log(1 - p + 1e-6)
                    pairs += 1
    return total / pairs


@pytest.mark.parametrize("spread", [0.1, 1, 20])
def test_relative_loss_equals_a_loop_over_ordered_pairs(spread):
    scores, patch_loss = spread * torch.randn(3, 7).double(), torch.rand(3, 7).double()
    patch_loss[0, :5] = patch_loss[0, 0]  # the images have different numbers of valid pairs
    expected = slow_relative_loss(scores, patch_loss)
    assert relative_loss(scores, patch_loss).item() == pytest.approx(expected, rel=1e-5)


def test_relative_loss_of_equal_losses_is_zero_with_zero_gradient():
    scores = torch.randn(2, 5, requires_grad=True)
    loss = relative_loss(scores, torch.ones(2, 5))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(scores.grad, torch.zeros(2, 5))


def test_relative_loss_and_gradient_stay_finite_for_extreme_scores():
    scores = torch.tensor([[-1e6, 1e6, 0.0]], requires_grad=True)
    loss = relative_loss(scores, torch.tensor([[2.0, 1.0, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(-2 * math.log(1e-6) / 3, rel=1e-4)
    assert torch.isfinite(scores.grad).all()


def test_absolute_loss_equals_numpy():
    scores, patch_loss = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    patch_loss[1] *= 1e-3  # here the 1e-6 beside the variance matters
    deviation = np.sqrt(patch_loss.var(axis=1, ddof=1, keepdims=True) + 1e-6)
    expected = np.mean((scores - (patch_loss - patch_loss.mean(axis=1, keepdims=True)) / deviation) ** 2)
    actual = absolute_loss(torch.from_numpy(scores), torch.from_numpy(patch_loss))
    assert actual.item() == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("loss", [relative_loss, absolute_loss])
def test_no_gradient_flows_into_the_patch_loss(loss):
    scores, patch_loss = torch.randn(2, 5, requires_grad=True), torch.rand(2, 5, requires_grad=True)
    loss(scores, patch_loss).backward()
    assert patch_loss.grad is None
    assert scores.grad.abs().sum() > 0


def test_rank_correlation_equals_scipy():
    a, b = torch.randn(2, 4, 9)
    b[0], b[1] = a[0].exp(), -a[1]
    expected = [spearmanr(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    torch.testing.assert_close(rank_correlation(a, b), torch.tensor(expected, dtype=torch.float32))


def test_teacher_update_equals_a_loop_over_every_tensor():
    student = tiny_student()
    teacher = Teacher(student)
    with torch.no_grad():
        for tensor in student.state_dict().values():  # buffers too
            tensor.add_(torch.randn_like(tensor))
    before, after = copy.deepcopy(teacher.model.state_dict()), student.state_dict()
    teacher.update(student, 0.9)
    for name, tensor in teacher.model.state_dict().items():
        torch.testing.assert_close(tensor, 0.9 * before[name] + 0.1 * after[name], msg=name)
        assert not torch.equal(tensor, before[name]), name


def test_teacher_never_trains():
    student = tiny_student().train()
    teacher = Teacher(student).train()
    teacher.update(student, 0.5)
    assert not any(module.training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.reconstructor.parameters())
    assert not teacher.predict_loss(some_images()).requires_grad
    with torch.no_grad():
        student.mask_token.add_(1)
    assert not torch.equal(student.mask_token, teacher.model.mask_token)


@pytest.mark.parametrize(("view", "reaches_encoder"), [("masked", True), ("both", True), ("full", False)])
def test_predicted_loss_trains_the_encoder_only_through_the_masked_view(view, reaches_encoder):
    student = tiny_student()
    losses = tiny_method(view=view).step(student, Teacher(student), some_images(), some_noise(), num_hard=3)
    losses.prediction.backward()
    encoder = [p for p in student.encoder.parameters() if p.grad is not None and p.grad.any()]
    assert bool(encoder) == reaches_encoder
    assert student.predictor.head.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in student.reconstructor.parameters())


@pytest.mark.parametrize("view", ["masked", "both"])
def test_a_detached_predictor_shapes_nothing_but_itself(view):
    student = tiny_student()
    student.predictor_detached = True
    losses = tiny_method(view=view).step(student, Teacher(student), some_images(), some_noise(), num_hard=3)
    losses.prediction.backward()
    shaped = {name.split(".")[0] for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert shaped == {"predictor"}


def test_both_views_add_their_losses():
    prediction = {}
    for view in ("masked", "full", "both"):
        student = tiny_student()
        losses = tiny_method(view=view).step(student, Teacher(student), some_images(), some_noise(), num_hard=3)
        prediction[view] = losses.prediction.item()
    assert prediction["both"] == pytest.approx(prediction["masked"] + prediction["full"], rel=1e-5)
    assert prediction["masked"] != pytest.approx(prediction["full"], rel=1e-4)


def test_full_view_scores_belong_to_the_hidden_patches():
    student, images, hidden = tiny_student(), some_images(), hide_top(some_noise(), NUM_HIDDEN)
    features = encode(student.encoder, images)
    output = student(images, hidden, num_hidden=NUM_HIDDEN, full_features=features, predict=False)
    assert output.scores is None
    everywhere = student.predict_loss(images)
    for b in range(len(images)):
        torch.testing.assert_close(output.full_scores[b], everywhere[b][hidden[b]])


def test_student_without_predictor_is_a_plain_mae():
    student = tiny_student(predictor_depth=0)
    hidden = hide("random", None, some_noise(), num_hidden=NUM_HIDDEN, num_hard=0)
    output = student(some_images(), hidden, num_hidden=NUM_HIDDEN)
    assert output.scores is None
    assert output.full_scores is None
    method = tiny_method(masks.random, None)
    losses = method.step(student, None, some_images(), some_noise(), num_hard=0)
    assert losses.prediction.item() == 0
    assert losses.total.item() == losses.reconstruction.item() > 0
    assert losses.rank_correlation.isnan()
    with pytest.raises(ValueError, match="without a loss predictor"):
        student.predict_loss(some_images())


def test_student_sees_the_visible_patches_and_nothing_of_the_hidden_ones():
    student, images, noise = tiny_student(), some_images(), some_noise()
    hidden = hide_top(noise, NUM_HIDDEN)
    before = student(images, hidden, num_hidden=NUM_HIDDEN)
    for part, seen in ((hidden, False), (~hidden, True)):
        patches = patchify(images, PATCH)
        patches[part] = torch.randn(int(part.sum()), patches.shape[-1])
        changed = unpatchify(patches, PATCH, grid_size(student.encoder))
        after = student(changed, hidden, num_hidden=NUM_HIDDEN)
        assert torch.equal(before.prediction, after.prediction) != seen
        assert torch.equal(before.scores, after.scores) != seen


def test_student_equals_a_decoder_run_in_image_order():
    student, images = tiny_student(), some_images()
    hidden = hide_top(some_noise(), NUM_HIDDEN)
    visible_index, _ = split_patches(hidden, NUM_HIDDEN)
    output = student(images, hidden, num_hidden=NUM_HIDDEN)
    for b, features in enumerate(encode(student.encoder, images, visible_index)):
        embedded = list(student.decoder_embed(features))
        sequence = [embedded.pop(0)]  # the class token
        for n in range(NUM_PATCHES):
            token = student.mask_token[0, 0] if hidden[b, n] else embedded.pop(0)
            sequence.append(token + student.positions[0, n])
        for decoder, expected in (
            (student.reconstructor, output.prediction[b]),
            (student.predictor, output.scores[b]),
        ):
            decoded = decoder(sequence[0][None, None], torch.stack(sequence[1:])[None])[0][hidden[b]]
            decoded = decoded if decoder is student.reconstructor else decoded.mean(dim=-1)
            torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", [masks.random, masks.hard])
def test_step_end_to_end(policy):
    student, images, noise = tiny_student(), some_images(), some_noise()
    teacher, method, seen = Teacher(student), tiny_method(policy, weight=0.5), {}

    def spy(images, hidden, **rest):
        seen.update(hidden=hidden, output=student(images, hidden, **rest))
        return seen["output"]

    losses = method.step(spy, teacher, images, noise, num_hard=NUM_HIDDEN)
    scores, hidden = teacher.predict_loss(images), seen["hidden"]
    assert torch.equal(hidden, hide_top(scores if policy is masks.hard else noise, NUM_HIDDEN))
    target, patch_loss = method.target(images), torch.zeros(len(images), NUM_HIDDEN)
    for b in range(len(images)):
        for m, n in enumerate(hidden[b].nonzero().flatten().tolist()):
            patch_loss[b, m] = (seen["output"].prediction[b, m].detach() - target[b, n]).square().mean()
    assert losses.reconstruction.item() == pytest.approx(patch_loss.mean().item(), rel=1e-5)
    expected = slow_relative_loss(seen["output"].scores, patch_loss)
    assert losses.prediction.item() == pytest.approx(expected, rel=1e-4)
    assert losses.total.item() == pytest.approx(losses.reconstruction.item() + 0.5 * expected, rel=1e-5)
    rows = [spearmanr(scores[b][hidden[b]], patch_loss[b]).statistic for b in range(len(images))]
    assert losses.rank_correlation.item() == pytest.approx(np.mean(rows), abs=1e-5)
    losses.total.backward()
    unused = [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("predicted_loss", ["relative", "none"])
@pytest.mark.parametrize("bf16", [False, True])
def test_step_with_every_mask(mask, predicted_loss, bf16):
    """The policy gets its guide, the student its mask, and every parameter a finite gradient."""
    fields = TINY | {"mask": mask, "predicted_loss": predicted_loss, "predictor_view": "both"}
    if MASKS[mask].guide == "predicted_loss" and predicted_loss == "none":
        with pytest.raises(InputError, match=f"mask: '{mask}' chooses by predicted loss"):
            with_fields(Config(), fields)
        return
    config = with_fields(Config(), fields)
    student = build_student(config)
    teacher, method, seen = Teacher(student), build_method(config, student), {}
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    passes = []
    teacher.model.encoder.patch_embed.register_forward_hook(lambda *rest: passes.append(1))

    def spy(images, hidden, **rest):
        seen["hidden"] = hidden
        return student(images, hidden, **rest)

    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = method.step(spy, teacher if method.needs_teacher else None, images, noise, num_hard=6)
        assert len(passes) == int(method.needs_teacher), "one pass gives the teacher's tokens, scores and attention"
        guide = {
            "predicted_loss": lambda: teacher.predict_loss(images),
            "attention": lambda: class_attention(teacher.model.encoder, images),
            None: lambda: None,
        }[method.guide]()
        expected = hide(mask, guide, noise, num_hidden=12, num_hard=6, grid=(4, 4))
    assert torch.equal(seen["hidden"], expected)
    losses.total.backward()
    without = [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.requires_grad)
    assert losses.total.isfinite()


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ({"mask": "random", "predicted_loss": "none"}, False),
        ({"mask": "random"}, False),  # as published but for the teacher, whom nobody would ask
        ({"mask": "random", "predictor_view": "both"}, True),
        ({"mask": "random", "predictor_view": "full"}, True),
        ({"mask": "random", "predictor_view": "both", "predicted_loss": "none"}, False),
        ({"mask": "random", "target": "ema_features"}, True),
        ({"mask": "hard"}, True),
        ({"mask": "attention", "predicted_loss": "none"}, True),
    ],
)
def test_who_needs_a_teacher(fields, needed):
    config = with_fields(Config(), TINY | fields)
    assert build_method(config, build_student(config)).needs_teacher == needed


def test_some_of_the_hidden_patches_are_decoded_in_image_order():
    method = replace(tiny_method(), num_decoded=5)
    hidden = method.hide(torch.randn(40, NUM_PATCHES), torch.rand(40, NUM_PATCHES), num_hard=3)
    decoded = method.choose_decoded(hidden, torch.rand(40, NUM_PATCHES))
    assert decoded.shape == (40, 5)
    assert (decoded.diff(dim=1) > 0).all()
    assert hidden.gather(1, decoded).all()


@pytest.mark.parametrize("encoder", ["vit_wee_patch16_reg1_gap_256", "vit_small_patch16_18x2_224"])
def test_attention_masks_need_an_encoder_that_has_it(encoder):
    config = with_fields(Config(), TINY | {"mask": "attention", "encoder": encoder})
    with pytest.raises(InputError, match=f"mask: 'attention' needs an encoder with a class token.*{encoder}"):
        build_method(config, build_student(config))
    config = with_fields(config, {"mask": "hard"})
    build_method(config, build_student(config))


def test_mining_needs_a_teacher():
    with pytest.raises(ValueError, match="scores=None"):
        tiny_method().step(tiny_student(), None, some_images(), some_noise(), num_hard=0)


def test_step_never_waits_for_the_device():
    """Reading a value (``.item()``, ``nonzero``, a branch on a tensor) is an error on fake tensors."""
    student = tiny_student()
    teacher = Teacher(student)
    with FakeTensorMode(allow_non_fake_inputs=True):
        losses = tiny_method(view="both").step(
            student, teacher, torch.empty(3, 3, *SIZE), torch.empty(3, NUM_PATCHES), num_hard=torch.tensor(3)
        )
        losses.total.backward()
    assert losses.total.shape == ()


def test_no_tensor_of_a_new_student_is_uninitialised_memory():
    """Under deterministic algorithms PyTorch fills what ``torch.empty`` returns with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        tensors = tiny_student().state_dict()
    finally:
        torch.use_deterministic_algorithms(False)
    assert [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()] == []
