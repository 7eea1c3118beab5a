"""Order, crops and batches: functions of the seed and the step, whatever machine they are made on."""

import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from hardpatch.data.images.decode import DecodeError, Sample
from hardpatch.data.loader.loading import (
    Cover,
    Normalise,
    Position,
    TrainingImages,
    TrainingOrder,
    measure_statistics,
    ordered_batches,
    read_or_next,
    training_batches,
)
from hardpatch.data.sources import Source, open_source
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.signals import SIGNALS, signals_held

torch.set_num_threads(1)


class Memory(Source):
    """Random images in memory, some of them damaged."""

    def __init__(self, num_images=20, *, damaged=(), size=(13, 9), channels=3, dark=()):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(256, (num_images, channels, *size), generator=generator, dtype=torch.uint8)
        self.damaged = dict.fromkeys(damaged, DecodeError("broken")) | dict.fromkeys(dark, OSError("unreadable"))

    def __len__(self):
        return len(self.images)

    def read(self, index):
        if index in self.damaged:
            raise self.damaged[index]
        return Sample(self.images[index], self.images[index, 0] > 128)

    def name(self, index):
        return f"image {index}"

    def content(self, index):
        return self.images[index].numpy().tobytes()

    @property
    def labels(self):
        return None


def order(*, num_images=23, batch_size=8, first_step=0, total_steps=6, seed=0, position=None):
    made = TrainingOrder(
        num_images,
        batch_size=batch_size,
        first_step=first_step,
        total_steps=total_steps,
        seed=seed,
        position=position or Position(),
    )
    batches = list(made)
    assert len(batches) == len(made)
    return batches


def training_images(source, **changed):
    return TrainingImages(source, **({"size": (8, 8), "crop_scale": (0.2, 1.0), "flip": True, "seed": 0} | changed))


# Order


@pytest.mark.parametrize(("world_size", "num_micro_batches"), [(1, 4), (2, 1), (2, 2), (4, 2), (8, 1)])
def test_ranks_and_micro_batches_together_are_the_global_batch_in_order(world_size, num_micro_batches):
    positions = [Position(rank, world_size, num_micro_batches) for rank in range(world_size)]
    ranks = [order(position=position) for position in positions]
    for step, wanted in enumerate(order()):
        mine = slice(step * num_micro_batches, (step + 1) * num_micro_batches)
        assert [key for rank in ranks for micro in rank[mine] for key in micro] == wanted


def test_every_image_is_seen_at_most_once_an_epoch():
    batches = order(num_images=23, batch_size=8, total_steps=6)
    for epoch in range(3):
        keys = [key for batch in batches[2 * epoch : 2 * epoch + 2] for key in batch]
        assert {e for e, _ in keys} == {epoch}
        assert len({index for _, index in keys}) == 16
        assert {index for _, index in keys} <= set(range(23))


@pytest.mark.parametrize("first_step", [1, 2, 3, 6])
@pytest.mark.parametrize("position", [Position(), Position(1, 2, 2)])
def test_starting_later_gives_the_tail_of_the_whole_order(first_step, position):
    whole, tail = order(position=position), order(first_step=first_step, position=position)
    assert tail == whole[first_step * position.num_micro_batches :]


def test_epochs_and_seeds_are_ordered_differently():
    epochs = order(num_images=64, batch_size=64, total_steps=3) + order(num_images=64, batch_size=64, seed=1)
    orders = [[index for _, index in batch] for batch in epochs]
    assert all(sorted(indices) == list(range(64)) for indices in orders)
    assert len({tuple(indices) for indices in orders}) == len(orders)


# Crops


def test_crops_do_not_depend_on_the_workers_nor_on_what_was_drawn_before():
    source = open_source("shapes:24", image_size=(24, 24))
    made = []
    for workers in (0, 2):
        torch.manual_seed(workers)
        steps = TrainingOrder(24, batch_size=8, first_step=0, total_steps=6, seed=0, position=Position())
        made.append(list(training_batches(training_images(source), steps, workers=workers, pin_memory=False)))
    assert len(made[0]) == len(made[1]) == 6
    for alone, shared in zip(*made):
        assert torch.equal(alone.images, shared.images)


def test_crop_is_a_function_of_seed_epoch_and_index():
    images = training_images(Memory())
    assert torch.equal(images[0, 3][0], images[0, 3][0])
    crops = [training_images(Memory(), seed=seed)[epoch, 3][0] for seed in range(3) for epoch in range(3)]
    assert len({crop.numpy().tobytes() for crop in crops}) == 9


def test_cropping_leaves_the_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    training_images(Memory())[0, 0]
    assert torch.equal(torch.get_rng_state(), before)


def test_without_crop_the_image_is_only_resized_and_perhaps_mirrored():
    source = Memory(size=(8, 8))
    plain = training_images(source, crop_scale=(1.0, 1.0), flip=False)
    assert torch.equal(plain[0, 3][0], source.images[3])
    flipped = [training_images(source, crop_scale=(1.0, 1.0))[0, i][0] for i in range(20)]
    mirrored = [torch.equal(image, source.images[i].flip(-1)) for i, image in enumerate(flipped)]
    assert all(torch.equal(image, source.images[i]) or mirrored[i] for i, image in enumerate(flipped))
    assert 3 < sum(mirrored) < 17


@pytest.mark.parametrize("size", [(1, 1), (750, 30), (3, 500)])
def test_extreme_images_can_be_cropped(size):
    assert training_images(Memory(2, size=size))[0, 1][0].shape == (3, 8, 8)


# Damage


def test_damaged_image_is_reported_and_the_next_readable_takes_its_place():
    source = Memory(damaged=(4, 19), dark=(5,))
    sample, damaged = read_or_next(source, 4)
    assert torch.equal(sample.image, source.images[6])
    assert damaged == [("image 4", "broken"), ("image 5", "unreadable")]
    assert torch.equal(read_or_next(source, 19)[0].image, source.images[0])
    assert read_or_next(source, 3)[1] == []


def test_batches_keep_their_size_and_say_what_was_damaged():
    source = Memory(16, damaged=(3, 4))
    steps = TrainingOrder(16, batch_size=8, first_step=0, total_steps=2, seed=0, position=Position())
    batches = list(training_batches(training_images(source), steps, workers=0, pin_memory=False))
    assert [len(batch.images) for batch in batches] == [8, 8]
    assert {damage.name for batch in batches for damage in batch.damaged} == {"image 3", "image 4"}


def test_source_of_which_nothing_can_be_read_is_refused():
    with pytest.raises(InputError, match=r"5 images in a row.*image 2: broken"):
        read_or_next(Memory(5, damaged=range(5)), 2)
    with pytest.raises(InputError, match="3 images in a row"):
        read_or_next(Memory(20, damaged=range(10)), 0, patience=3)


# Resizing


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (5, 7), (31, 1), (64, 64), (101, 67), (3, 400)])
@pytest.mark.parametrize("wanted", [(16, 16), (15, 33), (40, 7)])
def test_cover_gives_the_size_and_keeps_masks_binary(size, wanted):
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    assert Cover(wanted)(image).shape == (3, *wanted)
    mask = Cover(wanted)(image[:1] > 100)
    assert mask.dtype == torch.bool
    assert mask.shape == (1, *wanted)


def test_cover_cuts_the_centre_and_leaves_a_fitting_image_alone():
    image = torch.arange(8 * 12).view(1, 8, 12).to(torch.uint8)
    assert torch.equal(Cover((8, 8))(image), image[..., 2:10])
    assert torch.equal(Cover((8, 12))(image), image)


def test_image_and_mask_are_cut_alike():
    """A white disc and its mask still lie on each other after resizing."""
    y, x = torch.meshgrid(torch.arange(90), torch.arange(70), indexing="ij")
    mask = (y - 30) ** 2 + (x - 40) ** 2 < 400
    cover = Cover((32, 32))
    bright = cover((mask * 255).to(torch.uint8).expand(3, -1, -1))[0] > 127
    assert (bright == cover(mask[None])[0]).float().mean() > 0.96


# Statistics


def test_statistics_are_numpys():
    source = Memory(12, channels=5)
    values = source.images.numpy().transpose(1, 0, 2, 3).reshape(5, -1) / 255
    mean, deviation = measure_statistics(source)
    assert np.allclose(mean, values.mean(1))
    assert np.allclose(deviation, values.std(1))


def test_statistics_of_a_large_source_come_from_images_spread_over_it():
    source = Memory(100)
    source.images[:50], source.images[50:] = 0, 255
    assert measure_statistics(source, max_images=10)[0] == pytest.approx((0.5, 0.5, 0.5))


def test_normalise_gives_mean_0_and_deviation_1_and_comes_back():
    source = Memory(12)
    normalise = Normalise(*measure_statistics(source))
    images = normalise(source.images)
    assert torch.allclose(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(images.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4)
    assert torch.allclose(normalise.to_display(images), source.images / 255, atol=1e-5)


# Batches in order


@pytest.mark.parametrize("workers", [0, 2])
def test_ordered_batches_drop_nothing(workers):
    source = Memory(11, size=(8, 8))
    batches = list(ordered_batches(source, size=(8, 8), batch_size=4, workers=workers))
    assert [batch.indices for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert torch.equal(torch.cat([batch.images for batch in batches]), source.images)
    assert torch.equal(torch.cat([batch.masks for batch in batches]), source.images[:, 0] > 128)


def test_ordered_batches_leave_out_the_damaged_and_name_them():
    source = Memory(6, size=(8, 8), damaged=(1, 2, 3))
    batches = list(ordered_batches(source, size=(8, 8), indices=[5, 1, 0, 2, 3], batch_size=3))
    assert [batch.indices for batch in batches] == [[5, 0], []]
    assert torch.equal(batches[0].images, source.images[[5, 0]])
    assert [damage.name for batch in batches for damage in batch.damaged] == ["image 1", "image 2", "image 3"]
    assert len(batches[1].images) == 0


def test_workers_of_evaluations_outlive_a_signal_to_the_process_group():
    before = set(multiprocessing.active_children())
    batches = ordered_batches(Memory(64), size=(8, 8), batch_size=4, workers=1)
    (worker,) = set(multiprocessing.active_children()) - before
    seen = next(batches).indices
    for number in SIGNALS:
        os.kill(worker.pid, number)
    for batch in batches:
        seen += batch.indices
    assert seen == list(range(64))


class Blocked(Memory):
    """Images that are dark while the signals are blocked in the process that reads them."""

    def read(self, index):
        deaf = set(SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return Sample(torch.full((3, 8, 8), 0 if deaf else 255, dtype=torch.uint8), None)


def test_workers_are_born_deaf_to_signals_and_hear_them_once_they_know_what_to_do():
    with signals_held():
        assert set(SIGNALS) <= signal.pthread_sigmask(signal.SIG_BLOCK, [])
        batch = next(ordered_batches(Blocked(4), size=(8, 8), workers=1))
    assert batch.images.min() == 255
    assert not set(SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert next(ordered_batches(Blocked(4), size=(8, 8))).images.min() == 255
