"""Caches change nothing but the time: the same crops, the same damage, shared by processes, on any device."""

import fcntl
import gc
import io
import json
import multiprocessing
import os
import pickle
import signal
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hardpatch.cli import main
from hardpatch.data.images import jpeg
from hardpatch.data.images.decode import RGB, DecodeError, Decoder, Sample
from hardpatch.data.loader import cache as caching
from hardpatch.data.loader import device as on_device
from hardpatch.data.loader.cache import SharedImages, estimate, open_cache
from hardpatch.data.loader.device import (
    ImagesOnDevice,
    WholeImages,
    batches_decoded_on_device,
    batches_kept_on_device,
    copied_behind,
)
from hardpatch.data.loader.loading import Batch, Position, TrainingImages, TrainingOrder, last_read, training_batches
from hardpatch.data.sources import FileSource, Source, open_source
from hardpatch.runtime.errors import InputError
from hardpatch.training.meter import Meter
from tiny import TINY, assert_same_state, final_state, flags

torch.set_num_threads(1)


class Kinds(Source):
    """8-bit and float images of several sizes, some with pixels that are no data, one damaged; counts its reads."""

    def __init__(self, *, floats=True, damaged=(5,)):
        rng = np.random.default_rng(0)
        self.samples, self.reads, self.damaged = [], [], set(damaged)
        for number in range(16):
            height, width = 20 + 3 * number, 50 - 2 * number
            image = torch.from_numpy(rng.integers(0, 256, (3, height, width), np.uint8))
            valid = torch.from_numpy(rng.random((height, width)) > 0.1) if number % 4 == 1 else None
            self.samples.append(Sample(image.float() * 2 - 100 if floats and number % 4 == 3 else image, None, valid))

    def __len__(self):
        return len(self.samples)

    def read(self, index):
        self.reads.append(index)
        if index in self.damaged:
            raise DecodeError("broken")
        return self.samples[index]

    def name(self, index):
        return f"image {index}"

    def content(self, index):
        return b""

    @property
    def labels(self):
        return None


def order(total_steps=6, *, num_images=16, batch_size=8):
    return TrainingOrder(
        num_images, batch_size=batch_size, first_step=0, total_steps=total_steps, seed=0, position=Position()
    )


def training(source, **changed):
    return TrainingImages(source, **({"size": (16, 16), "crop_scale": (0.2, 1.0), "flip": True, "seed": 0} | changed))


def batches(source, steps=6, *, workers=0, **changed):
    return list(training_batches(training(source, **changed), order(steps), workers=workers, pin_memory=False))


def same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b):
        assert one.images.dtype == other.images.dtype
        assert torch.equal(one.images, other.images)
        assert one.damaged == other.damaged
        assert (one.valid is None) == (other.valid is None)
        assert one.valid is None or torch.equal(one.valid, other.valid)


def photographs(folder, sizes, **options):
    rng = np.random.default_rng(1)
    paths = []
    for number, (width, height) in enumerate(sizes):
        small = Image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8))
        paths.append(folder / f"{number}.jpg")
        small.resize((width, height), Image.Resampling.BICUBIC).save(paths[-1], **({"quality": 90} | options))
    return paths


def opened(paths, decoder):
    return FileSource([str(path) for path in paths], decoder=decoder)


# In RAM


def test_what_is_put_comes_back_to_the_bit():
    source, room = Kinds(), SharedImages(16, 10**6)
    for index, sample in enumerate(source.samples):
        assert room.get(index) is None
        room.put(index, sample)
    for index, sample in enumerate(source.samples):
        kept = room.get(index)
        assert torch.equal(kept.image, sample.image)
        assert (kept.valid is None) == (sample.valid is None)
        assert kept.valid is None or torch.equal(kept.valid, sample.valid)


def test_crops_are_the_same_and_later_epochs_read_nothing():
    plain, source = Kinds(), Kinds()
    room = SharedImages(16, 10**6)
    same(batches(source, cache=room), batches(plain))
    seen = len(source.reads)
    again = batches(source, cache=room)
    assert set(source.reads[seen:]) == {5}  # the damaged one is tried again, and reported again
    same(again, batches(plain))


def test_what_does_not_fit_is_read_anew():
    source, plain = Kinds(), Kinds()
    room = SharedImages(16, 20_000)
    same(batches(source, cache=room), batches(plain))
    assert 0 < sum(room.get(index) is not None for index in range(16)) < 15


def test_workers_fill_and_use_the_same_room():
    source, room = Kinds(), SharedImages(16, 10**6)
    filled = batches(source, 2, workers=2, cache=room)
    assert source.reads == []  # the workers did
    assert all(room.get(index) is not None for index in range(16) if index != 5)
    same(filled, batches(Kinds(), 2))
    source.damaged = set(range(16))
    later = batches(source, 2, workers=2, cache=room)
    assert torch.equal(later[0].images, filled[0].images) or 5 in [k for b in order(1) for _, k in b]


def _put(room, index):
    room.put(index, Sample(torch.full((3, 40, 50), index, dtype=torch.uint8)))


def _put_by_name(room, index):
    _put(pickle.loads(room), index)


def test_processes_that_are_not_related_share_a_room():
    """As training processes of one machine do: the room travels as the name of a file in memory."""
    room = SharedImages(40, 10**6)
    assert pickle.loads(pickle.dumps(room)).path == room.path
    process = multiprocessing.get_context("fork").Process(target=_put_by_name, args=(pickle.dumps(room), 1))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert torch.equal(room.get(1).image, torch.full((3, 40, 50), 1, dtype=torch.uint8))


def _fill(room, first):
    for index in range(first, 200, 2):
        _put(room, index)


def test_two_processes_never_write_to_the_same_place():
    room = SharedImages(200, 200 * 6016)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_fill, args=(room, first)) for first in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    for index in range(200):
        assert room.get(index).image.unique().tolist() == [index]


def _hold(path, held, enough):
    with Path(path).open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        held.set()
        enough.wait(10)


def test_a_place_is_taken_by_one_process_at_a_time():
    room = SharedImages(2, 10**5)
    context = multiprocessing.get_context("fork")
    held, enough = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(room.path, held, enough))
    process.start()
    held.wait(10)
    writer = threading.Thread(target=_put, args=(room, 1))
    writer.start()
    writer.join(0.2)
    assert writer.is_alive()
    assert room.get(1) is None
    enough.set()
    writer.join(10)
    process.join()
    assert room.get(1) is not None


def test_a_reopened_room_holds_what_was_put():
    room = SharedImages(2, 10**5)
    _put(room, 1)
    assert torch.equal(pickle.loads(pickle.dumps(room)).get(1).image, room.get(1).image)


def test_large_jpegs_that_are_decoded_at_a_fraction_are_not_kept(tmp_path):
    """So that the cache changes nothing: with it and without, large ones come at a fraction, small ones whole."""
    source = opened(photographs(tmp_path, [(90, 70), (30, 28), (31, 200), (64, 64)] * 4), RGB)
    room = SharedImages(16, 10**6)
    same(batches(source, cache=room), batches(source))
    same(batches(source, cache=room), batches(source))
    assert [room.get(index) is not None for index in range(4)] == [False, True, True, False]
    same(batches(source, cache=room, jpeg_scaling=False), batches(source, jpeg_scaling=False))


def test_auto_keeps_what_fits(tmp_path, monkeypatch):
    source = opened(photographs(tmp_path, [(30, 28)] * 20), RGB)
    need = estimate(source, size=(16, 16), jpeg_scaling=True)
    assert need.kept == 1
    assert need.bytes == pytest.approx(20 * (30 * 28 * 3 + 64))
    options = {"size": (16, 16), "jpeg_scaling": True}
    assert open_cache(source, "auto", **options).capacity >= need.bytes
    assert open_cache(source, "none", **options) is None
    monkeypatch.setattr(caching, "free_memory", lambda: int(1.9 * need.bytes))
    assert open_cache(source, "auto", **options) is None
    assert open_cache(source, "ram", **options) is not None
    monkeypatch.setattr(caching, "free_memory", lambda: need.bytes)
    with pytest.raises(InputError, match="cache: the decoded images take about"):
        open_cache(source, "ram", **options)


def test_auto_makes_no_room_for_what_would_not_be_kept(tmp_path):
    source = opened(photographs(tmp_path, [(90, 70)] * 20), RGB)
    assert open_cache(source, "auto", size=(16, 16), jpeg_scaling=True) is None
    assert open_cache(source, "auto", size=(16, 16), jpeg_scaling=False) is not None


def test_free_memory_is_some():
    assert 10**6 < caching.free_memory() < 10**14


# On the device (here the processor: the same code)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("crop_scale", [(0.2, 1.0), (1.0, 1.0)])
def test_images_kept_on_the_device_give_the_same_crops(views, crop_scale):
    source = Kinds()
    options = {"views": views, "crop_scale": crop_scale, "jpeg_scaling": False}
    kept = ImagesOnDevice(training(source, **options), device=torch.device("cpu"), workers=0)
    seen = len(source.reads)
    made = list(batches_kept_on_device(kept, order()))
    assert len(source.reads) == seen
    for ours, plain in zip(made, batches(Kinds(), **options)):
        assert ours.damaged == plain.damaged
        assert ours.images.dtype == plain.images.dtype
        assert (ours.images.float() - plain.images.float()).abs().max() <= 60  # noise: clipping in between, see below
        assert (ours.images.float() - plain.images.float()).abs().mean() < 1.5
        assert (ours.valid is None) == (plain.valid is None)
        assert ours.valid is None or torch.equal(ours.valid, plain.valid)


def test_photographs_kept_on_the_device_are_off_by_three_levels_at_most(tmp_path):
    source = opened(photographs(tmp_path, [(60 + i, 50 + 2 * i) for i in range(16)]), RGB)
    images = training(source, jpeg_scaling=False)
    kept = ImagesOnDevice(images, device=torch.device("cpu"), workers=0)
    for ours, plain in zip(batches_kept_on_device(kept, order(2)), batches(source, 2, jpeg_scaling=False)):
        assert (ours.images.int() - plain.images.int()).abs().max() <= 3


def test_device_refuses_what_would_be_decoded_at_a_fraction_or_does_not_fit(tmp_path, monkeypatch):
    source = opened(photographs(tmp_path, [(90, 70)] * 4), RGB)
    with pytest.raises(InputError, match=r"cache: 'device' holds images at full size.*--no-jpeg-scaling"):
        ImagesOnDevice(training(source), device=torch.device("cpu"), workers=0)
    monkeypatch.setattr(on_device, "free_memory", lambda: 1000)
    with pytest.raises(InputError, match="cache: the decoded images take about"):
        ImagesOnDevice(training(source, jpeg_scaling=False), device=torch.device("cpu"), workers=0)


def by_processor(calls, contents, *, channels, device):
    """What stands for the GPU's decoder: many at once, and RuntimeError if one is damaged."""
    calls.append(len(contents))
    found = []
    for content in contents:
        data = content.numpy().tobytes()
        header = jpeg.read_header(data, channels=channels)
        found.append(None if header is None else jpeg.decode(data, header, channels=channels, scale=1))
    if any(image is None for image in found):
        raise RuntimeError("damaged")
    return found


def decoded_on_device(source, steps=2, **changed):
    wholes = last_read(WholeImages(training(source, jpeg_scaling=False, **changed), encoded=True), 0)
    return list(batches_decoded_on_device(wholes, order(steps), device=torch.device("cpu"), workers=0))


def test_jpegs_decoded_by_the_device_give_the_same_crops(tmp_path, monkeypatch):
    paths = photographs(tmp_path, [(60 + i, 50 + 2 * i) for i in range(16)])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(paths[3]).save(paths[3], exif=exif)  # turned by the data process
    Image.open(paths[4]).save(paths[4].with_suffix(".png"))
    paths[4] = paths[4].with_suffix(".png")
    source = FileSource([*map(str, paths)], decoder=RGB)
    calls = []
    monkeypatch.setattr(on_device, "decode_jpegs", partial(by_processor, calls))
    for ours, plain in zip(decoded_on_device(source, views=2), batches(source, 2, views=2, jpeg_scaling=False)):
        assert (ours.images.int() - plain.images.int()).abs().max() <= 3
    assert sum(calls) == 14  # lists of all JPEGs of a batch: what the GPU's decoder is quick with
    assert len(calls) == 2


def test_damage_is_found_where_the_device_decodes(tmp_path, monkeypatch):
    """Cut off: by the data process. What the GPU does not take: the rules decide, and the next one takes its place."""
    monkeypatch.setattr(on_device, "decode_jpegs", partial(by_processor, []))
    paths = photographs(tmp_path, [(60, 50)] * 16)
    paths[2].write_bytes(paths[2].read_bytes()[:-300])
    content = paths[7].read_bytes()
    paths[7].write_bytes(content[:400] + content[-2:])  # ends well, and holds nothing
    source = FileSource([*map(str, paths)], decoder=RGB)
    plain = batches(source, 2, jpeg_scaling=False)
    made = decoded_on_device(source)
    for ours, theirs in zip(made, plain):
        assert sorted(d.name for d in ours.damaged) == sorted(d.name for d in theirs.damaged)
        assert (ours.images.int() - theirs.images.int()).abs().max() <= 3

    def refused(*_, **__):
        raise RuntimeError("nvjpeg: unsupported")

    monkeypatch.setattr(on_device, "decode_jpegs", refused)
    for ours, theirs in zip(decoded_on_device(source), made):
        assert torch.equal(ours.images, theirs.images)


def test_no_data_is_not_given_to_the_devices_decoder(tmp_path):
    source = opened(photographs(tmp_path, [(60, 50)] * 16), Decoder(no_data=0))
    wholes = WholeImages(training(source), encoded=True)
    assert wholes[0, 0].pixels.dim() == 3


def test_batches_are_copied_behind_the_work_on_cuda(monkeypatch):
    """A stream of its own copies; the device waits for it, and the memory is not given away before."""
    told = []

    class Stream:
        def __init__(self, device):
            self.device = device

        def wait_stream(self, other):
            told.append(("wait", other is made[0]))

    class Entered:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            told.append("enter")

        def __exit__(self, *_):
            told.append("leave")

    made, now = [], Stream(None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(Stream(device)) or made[-1])
    monkeypatch.setattr(torch.cuda, "stream", Entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
    monkeypatch.setattr(on_device, "_batch_on", lambda batch, device: told.append("copy") or batch)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: told.append(("record", stream is now)))
    given = [Batch(torch.zeros(1, 3, 2, 2), [], torch.ones(1, 2, 2, dtype=torch.bool))] * 2

    def source():
        yield from given

    assert list(copied_behind(source(), torch.device("cuda"))) == given
    assert told == ["enter", "copy", "leave", ("wait", True), ("record", True), ("record", True)] * 2


# Runs


def run(out, **changes):
    with pytest.raises(SystemExit) as left:
        main(["pretrain", "--recipe", "hpm", "--out", str(out), *flags(TINY | changes)])
    assert left.value.code == 0


def test_runs_with_and_without_a_cache_end_bit_identical(tmp_path, monkeypatch):
    run(tmp_path / "none", cache="none", masks_per_image=2, crops_per_image=2)
    run(tmp_path / "ram", cache="ram", masks_per_image=2, crops_per_image=2)
    assert_same_state(final_state(tmp_path / "none"), final_state(tmp_path / "ram"))


@pytest.mark.parametrize("options", [{"cache": "device"}, {"augmentation": "device"}])
def test_runs_on_images_of_the_device(tmp_path, options):
    run(tmp_path / "run", **options)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 12


def test_crops_and_masks_per_image_count_views(tmp_path, monkeypatch):
    """48 images, 8 views a step: 2 files of 2 crops with 2 masks each; epochs count views."""
    sizes, next_batch = [], Meter.next_batch

    def spied(self, batches):
        batch, damaged = next_batch(self, batches)
        sizes.append(len(batch.images))
        return batch, damaged

    monkeypatch.setattr(Meter, "next_batch", spied)
    views = {"crops_per_image": 2, "masks_per_image": 2}
    run(tmp_path / "whole", **views)
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert (result["steps"], result["samples_seen"]) == (12, 96)
    assert sizes == [4] * 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crops_per_image": 3}, "crops_per_image: times masks_per_image (1) must divide batch_size 8, got 3"),
        ({"crops_per_image": 4, "masks_per_image": 4}, "crops_per_image: times masks_per_image (4) must divide"),
        ({"crops_per_image": 4, "micro_batch_size": 2}, "crops_per_image: times masks_per_image (1) must divide the 2"),
    ],
)
def test_views_that_do_not_divide_are_refused(tmp_path, options, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(["pretrain", "--recipe", "hpm", "--out", str(tmp_path / "run"), *flags(TINY | options)])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


class Deadly(Kinds):
    """Kills the data process that reads image 9."""

    def read(self, index):
        if index == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("views", [1, 2])
def test_a_data_process_that_dies_is_named_with_its_image(views):
    images = training(Deadly(), views=views)
    noted = last_read(images, 1)
    with pytest.raises(InputError, match=r"data worker.*image 9"), noted.naming():
        list(training_batches(images, order(), workers=1, pin_memory=False, noted=noted))
    wholes = last_read(WholeImages(training(Deadly()), encoded=True), 1)
    with pytest.raises(InputError, match=r"data worker.*image 9"), wholes.naming():
        list(batches_decoded_on_device(wholes, order(), device=torch.device("cpu"), workers=1))
    del images, noted, wholes
    gc.collect()  # sockets that PyTorch had open to the dead one are complained of here, not in another test


def test_other_errors_pass_by():
    with pytest.raises(RuntimeError, match="mine"), last_read(training(Kinds()), 1).naming():
        raise RuntimeError("mine")


def test_shapes_are_kept_too():
    source = open_source("shapes:16", image_size=(24, 24))
    room = open_cache(source, "auto", size=(16, 16), jpeg_scaling=True)
    same(batches(source, cache=room), batches(source))
    assert all(room.get(index) is not None for index in range(16))


def test_read_ahead_of_a_header_costs_no_second_read(tmp_path, monkeypatch):
    """One file, one read, whatever the path."""
    source = opened(photographs(tmp_path, [(90, 70), (20, 20)]), RGB)
    reads = []
    content = FileSource.content
    monkeypatch.setattr(FileSource, "content", lambda self, index: (reads.append(index), content(self, index))[1])
    training(source)[0, 0], training(source)[0, 1]
    assert reads == [0, 1]
    assert jpeg.read_header(content(source, 0), channels=3) is not None
    assert io.BytesIO(content(source, 0)).read(2) == b"\xff\xd8"
