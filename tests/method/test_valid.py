"""Patches without data: they are no exercise, count in no loss, and everything else stays as it was."""

import math

import pytest
import torch
from scipy import stats
from test_method import GRID, NUM_HIDDEN, NUM_PATCHES, some_images, some_noise, tiny_method, tiny_student

from hardpatch.method.choices import MASKS
from hardpatch.method.losses import absolute_loss, mean_over, rank_correlation, relative_loss
from hardpatch.method.student import Teacher
from hardpatch.method.vit import whole_patches
from hiding import hide

HALF = torch.arange(NUM_PATCHES) < NUM_PATCHES // 2


def some_valid(rows=3):
    valid = torch.rand(rows, NUM_PATCHES, generator=torch.Generator().manual_seed(3)) < 0.6
    valid[0] = True
    return valid


# Masks


@pytest.mark.parametrize("policy", ["hard", "easy", "proportional"])
@pytest.mark.parametrize("num_hard", [0, 3, NUM_HIDDEN])
def test_masks_of_images_that_are_all_data_are_the_same(policy, num_hard):
    scores, noise = torch.randn(3, NUM_PATCHES), some_noise()
    valid = torch.ones(3, NUM_PATCHES, dtype=torch.bool)
    plain = hide(policy, scores, noise, num_hidden=NUM_HIDDEN, num_hard=num_hard)
    assert torch.equal(plain, hide(policy, scores, noise, num_hidden=NUM_HIDDEN, num_hard=num_hard, valid=valid))


@pytest.mark.parametrize(("policy", "sign"), [("hard", 1.0), ("easy", -1.0)])
def test_no_data_is_never_chosen_by_score(policy, sign):
    scores = torch.arange(NUM_PATCHES).float().expand(200, -1) * sign  # the half without data scores highest
    noise = torch.rand(200, NUM_PATCHES, generator=torch.Generator().manual_seed(0))
    valid = HALF.expand(200, -1)
    hidden = hide(policy, scores, noise, num_hidden=NUM_HIDDEN, num_hard=NUM_HIDDEN, valid=valid)
    assert (hidden.sum(1) == NUM_HIDDEN).all()
    hard = NUM_HIDDEN // 2  # half of the data, half of the hardest
    assert hidden[:, NUM_PATCHES // 2 - hard : NUM_PATCHES // 2].all(), "the hardest with data"
    rest = float(hidden[:, : NUM_PATCHES // 2 - hard].float().mean())
    assert rest == pytest.approx(float(hidden[:, NUM_PATCHES // 2 :].float().mean()), abs=0.06), "the others by chance"
    assert rest < 0.95, "some data stays visible"


def test_every_policy_takes_valid():
    scores, noise = torch.randn(3, NUM_PATCHES), some_noise()
    for mask in MASKS:
        hidden = hide(mask, scores, noise, num_hidden=NUM_HIDDEN, num_hard=3, valid=some_valid(), grid=GRID)
        assert (hidden.sum(1) == NUM_HIDDEN).all()


# Losses


def without(values, valid):
    return [row[keep] for row, keep in zip(values, valid, strict=True)]


def test_relative_loss_is_that_of_the_valid_pairs():
    scores, loss, valid = torch.randn(3, 12), torch.rand(3, 12), some_valid()[:, :12]
    pairs = [
        -math.log(1 / (1 + math.exp(float(s[j] - s[i]))) + 1e-6)
        for s, row in zip(without(scores, valid), without(loss, valid), strict=True)
        for i in range(len(s))
        for j in range(len(s))
        if row[i] > row[j]
    ]
    assert float(relative_loss(scores, loss, valid)) == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)


def test_absolute_loss_is_that_of_the_valid_patches():
    scores, loss, valid = torch.randn(3, 12), torch.rand(3, 12), some_valid()[:, :12]
    errors = torch.cat([
        (s - (row - row.mean()) / (row.var() + 1e-6).sqrt()).square()
        for s, row in zip(without(scores, valid), without(loss, valid), strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(absolute_loss(scores, loss, valid), errors.mean())


def test_rank_correlation_is_that_of_the_valid_entries():
    a, b, valid = torch.randn(3, 12), torch.randn(3, 12), some_valid()[:, :12]
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(without(a, valid), without(b, valid), strict=True)]
    torch.testing.assert_close(rank_correlation(a, b, valid), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("loss", [relative_loss, absolute_loss, lambda s, t, v: rank_correlation(s, t, v).mean()])
def test_nothing_valid_is_zero_and_finite(loss):
    scores = torch.randn(2, 6, requires_grad=True)
    value = loss(scores, torch.rand(2, 6), torch.zeros(2, 6, dtype=torch.bool))
    assert float(value.detach()) == 0
    assert float(mean_over(scores.detach(), torch.zeros(2, 6, dtype=torch.bool))) == 0


# The step


def step_with(images, valid, **fields):
    student, method = tiny_student(), tiny_method(**fields)
    losses = method.step(student, Teacher(student), images, some_noise(), num_hard=4, valid=valid)
    losses.total.backward()
    return losses, [p.grad.clone() for p in student.parameters() if p.grad is not None]


@pytest.mark.parametrize("predicted_loss", [relative_loss, absolute_loss])
def test_a_step_on_images_that_are_all_data_is_the_same(predicted_loss):
    plain, gradients = step_with(some_images(), None, predicted_loss=predicted_loss)
    valid = torch.ones(3, NUM_PATCHES, dtype=torch.bool)
    same, others = step_with(some_images(), valid, predicted_loss=predicted_loss)
    torch.testing.assert_close(same, plain)
    torch.testing.assert_close(others, gradients)


def test_what_is_reconstructed_without_data_does_not_count():
    """The loss is the mean over hidden patches with data: computed here from the student's output."""
    student, method, valid = tiny_student(), tiny_method(), some_valid()
    seen = {}

    def spy(*args, **kwargs):
        seen["hidden"], seen["output"] = args[1], student(*args, **kwargs)
        return seen["output"]

    losses = method.step(spy, Teacher(student), some_images(), some_noise(), num_hard=4, valid=valid)
    target = method.target(some_images())
    total = []
    for row in range(3):
        index = seen["hidden"][row].nonzero()[:, 0]
        error = (seen["output"].prediction[row].float() - target[row, index]).square().mean(-1)
        total += error[valid[row, index]].tolist()
    assert float(losses.reconstruction.detach()) == pytest.approx(sum(total) / len(total), rel=1e-5)


def test_the_mask_and_the_rank_correlation_of_a_step_leave_out_what_has_no_data():
    student, method, valid = tiny_student(), tiny_method(), some_valid()
    teacher, images, noise, seen = Teacher(student), some_images(), some_noise(), {}

    def spy(*args, **kwargs):
        seen["hidden"], seen["output"] = args[1], student(*args, **kwargs)
        return seen["output"]

    losses = method.step(spy, teacher, images, noise, num_hard=NUM_HIDDEN, valid=valid)
    scores = teacher.predict_loss(images)
    expected = method.hide(scores, noise, num_hard=NUM_HIDDEN, valid=valid)
    blind = method.hide(scores, noise, num_hard=NUM_HIDDEN)
    assert not torch.equal(expected, blind), "the case tells nothing"
    assert torch.equal(seen["hidden"], expected)
    target, found = method.target(images), []
    for row in range(3):
        index = expected[row].nonzero()[:, 0]
        error = (seen["output"].prediction[row].detach().float() - target[row, index]).square().mean(-1)
        keep = valid[row, index]
        found.append(stats.spearmanr(scores[row, index][keep], error[keep]).statistic)
    assert float(losses.rank_correlation) == pytest.approx(sum(found) / 3, abs=1e-5)


def test_partly_decoded_images_decode_data_first():
    method = tiny_method()
    method = type(method)(**{**vars(method), "num_decoded": 5})
    hidden, valid = torch.ones(200, NUM_PATCHES, dtype=torch.bool), HALF.expand(200, -1)
    hidden[:, NUM_HIDDEN:] = False
    decoded = method.choose_decoded(hidden, torch.rand(200, NUM_PATCHES), valid)
    assert valid.gather(1, decoded).sum(1).tolist() == [min(5, int((hidden[0] & HALF).sum()))] * 200


# From pixels to patches


def test_a_patch_counts_if_all_its_pixels_are_data():
    valid = torch.ones(2, 16, 24, dtype=torch.bool)
    valid[0, 0, 7] = False
    valid[1, 8:, 8:] = False
    found = whole_patches(valid, (16, 24), (8, 8))
    assert found.tolist() == [[False, True, True, True, True, True], [True, True, True, True, False, False]]
    everything = torch.ones(1, 48, 48, dtype=torch.bool)
    assert whole_patches(everything, (16, 24), (8, 8)).all(), "rounding of a resize takes nothing away"
    everything[0, 24:, 24:] = False
    shrunk = whole_patches(everything, (24, 24), (4, 4))[0].unflatten(0, (6, 6))
    assert not shrunk[3:, 3:].any()
    assert shrunk[:2].all()
    assert shrunk[:, :2].all()
    assert not shrunk[2, 3:].any(), "what borders on it is a mixture"
