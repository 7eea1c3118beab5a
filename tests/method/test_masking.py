"""Masks: how many are hidden, which, and with what chance."""

import math
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch._subclasses.fake_tensor import FakeTensorMode

from hardpatch.method.choices import MASKS, resolve
from hardpatch.method.masks import NUM_RECTANGLES, MaskInput, num_hidden_patches, split_patches
from hardpatch.runtime.seeding import more_noise
from hiding import hide

torch.set_num_threads(1)
GRIDS = [(2, 2), (1, 7), (3, 5), (8, 8), (14, 14), (7, 31)]
GUIDED = [name for name, mask in MASKS.items() if mask.guide]
COLOURED = [name for name in MASKS if name.endswith("_noise")]
BLOCKS = ["block", "inverse_block"]


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


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("grid", GRIDS)
def test_exactly_m_patches_are_hidden(mask, grid, ratio):
    num_patches = grid[0] * grid[1]
    num_hidden = min(num_hidden_patches(num_patches, ratio), num_patches - 1)
    scores, noise = draw(num_patches)
    for num_hard in {0, 1, num_hidden // 2, num_hidden}:
        hidden = hide(mask, scores, noise, num_hidden=num_hidden, num_hard=num_hard, grid=grid)
        assert hidden.dtype == torch.bool
        assert hidden.sum(dim=1).tolist() == [num_hidden] * len(noise)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_m_patches_are_hidden_whatever_the_scores(mask, value, dtype):
    scores, noise = draw(20, batch=3)
    everywhere = torch.full((3, 20), value)
    somewhere = torch.where(torch.arange(20) % 3 == 0, value, scores)
    for broken in (everywhere, somewhere):
        hidden = hide(mask, broken.to(dtype), noise, num_hidden=15, num_hard=7, grid=(4, 5))
        assert hidden.sum(dim=1).tolist() == [15] * 3


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("extreme", [0.0, 0.5, 1 - 2**-24])
def test_exactly_m_patches_are_hidden_whatever_the_noise(mask, extreme):
    """Also where a filter is given nothing but one value."""
    for grid in GRIDS:
        num_patches = grid[0] * grid[1]
        scores, noise = torch.zeros(2, num_patches), torch.full((2, num_patches), extreme)
        hidden = hide(mask, scores, noise, num_hidden=num_patches // 2, num_hard=1, grid=grid)
        assert hidden.sum(dim=1).tolist() == [num_patches // 2] * 2


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
def test_one_extreme_noise_value_does_not_decide_the_whole_mask(mask, extreme):
    """Now and then one value is exactly 0: an infinite normal deviate would fill the whole row."""
    scores, noise = draw(64, batch=8)
    noise[:, 5] = extreme
    hidden = hide(mask, scores, noise, num_hidden=48, num_hard=10, grid=(8, 8))
    assert len(torch.unique(hidden, dim=0)) == 8


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("grid", GRIDS)
def test_hard_masks_equal_a_loop_over_images(grid, seed):
    num_patches = grid[0] * grid[1]
    scores, noise = draw(num_patches, seed=seed)
    num_hidden = int(np.random.default_rng(seed).integers(1, num_patches))
    for num_hard in {0, 1, num_hidden // 3, num_hidden}:
        hidden = hide("hard", scores, noise, num_hidden=num_hidden, num_hard=num_hard)
        assert np.array_equal(hidden.numpy(), slow_hide_hard(scores.numpy(), noise.numpy(), num_hidden, num_hard))


@pytest.mark.parametrize(("mask", "largest"), [("hard", True), ("attention", True), ("easy", False)])
def test_the_guided_share_is_always_hidden(mask, largest):
    scores, noise = draw(30, batch=500)
    hidden = hide(mask, scores, noise, num_hidden=20, num_hard=8, grid=(5, 6))
    assert hidden.gather(1, scores.topk(8, largest=largest).indices).all()
    assert not hidden.gather(1, scores.topk(8, largest=not largest).indices).all()


@pytest.mark.parametrize("mask", ["hard", "attention", "easy"])
@pytest.mark.parametrize("num_hard", [0, 2])
def test_the_rest_is_uniform(mask, num_hard):
    """Every set of three of the six patches that are not chosen by score is hidden equally often."""
    num_patches, batch = 6 + num_hard, 40_000
    _, noise = draw(num_patches, batch=batch)
    scores = torch.arange(num_patches).roll(3).float().expand(batch, -1)
    hidden = hide(mask, scores, noise, num_hidden=3 + num_hard, num_hard=num_hard, grid=(2, num_patches // 2))
    others = hidden[:, scores[0] >= num_hard if mask == "easy" else scores[0] < 6].long()
    codes = (others << torch.arange(6)).sum(dim=1)
    subsets = [sum(1 << i for i in chosen) for chosen in combinations(range(6), 3)]
    counts = [(codes == code).sum().item() for code in subsets]
    assert sum(counts) == batch
    assert chisquare(counts).pvalue > 0.01


def luce_probability(chosen, scores):
    """Of drawing the set ``chosen`` one after another in proportion to exp(score), without replacement."""
    strengths, total = [math.exp(s) for s in scores], 0.0
    for order in permutations(chosen):
        left, probability = sum(strengths), 1.0
        for n in order:
            probability *= strengths[n] / left
            left -= strengths[n]
        total += probability
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_hard", [0, 1, 2, 3])
def test_proportional_masks_are_a_luce_draw_and_a_uniform_rest(num_hard, seed):
    """Every set of three of six patches as often as a sum over all orders says: so the rest is independent too."""
    batch, scores = 40_000, [0.0, 1.0, -1.5, 0.5, 2.0, -0.3]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(batch, 6, generator=generator)
    hidden = hide("proportional", torch.tensor(scores).expand(batch, -1), noise, num_hidden=3, num_hard=num_hard)
    codes = (hidden.long() << torch.arange(6)).sum(dim=1)
    counts, expected = [], []
    for subset in combinations(range(6), 3):
        drawn = sum(luce_probability(chosen, scores) for chosen in combinations(subset, num_hard))
        expected.append(batch * drawn / math.comb(6 - num_hard, 3 - num_hard))
        counts.append((codes == sum(1 << n for n in subset)).sum().item())
    assert sum(expected) == pytest.approx(batch)
    assert chisquare(counts, expected).pvalue > 0.001


def test_proportional_masks_hide_what_is_much_harder():
    scores, noise = draw(30, batch=200)
    far_apart = torch.where(scores >= 7, scores + 40, scores)
    hidden = hide("proportional", far_apart, noise, num_hidden=20, num_hard=8)
    assert hidden[scores >= 7].all()


@pytest.mark.parametrize("mask", GUIDED)
def test_without_hard_patches_the_mask_is_the_random_one(mask):
    scores, noise = draw(64)
    guided = hide(mask, scores, noise, num_hidden=48, num_hard=0, grid=(8, 8))
    assert torch.equal(guided, hide("random", None, noise, num_hidden=48, num_hard=0))


def test_easy_masks_are_hard_ones_of_the_opposite_scores():
    scores, noise = draw(64)
    easy = hide("easy", scores, noise, num_hidden=48, num_hard=20)
    assert torch.equal(easy, hide("hard", -scores, noise, num_hidden=48, num_hard=20))


@pytest.mark.parametrize("mask", [name for name in MASKS if name not in GUIDED])
def test_masks_without_a_guide_ignore_scores_and_share(mask):
    scores, noise = draw(64)
    masks = [hide(mask, s, noise, num_hidden=48, num_hard=n, grid=(8, 8)) for s, n in ((None, 0), (scores, 48))]
    assert torch.equal(*masks)


@pytest.mark.parametrize("mask", MASKS)
def test_number_of_hard_patches_may_be_a_tensor(mask):
    scores, noise = draw(64)
    for num_hard in (0, 1, 17, 48):
        by_tensor = hide(mask, scores, noise, num_hidden=48, num_hard=torch.tensor(num_hard), grid=(8, 8))
        assert torch.equal(by_tensor, hide(mask, scores, noise, num_hidden=48, num_hard=num_hard, grid=(8, 8)))


@pytest.mark.parametrize("mask", MASKS)
def test_masks_depend_on_nothing_but_their_own_row(mask):
    scores, noise = draw(64, batch=8)
    before = scores.clone(), noise.clone()
    whole = hide(mask, scores, noise, num_hidden=48, num_hard=10, grid=(8, 8))
    torch.rand(5)  # the global random state does not matter
    parts = [
        hide(mask, scores[i : i + 2], noise[i : i + 2], num_hidden=48, num_hard=10, grid=(8, 8)) for i in range(0, 8, 2)
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(scores, before[0])
    assert torch.equal(noise, before[1])
    assert len(torch.unique(whole, dim=0)) == 8


@pytest.mark.parametrize("num_hidden", [1, 9, 19])
def test_split_patches_lists_both_parts_in_image_order(num_hidden):
    hidden = hide("random", None, draw(20)[1], num_hidden=num_hidden, num_hard=0)
    visible_index, hidden_index = split_patches(hidden, num_hidden)
    for row, v, h in zip(hidden.tolist(), visible_index.tolist(), hidden_index.tolist(), strict=True):
        assert v == [n for n in range(20) if not row[n]]
        assert h == [n for n in range(20) if row[n]]


@pytest.mark.parametrize("mask", GUIDED)
def test_a_guided_mask_without_scores_is_an_error(mask):
    with pytest.raises(ValueError, match="scores=None"):
        hide(mask, None, draw(8)[1], num_hidden=4, num_hard=0, grid=(2, 4))


@pytest.mark.parametrize("mask", MASKS)
def test_a_policy_gives_every_patch_a_number(mask):
    """The M highest are hidden, whatever their scale; so every one has to be finite."""
    scores, noise = draw(64)
    priorities = resolve(MASKS[mask].policy)(MaskInput(scores, noise, (8, 8), 48, 10))
    assert priorities.shape == (4, 64)
    assert priorities.is_floating_point()
    assert priorities.isfinite().all()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_masks_need_no_value_on_the_host(mask, as_tensor):
    """Reading a value (``.item()``, ``nonzero``, boolean indexing) is an error on fake tensors."""
    with FakeTensorMode():
        num_hard = torch.ones((), dtype=torch.int64) * 3 if as_tensor else 3
        hidden = hide(mask, torch.rand(4, 64), torch.rand(4, 64), num_hidden=48, num_hard=num_hard, grid=(8, 8))
        visible_index, hidden_index = split_patches(hidden, 48)
    assert (visible_index.shape, hidden_index.shape) == ((4, 16), (4, 48))


def slow_hide_blocks(noise, grid, num_covered):
    """Lay one rectangle after another; shrink the one that is too large towards its middle."""
    (rows, columns), covered = grid, np.zeros(noise.shape, dtype=bool)
    draws = more_noise(noise, 4 * NUM_RECTANGLES).numpy().reshape(-1, 4, NUM_RECTANGLES)
    smallest = min(16 / 196 * rows * columns, num_covered)
    for b in range(len(noise)):
        by_noise = np.argsort(noise[b].numpy())
        for area, aspect, top, left in draws[b].T:
            area = smallest + area * (num_covered - smallest)
            aspect = math.exp((1 - 2 * aspect) * math.log(1 / 0.3))  # height / width
            height = min(max(round(math.sqrt(area * aspect)), 1), rows)
            width = min(max(round(area / height), 1), columns)
            height = min(max(round(area / width), 1), rows)
            assert area < 4 or height == rows or width == columns or 0.5 * area < height * width < 1.6 * area
            top, left = int(top * (rows - height + 1)), int(left * (columns - width + 1))
            inside = [n for n in by_noise if top <= n // columns < top + height and left <= n % columns < left + width]
            inside.sort(
                key=lambda n: max(
                    abs(n // columns - top - (height - 1) / 2) / height,
                    abs(n % columns - left - (width - 1) / 2) / width,
                )
            )
            for n in inside:
                covered[b, n] |= covered[b].sum() < num_covered
        for n in by_noise:
            covered[b, n] |= covered[b].sum() < num_covered
    return covered


@pytest.mark.parametrize("ratio", [0.05, 0.4, 0.75, 0.9])
@pytest.mark.parametrize("grid", [*GRIDS, (7, 1)])
def test_block_masks_equal_a_loop_over_images_and_rectangles(grid, ratio):
    num_patches = grid[0] * grid[1]
    num_hidden = min(num_hidden_patches(num_patches, ratio), num_patches - 1)
    noise = draw(num_patches, batch=30)[1]
    for mask, num_covered in (("block", num_hidden), ("inverse_block", num_patches - num_hidden)):
        hidden = hide(mask, None, noise, num_hidden=num_hidden, num_hard=0, grid=grid).numpy()
        covered = hidden if mask == "block" else ~hidden
        assert np.array_equal(covered, slow_hide_blocks(noise, grid, num_covered))


def drawn(mask, grid, *, batch, ratio=0.75, seed=0):
    """Masks as 0 and 1, (B, rows, columns)."""
    scores, noise = draw(grid[0] * grid[1], batch=batch, seed=seed)
    num_hidden = num_hidden_patches(grid[0] * grid[1], ratio)
    hidden = hide(mask, scores, noise, num_hidden=num_hidden, num_hard=num_hidden // 2, grid=grid)
    return hidden.unflatten(1, grid).float()


@pytest.mark.parametrize("grid", [(14, 14), (2, 6), (7, 31), (3, 5), (1, 7)])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75, 0.9])
def test_uniform_grid_hides_the_same_share_of_every_cell(grid, ratio):
    """To less than one patch: there is a share t with floor(n t) or ceil(n t) hidden in every cell of n."""
    for hidden in drawn("uniform_grid", grid, batch=50, ratio=ratio):
        cells = [
            hidden[row : row + 2, column : column + 2]
            for row in range(0, grid[0], 2)
            for column in range(0, grid[1], 2)
        ]
        assert max((c.sum() - 1) / c.numel() for c in cells) < min((c.sum() + 1) / c.numel() for c in cells)
        if ratio == 0.75 and grid[0] % 2 == grid[1] % 2 == 0:
            assert all(c.sum() == 3 for c in cells)


def test_uniform_grid_survives_the_largest_and_smallest_offsets(monkeypatch):
    """A cell that is as far ahead of the others as can be does not round up to their next level."""
    extremes = torch.tensor([2**-24, 1 - 2**-24]).repeat(1, 8)
    monkeypatch.setattr(
        "hardpatch.method.masks.more_noise", lambda noise, count: extremes[:, :count].expand(len(noise), -1)
    )
    visible = 1 - drawn("uniform_grid", (8, 8), batch=20)
    assert (visible.unflatten(1, (4, 2)).unflatten(3, (4, 2)).sum(dim=(2, 4)) == 1).all()


def test_uniform_grid_shows_every_place_of_a_cell_alike_and_cells_independently():
    visible = 1 - drawn("uniform_grid", (2, 4), batch=40_000)
    place = visible.unflatten(2, (2, 2)).permute(0, 2, 1, 3).flatten(2).argmax(dim=2)  # (B, 2 cells)
    counts = torch.bincount(place[:, 0] * 4 + place[:, 1], minlength=16)
    assert chisquare(counts.numpy()).pvalue > 0.001


@pytest.mark.parametrize("mask", ["random", *GUIDED, "uniform_grid", *COLOURED])
@pytest.mark.parametrize("grid", [(14, 14), (8, 12)])
@pytest.mark.parametrize("ratio", [0.4, 0.75])
def test_every_patch_is_hidden_equally_often(mask, grid, ratio):
    """Not so for blocks, see below, and on odd grids not quite for the uniform grid."""
    hidden = drawn(mask, grid, batch=4000, ratio=ratio)
    share = num_hidden_patches(grid[0] * grid[1], ratio) / (grid[0] * grid[1])
    deviation = (hidden.mean(dim=0) - share) / math.sqrt(share * (1 - share) / 4000)
    assert deviation.abs().max() < 4.6  # of 196 or 96 normal deviates: exceeded once in a thousand
    assert deviation.square().mean() < 1.5


@pytest.mark.parametrize("mask", COLOURED)
@pytest.mark.parametrize("grid", [(1, 7), (3, 5), (7, 31), (2, 2), (1, 2)])
def test_coloured_noise_hides_every_patch_equally_often_on_odd_and_tiny_grids(mask, grid):
    hidden = drawn(mask, grid, batch=4000, ratio=0.5)
    share = hidden[0].mean().item()
    deviation = (hidden.mean(dim=0) - share) / math.sqrt(share * (1 - share) / 4000)
    assert deviation.abs().max() < 4.6


def test_blocks_lie_on_the_border_less_often_than_in_the_middle():
    for mask, covered in (("block", 1), ("inverse_block", 0)):
        share = (drawn(mask, (14, 14), batch=2000) == covered).float().mean(dim=0)
        assert share[0, 0] < share[0, 7] < share[7, 7]
        assert share[0, 0] < share[7, 0] < share[7, 7]
        torch.testing.assert_close(share, share.flip(0), atol=0.06, rtol=0)
        torch.testing.assert_close(share, share.flip(1), atol=0.06, rtol=0)
        torch.testing.assert_close(share, share.T, atol=0.06, rtol=0)  # lying and standing alike


def agreement(mask, grid):
    """Chance that two patches side by side are both hidden or both visible."""
    hidden = drawn(mask, grid, batch=500)
    pairs = (hidden[:, 1:] == hidden[:, :-1]).flatten(), (hidden[:, :, 1:] == hidden[:, :, :-1]).flatten()
    return torch.cat(pairs).float().mean().item()


@pytest.mark.parametrize("grid", [(14, 14), (7, 31)])
def test_masks_are_as_coarse_as_their_names_say(grid):
    """From scattered to clustered; two independent patches agree with chance 0.75^2 + 0.25^2."""
    agree = {mask: agreement(mask, grid) for mask in MASKS}
    assert agree["random"] == pytest.approx(0.625, abs=0.01)
    scattered, clustered = agree["random"] - 0.02, agree["random"] + 0.05
    assert max(agree["uniform_grid"], agree["blue_noise"], agree["purple_noise"]) < scattered
    assert clustered < agree["green_noise"] < agree["red_noise"] - 0.05 < min(agree[mask] for mask in BLOCKS) - 0.05


def power(mask):
    """Mean power of the masks at low, middle and high frequencies; 1 is that of independent patches."""
    hidden = drawn(mask, (16, 16), batch=1000)
    spectrum = torch.fft.fft2(hidden - 0.75).abs().square().mean(dim=0) / (0.75 * 0.25 * 256)
    along = torch.fft.fftfreq(16)
    frequency = (along.square() + along.square().unsqueeze(1)).sqrt()  # cycles per patch
    bands = (0, 0.1), (0.15, 0.25), (0.5, 1)
    return [spectrum[(low < frequency) & (frequency <= high)].mean().item() for low, high in bands]


def test_coloured_masks_have_the_spectrum_of_their_colour():
    assert power("random") == pytest.approx([1, 1, 1], abs=0.05)
    low, middle, high = power("red_noise")
    assert low > 5 > middle > 1 > 0.4 > high
    low, middle, high = power("blue_noise")
    assert low < 0.6 < middle < 0.8 < 1.1 < high
    low, middle, high = power("green_noise")
    assert max(low, high) < 1.3 < 2 < middle
    low, middle, high = power("purple_noise")
    assert middle < 0.7 < 1.1 < min(low, high)
