"""Damage during a run: each image named once, over processes and resumes; a worker that dies named with its image."""

import gc
import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from hardpatch.data.images.decode import Sample
from hardpatch.data.loader.last_read import LastRead
from hardpatch.data.loader.loading import Damage, Position, TrainingImages, TrainingOrder, last_read, training_batches
from hardpatch.data.sources import Source, open_source
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import InputError
from hardpatch.training.meter import Meter
from hardpatch.training.reporting import Reporter
from tiny import TINY, pretrain


@pytest.fixture
def folder(tmp_path):
    """Twenty images, of which number 3 and 11 are damaged."""
    root = tmp_path / "images"
    root.mkdir()
    for number in range(20):
        Image.new("RGB", (40, 40), (number * 9, 99, 20)).save(root / f"{number:02d}.png")
    for number in (3, 11):
        (root / f"{number:02d}.png").write_bytes(b"no image")
    return root


def run(out, folder, **changes):
    values = TINY | {"data": str(folder), "batch_size": 4, "max_damaged": 0.2} | changes
    return pretrain(values.pop("data"), out, **values)


def test_damaged_images_are_kept_with_the_run_and_the_share_is_told(folder, tmp_path, capsys):
    run(tmp_path / "run", folder)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("03.png: no image") == said.count("11.png: no image") == 1
    assert "2 of 20 images (10.00%) were damaged and left out" in said
    rows = (tmp_path / "run" / "damaged.csv").read_text().splitlines()
    assert rows[0] == "path,reason"
    assert len(rows) == 3


def test_after_a_resume_nothing_is_named_twice_and_everything_counts(folder, tmp_path, capsys, monkeypatch):
    after_step = Reporter.after_step

    def stopping(self, meter):
        after_step(self, meter)
        if self.run.state.step == 6:
            self.run.save()
            raise KeyboardInterrupt

    monkeypatch.setattr(Reporter, "after_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", folder, checkpoint_steps=5)
    first = capsys.readouterr().err
    assert first.count("damaged image left out") == 2
    monkeypatch.setattr(Reporter, "after_step", after_step)
    run(tmp_path / "run", folder, checkpoint_steps=5)
    second = capsys.readouterr().err
    assert "damaged image left out" not in second
    assert "2 of 20 images" in " ".join(second.split())


def test_too_much_damage_stops_the_run_and_says_where_all_are_named(folder, tmp_path):
    with pytest.raises(InputError, match=r"at most 5\.0% of the 20 images.*2 are.*damaged\.csv.*--max-damaged"):
        run(tmp_path / "run", folder, max_damaged=0.05)
    assert len((tmp_path / "run" / "damaged.csv").read_text().splitlines()) == 3


class Folder:
    """What a reporter wants of a run folder."""

    damaged_file = "damaged.csv"

    def read_damaged(self):
        return {}

    def save_damaged(self, damaged):
        self.kept = dict(damaged)


def test_of_several_processes_the_main_one_names_each_image_once(monkeypatch, capsys):
    config = SimpleNamespace(run=SimpleNamespace(max_damaged=0.5))
    state = SimpleNamespace(step=3, gate=SimpleNamespace(is_open=lambda: True))
    run = SimpleNamespace(
        folder=Folder(), config=config, state=state, source=range(20), schedule=SimpleNamespace(total_steps=3)
    )
    reporters = [object.__new__(Reporter) for _ in range(2)]
    for reporter, log in zip(reporters, ("log", None)):
        reporter.run, reporter.log, reporter._told = run, log, {}
    meters = [Meter(torch.device("cpu")) for _ in range(2)]
    for meter, found in zip(meters, ({"a": "cut", "b": "empty"}, {"b": "empty", "c": "no image"})):
        meter.damaged = found
    monkeypatch.setattr(Meter, "first_bad_step", lambda self: None)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_objects", lambda item: [meter.damaged for meter in meters])
    for _ in range(2):
        for reporter, meter in zip(reporters, meters):
            reporter.damaged([Damage(*item) for item in meter.damaged.items()])
            reporter.stop_check(meter)
    said = capsys.readouterr().err
    assert [said.count(f"left out: {name}: ") for name in "abc"] == [1, 1, 1]
    assert run.folder.kept == {"a": "cut", "b": "empty", "c": "no image"}


# Workers that die


class Deadly(Source):
    """A source of one deadly image."""

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 12

    def read(self, index):
        if index == 7:
            self.how()
        return Sample(torch.zeros(3, 8, 8, dtype=torch.uint8))

    def name(self, index):
        return f"photos/{index}.jpg"

    def content(self, index):
        raise OSError

    @property
    def labels(self):
        return None


def segfault():
    os.kill(os.getpid(), signal.SIGSEGV)


def leave():
    os._exit(9)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # PyTorch leaves its own files open then
@pytest.mark.parametrize(("how", "cause"), [(segfault, "Segmentation fault"), (leave, "exited unexpectedly")])
def test_a_worker_that_dies_is_named_with_the_image_it_was_reading(how, cause):
    images = TrainingImages(Deadly(how), size=(8, 8), crop_scale=(1, 1), flip=False, seed=0)
    order = TrainingOrder(12, batch_size=4, first_step=0, total_steps=3, seed=0, position=Position())
    with pytest.raises(
        InputError, match=rf"a data worker died \({cause}\) while it read photos/7\.jpg; .*hardpatch data check"
    ) as caught:
        list(training_batches(images, order, workers=1, pin_memory=False))
    del caught
    gc.collect()  # now, as the files are closed with a warning


def test_the_loader_may_notice_a_death_while_it_is_being_explained(monkeypatch):
    """Its signal handler raises wherever the main process is: seen with torch 2.11."""
    images = last_read(TrainingImages(Deadly(leave), size=(8, 8), crop_scale=(1, 1), flip=False, seed=0), 1)
    images._notes[0] = torch.tensor((4711, 7))

    def interrupted(_):
        raise RuntimeError("DataLoader worker (pid 4711) exited unexpectedly with exit code 9. Details are lost")

    monkeypatch.setattr(type(images), "_no_longer_running", interrupted)
    told = images.explained(EOFError())
    assert isinstance(told, InputError)
    assert "a data worker died (exited unexpectedly) while it read photos/7.jpg" in str(told)


class Numbers(Dataset):
    """Without a source."""

    def __getitem__(self, key):
        if key == (0, 2):
            raise RuntimeError("something else")
        return key[1]


def test_other_errors_stay_as_they_are():
    noted = LastRead(Numbers(), 1)
    error = RuntimeError("CUDA out of memory")
    assert noted.explained(error) is error
    assert list(DataLoader(noted, batch_sampler=[[(0, 5), (0, 6)]], num_workers=0)) != []
    dead = RuntimeError("DataLoader worker (pid 4) is killed by signal: Killed. ")
    assert "its first image" in str(noted.explained(dead))
    assert "Killed" in str(noted.explained(dead))


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_connection_that_breaks_because_a_worker_died_names_it(error):
    """What comes instead of PyTorch's word where a worker dies while it hands a batch over."""
    context = multiprocessing.get_context("fork")
    noted = LastRead(Numbers(), 2)
    patient = context.Process(target=time.sleep, args=(60,))
    dying = context.Process(target=time.sleep, args=(0.2,))
    for number, process in enumerate((patient, dying)):
        process.start()
        noted._notes[number] = torch.tensor((process.pid, 40 + number))
    told = noted.explained(error)
    patient.kill()
    patient.join()
    assert "a data worker died (exited unexpectedly) while it read #41;" in str(told)
    alone = LastRead(Numbers(), 1)
    assert alone.explained(error) is error  # no worker ever noted anything
    assert noted.explained(FileNotFoundError()).args == ()


def test_damage_of_a_source_is_the_decoders_reason(folder):
    source = open_source(str(folder))
    images = TrainingImages(source, size=(8, 8), crop_scale=(1, 1), flip=False, seed=0)
    crop = images[0, 3]
    assert [item.name.endswith("03.png") for item in crop.damaged] == [True]
    assert "no image" in crop.damaged[0].reason
    assert np.array_equal(crop.image[:, 0, 0], [36, 99, 20])
