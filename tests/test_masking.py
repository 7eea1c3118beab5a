"""Masks: how many are hidden, which, and with what chance."""

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch._subclasses.fake_tensor import FakeTensorMode

from hpm.masking import MASKS, MaskPolicy, hide_hard, hide_random, num_hidden_patches, split_patches

torch.set_num_threads(1)
GRIDS = [(2, 2), (3, 5), (8, 8), (14, 14), (7, 31)]


def draw(num_patches, *, batch=4, seed=0):
    """Scores (all different) and noise."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.stack([torch.randperm(num_patches, generator=generator) for _ in range(batch)]).float()
    return scores - num_patches / 2, torch.rand(batch, num_patches, generator=generator)


def slow_hide_hard(scores, noise, num_hidden, num_hard):
    hidden = np.zeros(scores.shape, dtype=bool)
    for b in range(len(scores)):
        easy_to_hard = np.argsort(scores[b])
        hardest = easy_to_hard[len(easy_to_hard) - num_hard :]
        hidden[b, hardest] = True
        rest = sorted(set(range(scores.shape[1])) - set(hardest.tolist()), key=lambda n: -noise[b, n])
        hidden[b, rest[: num_hidden - num_hard]] = True
    return hidden


@pytest.mark.parametrize(
    ("num_patches", "ratio", "expected"),
    [
        (196, 0.75, 147),
        (196, 0.6, 118),
        (256, 0.75, 192),
        (49, 0.75, 37),
        (12, 0.5, 6),
        (100, 0.9, 91),
        (64, 0.4, 26),
    ],
)
def test_number_of_hidden_patches_follows_mae(num_patches, ratio, expected):
    assert num_hidden_patches(num_patches, ratio) == expected


@pytest.mark.parametrize("policy", [hide_random, hide_hard])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("grid", GRIDS)
def test_exactly_m_patches_are_hidden(policy, grid, ratio):
    num_patches = grid[0] * grid[1]
    num_hidden = num_hidden_patches(num_patches, ratio)
    scores, noise = draw(num_patches)
    for num_hard in {0, 1, num_hidden // 2, num_hidden}:
        hidden = policy(scores, noise, num_hidden=num_hidden, num_hard=num_hard)
        assert hidden.dtype == torch.bool
        assert hidden.sum(dim=1).tolist() == [num_hidden] * len(noise)


@pytest.mark.parametrize("tied", [torch.zeros(3, 20), torch.full((3, 20), torch.nan)], ids=["equal", "nan"])
def test_exactly_m_patches_are_hidden_whatever_the_scores(tied):
    hidden = hide_hard(tied, draw(20, batch=3)[1], num_hidden=15, num_hard=7)
    assert hidden.sum(dim=1).tolist() == [15] * 3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("grid", GRIDS)
def test_hide_hard_equals_a_loop_over_images(grid, seed):
    num_patches = grid[0] * grid[1]
    scores, noise = draw(num_patches, seed=seed)
    num_hidden = int(np.random.default_rng(seed).integers(1, num_patches))
    for num_hard in {0, 1, num_hidden // 3, num_hidden}:
        hidden = hide_hard(scores, noise, num_hidden=num_hidden, num_hard=num_hard)
        assert np.array_equal(hidden.numpy(), slow_hide_hard(scores.numpy(), noise.numpy(), num_hidden, num_hard))


def test_the_hardest_are_always_hidden():
    scores, noise = draw(30, batch=500)
    hidden = hide_hard(scores, noise, num_hidden=20, num_hard=8)
    assert hidden.gather(1, scores.topk(8).indices).all()


@pytest.mark.parametrize("num_hard", [0, 2])
def test_the_rest_is_uniform(num_hard):
    """Every set of three of the six patches that are not hardest is hidden equally often."""
    num_patches, batch = 6 + num_hard, 40_000
    _, noise = draw(num_patches, batch=batch)
    scores = torch.arange(num_patches).roll(3).float().expand(batch, -1)
    hidden = hide_hard(scores, noise, num_hidden=3 + num_hard, num_hard=num_hard)
    others = hidden[:, scores[0] < 6].long()
    codes = (others << torch.arange(6)).sum(dim=1)
    subsets = [sum(1 << i for i in chosen) for chosen in combinations(range(6), 3)]
    counts = [(codes == code).sum().item() for code in subsets]
    assert sum(counts) == batch
    assert chisquare(counts).pvalue > 0.01


def test_without_hard_patches_the_mask_is_the_random_one():
    scores, noise = draw(64)
    hard = hide_hard(scores, noise, num_hidden=48, num_hard=0)
    assert torch.equal(hard, hide_random(None, noise, num_hidden=48, num_hard=0))


def test_random_masks_ignore_scores_and_share():
    scores, noise = draw(64)
    masks = [hide_random(s, noise, num_hidden=48, num_hard=n) for s, n in ((None, 0), (scores, 48))]
    assert torch.equal(*masks)


def test_number_of_hard_patches_may_be_a_tensor():
    scores, noise = draw(64)
    for num_hard in (0, 1, 17, 48):
        by_tensor = hide_hard(scores, noise, num_hidden=48, num_hard=torch.tensor(num_hard))
        assert torch.equal(by_tensor, hide_hard(scores, noise, num_hidden=48, num_hard=num_hard))


@pytest.mark.parametrize("policy", [hide_random, hide_hard])
def test_masks_depend_on_nothing_but_their_own_row(policy):
    scores, noise = draw(64, batch=8)
    before = scores.clone(), noise.clone()
    whole = policy(scores, noise, num_hidden=48, num_hard=10)
    torch.rand(5)  # the global random state does not matter
    parts = [policy(scores[i : i + 2], noise[i : i + 2], num_hidden=48, num_hard=10) for i in range(0, 8, 2)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(scores, before[0])
    assert torch.equal(noise, before[1])


@pytest.mark.parametrize("num_hidden", [1, 9, 19])
def test_split_patches_lists_both_parts_in_image_order(num_hidden):
    hidden = hide_random(None, draw(20)[1], num_hidden=num_hidden, num_hard=0)
    visible_index, hidden_index = split_patches(hidden, num_hidden)
    for row, v, h in zip(hidden.tolist(), visible_index.tolist(), hidden_index.tolist(), strict=True):
        assert v == [n for n in range(20) if not row[n]]
        assert h == [n for n in range(20) if row[n]]


def test_mining_without_scores_is_an_error():
    with pytest.raises(ValueError, match="scores=None"):
        hide_hard(None, draw(8)[1], num_hidden=4, num_hard=0)


def test_every_policy_has_the_one_signature():
    assert all(isinstance(mask.policy((8, 8)), MaskPolicy) for mask in MASKS.values())


@pytest.mark.parametrize("as_tensor", [False, True])
def test_masks_need_no_value_on_the_host(as_tensor):
    """Reading a value (``.item()``, ``nonzero``, boolean indexing) is an error on fake tensors."""
    with FakeTensorMode():
        num_hard = torch.ones((), dtype=torch.int64) * 3 if as_tensor else 3
        hidden = hide_hard(torch.rand(4, 64), torch.rand(4, 64), num_hidden=48, num_hard=num_hard)
        visible_index, hidden_index = split_patches(hidden, 48)
    assert (visible_index.shape, hidden_index.shape) == ((4, 16), (4, 48))
