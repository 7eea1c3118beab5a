"""Random draws: functions of the seed and the place, and of nothing else."""

import random
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from hardpatch.data.loader.loading import Position
from hardpatch.runtime.seeding import Stream, derive_seed, generators_seeded, mask_noise, more_noise

CPU = torch.device("cpu")


def noise(seed=0, step=0, batch_size=8):
    return mask_noise(seed, step, batch_size=batch_size, num_patches=16, device=CPU)


def test_seeds_of_all_streams_and_places_differ():
    places = [(epoch, image) for epoch, image in product(range(20), range(50))]
    seeds = {derive_seed(seed, stream, *place) for seed, stream, place in product(range(3), Stream, places)}
    assert len(seeds) == 3 * len(Stream) * len(places)


def test_the_order_of_a_place_matters():
    assert derive_seed(0, Stream.AUGMENTATION, 1, 2) != derive_seed(0, Stream.AUGMENTATION, 2, 1)


def test_a_seed_is_a_63_bit_integer_that_torch_takes():
    seeds = [derive_seed(seed, Stream.ORDER, 7) for seed in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62  # all bits are used
    torch.Generator().manual_seed(max(seeds))


def test_a_seed_stays_the_same_over_versions():
    """A run that is resumed after an update must go on with the same crops and masks."""
    assert derive_seed(0, Stream.MASKS, 0) == 3_291_213_472_928_352_369
    assert derive_seed(3, Stream.AUGMENTATION, 5, 1_281_166) == 6_717_802_427_854_389_339


def test_noise_is_a_function_of_seed_and_step():
    before = noise(1, 2)
    torch.manual_seed(9)
    assert torch.equal(noise(1, 2), before)
    assert not torch.equal(noise(1, 3), before)
    assert not torch.equal(noise(2, 2), before)


def test_noise_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    noise()
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_uniform_between_zero_and_one():
    values = noise(batch_size=10_000)
    assert 0 <= values.min() < 0.001
    assert 0.999 < values.max() < 1
    assert values.mean().item() == pytest.approx(0.5, abs=0.005)
    assert len(torch.unique(values, dim=0)) == len(values)


@pytest.mark.parametrize(("world_size", "num_micro_batches"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 2)])
def test_the_parts_of_all_processes_are_the_rows_of_the_whole(world_size, num_micro_batches):
    parts = []
    for rank in range(world_size):
        position = Position(rank, world_size, num_micro_batches)
        assert len(position.slices(8)) == num_micro_batches
        parts += [noise()[part] for part in position.slices(8)]
    assert torch.equal(torch.cat(parts), noise())


def slow_splitmix64(key, count):
    """In Python's integers of any size."""
    outputs = []
    for number in range(1, count + 1):
        bits = (key + number * 0x9E3779B97F4A7C15) % 2**64
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
        outputs.append(bits ^ bits >> 31)
    return outputs


def test_the_slow_generator_is_splitmix64():
    """Outputs of the seed 1234567, as listed for example at Rosetta Code."""
    assert slow_splitmix64(1234567, 5) == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 16, 40])
def test_more_noise_equals_the_slow_generator(count):
    rows = noise(batch_size=50)
    for row, more in zip(rows, more_noise(rows, count), strict=True):
        bits = [int(value * 2**24) for value in row.tolist()]
        # The key adds up the first output of a generator started at each number, n golden ratios on.
        key = sum(slow_splitmix64(b + n * 0x9E3779B97F4A7C15, 1)[0] for n, b in enumerate(bits)) % 2**64
        assert more.tolist() == [((output >> 41) + 0.5) / 2**23 for output in slow_splitmix64(key, count)]


def test_more_noise_is_uniform_and_independent_of_the_row_and_of_itself():
    rows = noise(batch_size=20_000)
    more = more_noise(rows, 24)
    assert 0 < more.min() < 1e-5
    assert 1 - 1e-5 < more.max() < 1
    assert kstest(more.flatten().numpy(), "uniform").pvalue > 0.001
    together = torch.cat([rows, more], dim=1)
    for values in (together, together.log(), (together * 2**10) % 1):  # also of small values, and of low bits
        correlation = torch.corrcoef(values.clamp(min=-30).T).fill_diagonal_(0)
        assert correlation.abs().max() < 5 / 20_000**0.5
    counts = torch.histogramdd(torch.stack([rows[:, 3], more[:, 3]], dim=1), bins=[10, 10], range=[0, 1, 0, 1]).hist
    assert chisquare(counts.flatten().numpy()).pvalue > 0.001


def test_more_noise_is_a_function_of_the_whole_row_alone():
    rows = noise()
    more = more_noise(rows, 5)
    assert torch.equal(more_noise(rows[2:4], 5), more[2:4])
    assert torch.equal(more_noise(rows, 9)[:, :5], more)
    swapped = rows[:, [1, 0, *range(2, 16)]]
    assert (more_noise(swapped, 5) != more).all()
    rows[0, 7] += 2**-24
    assert (more_noise(rows, 5)[0] != more[0]).all()


def test_generators_are_seeded_inside_and_untouched_outside():
    def draws():
        return random.random(), np.random.rand(), torch.rand(()).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    undisturbed = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with generators_seeded(2**62):
        one = draws()
    assert draws() == undisturbed
    with generators_seeded(2**62):
        assert draws() == one
    with generators_seeded(2**62 + 1):
        assert all(a != b for a, b in zip(draws(), one))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with generators_seeded(0):
        pass
    assert draws() == undisturbed
