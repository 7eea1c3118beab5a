"""Folders that hold train/ and val/, and images that are in both."""

import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from hardpatch.data.sources import open_source
from hardpatch.data.sources.files import folder_layout
from hardpatch.data.sources.layout import Layout, find_layout
from hardpatch.data.tools.parts import find_parts, held_back_by_class, told_classes, warn_of_shared, with_parts
from hardpatch.runtime.errors import InputError


def save(folder, number, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(start, start + number):
        values = np.random.default_rng([index, len(str(folder))]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{index}.png")


@pytest.fixture
def photos(tmp_path):
    for part, number in (("train", 6), ("val", 3)):
        for kind in ("cat", "dog"):
            save(tmp_path / "photos" / part / kind, number)
    return tmp_path / "photos"


@pytest.mark.parametrize(("names", "found"), [
    (["train", "val"], Layout("train", "val", [])),
    (["Train", "Validation"], Layout("Train", "Validation", [])),
    (["train", "valid", "test"], Layout("train", "valid", ["test"])),
    (["train", "test"], Layout("train", "test", [])),
    (["train2017", "val2017"], Layout("train2017", "val2017", [])),
    (["training_set", "test_set"], Layout("training_set", "test_set", [])),
    (["train"], None),
    (["val", "test"], None),
    (["bus", "train", "car"], None),
    (["train", "val", "bus"], None),
    (["train", "training", "val"], None),
    (["trains", "values"], None),
])  # fmt: skip
def test_names_of_parts(names, found):
    assert find_layout(names) == found


def test_classes_are_those_below_the_parts(photos, capsys):
    assert sorted(set(open_source(str(photos)).labels)) == ["cat", "dog"]
    assert find_parts(str(photos), "") == (str(photos / "train"), str(photos / "val"))
    assert "holds train/ and val/: learning from the former, measuring on the latter" in capsys.readouterr().err


def test_what_is_given_as_validation_holds(photos, tmp_path):
    save(tmp_path / "other", 3)
    assert find_parts(str(photos), str(tmp_path / "other")) == (str(photos / "train"), str(tmp_path / "other"))
    fields = {"data": str(photos), "val": str(tmp_path / "other"), "epochs": 3}
    assert with_parts(fields) == fields | {"data": str(photos / "train")}


def test_parts_without_classes_are_not_measured_on(photos, capsys):
    for file in (photos / "val/cat").iterdir():
        file.rename(photos / "val" / file.name)
    assert find_parts(str(photos), "") == (str(photos / "train"), "")
    assert "no folders of classes in both" in capsys.readouterr().err


def test_relative_paths_and_links_stay_as_they_were_written(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(photos)
    for name in ("photos", "photos/", "./photos", "link"):
        parts = find_parts(name, "")
        assert [len(open_source(part)) for part in parts] == [12, 6]
    monkeypatch.chdir(photos)
    assert find_parts(".", "") == ("train", "val")


def test_folders_without_images_and_our_own_do_not_matter(photos):
    (photos / "annotations").mkdir()
    (photos / "annotations/all.json").write_text("{}")
    save(photos / "runs", 2)
    (photos / "runs/.hardpatch").write_text("*\n")
    assert folder_layout(photos) == Layout("train", "val", [])
    assert sorted(set(open_source(str(photos)).labels)) == ["cat", "dog"]


def test_other_folders_beside_them_make_classes_and_a_word_of_it(photos, capsys):
    save(photos / "bus", 2)
    assert folder_layout(photos) is None
    assert sorted(set(open_source(str(photos)).labels)) == ["bus", "train", "val"]
    assert "bus, train, val: all are taken for classes" in " ".join(capsys.readouterr().err.split())


def test_a_saved_data_set_is_no_folder_of_parts(photos):
    (photos / "dataset_dict.json").write_text("{}")
    assert folder_layout(photos) is None


def test_a_share_of_every_class_is_held_back():
    labels = ["cat"] * 10 + ["dog"] * 2 + ["cow"] * 5
    kept, held = held_back_by_class(labels)
    assert sorted(kept + held) == list(range(17))
    assert sorted(labels[place] for place in held) == ["cat", "cat", "cow", "dog"]
    assert held_back_by_class(labels) == (kept, held)
    with pytest.raises(InputError, match="class 'one' has one image"):
        held_back_by_class([*labels, "one"])


def test_images_in_both_are_found_by_their_bytes(photos, tmp_path, capsys):
    train, val = (str(photos / part) for part in ("train", "val"))
    assert warn_of_shared(open_source(train), open_source(val)) == 0
    shutil.copy(photos / "train/cat/3.png", photos / "val/dog/renamed.png")
    assert warn_of_shared(open_source(train), open_source(val)) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 7 images are among the training images" in said
    assert "renamed.png" in said
    assert warn_of_shared(open_source(train), open_source(train)) == 12
    assert warn_of_shared(open_source("shapes:8"), open_source("shapes:4")) == 4
    said = " ".join(capsys.readouterr().err.split())
    assert "val: all 12 images are among the training images" in said
    assert "accuracies say nothing of other images" in said
    assert warn_of_shared(open_source("shapes:8"), open_source("shapes:4@1")) == 0


def test_damaged_images_are_not_the_same_and_shards_are_compared(photos, tmp_path, capsys):
    train, val = photos / "train", photos / "val"
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(train / "cat/3.png", "3.png")
        archive.add(val / "cat/2.png", "4.png")
    assert warn_of_shared(open_source(str(train)), open_source(str(tmp_path / "a.tar"))) == 1
    for part in (train, val):
        (part / "cat/broken.png").symlink_to(tmp_path / "nowhere.png")
    capsys.readouterr()
    assert warn_of_shared(open_source(str(train)), open_source(str(val))) == 0
    assert not capsys.readouterr().err


def test_too_many_to_read_are_told_of(photos, monkeypatch, capsys):
    monkeypatch.setattr("hardpatch.data.tools.parts.MOST_READ", 3)
    sources = [open_source(str(photos / part)) for part in ("train", "val")]
    monkeypatch.setattr(type(sources[0]), "num_bytes", lambda self, index: 7)
    assert warn_of_shared(*sources) == 0
    assert "not compared with the training images" in " ".join(capsys.readouterr().err.split())


def test_classes_are_told_with_their_numbers(photos):
    assert told_classes(open_source(str(photos / "train"))) == "2 classes: cat (6), dog (6)"
    assert told_classes(open_source(str(photos / "train/cat"))) == "no classes are known"
