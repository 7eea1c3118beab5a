"""Random draws: functions of the seed and the place, and of nothing else."""

from itertools import product

import pytest
import torch

from hpm.data.loading import Position
from hpm.seeding import Stream, derive_seed, mask_noise

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
