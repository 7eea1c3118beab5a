"""Accuracy pieces against scikit-learn and the formula, few labels, and sources that do not fit."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import precision_recall_fscore_support

from hardpatch.data.sources import open_source
from hardpatch.evaluate.classify.accuracy import (
    count_confusions,
    draw_confusions,
    per_class_accuracy,
    wilson_interval,
)
from hardpatch.evaluate.classify.labelled_images import Subset, choose_per_class, labelled_fingerprint, open_labelled
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.pictures import write_picture
from tiny import tiny_config

torch.set_num_threads(1)


@pytest.mark.parametrize(("correct", "total"), [(0, 7), (1, 1), (3, 10), (50, 2300), (2300, 2300)])
def test_wilson_interval_by_its_formula(correct, total):
    z, p = 1.959963984540054, correct / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    assert wilson_interval(correct, total) == pytest.approx((100 * max(0, centre - half), 100 * min(1, centre + half)))


def test_class_table_equals_scikit_learn():
    generator = np.random.default_rng(0)
    labels, predicted = generator.integers(0, 5, 200), generator.integers(0, 6, 200)
    confusions = count_confusions(predicted, labels, 7)  # 5 never occurs, 6 is never even predicted
    assert confusions.sum() == 200
    assert confusions[2, 4] == ((labels == 2) & (predicted == 4)).sum()
    table = per_class_accuracy(confusions, list("abcdefg"))
    precision, recall, _, support = precision_recall_fscore_support(
        labels, predicted, labels=range(7), zero_division=np.nan
    )
    assert [item.num_images for item in table] == support.tolist()
    for found, expected in (([item.top1 for item in table], recall), ([item.precision for item in table], precision)):
        assert [None if math.isnan(e) else pytest.approx(100 * e) for e in expected] == found
    others = confusions[0].copy()
    others[0] = 0
    assert table[0].mistaken_for == "abcdefg"[others.argmax()]
    assert table[5].mistaken_for == ""


@pytest.mark.parametrize("num_classes", [2, 12, 46, 200])
def test_a_confusion_picture_is_drawn(tmp_path, num_classes):
    confusions = np.eye(num_classes, dtype=np.int64) * 3
    classes = [f"price_${i}_to_$x" for i in range(num_classes)]
    write_picture(draw_confusions(confusions, classes, title="t"), tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as picture:
        assert min(picture.size) > 200


def test_few_labels_are_nested_balanced_and_follow_the_seed():
    labels = list("aabbbabbbaaabbb")
    few, more = (choose_per_class(labels, count, seed=3) for count in (2, 4))
    assert set(few) < set(more)
    assert sorted(labels[i] for i in more) == list("aaaabbbb")
    assert more == sorted(more) == choose_per_class(labels, 4, seed=3)
    assert more != choose_per_class(labels, 4, seed=4)
    with pytest.raises(InputError, match="labels_per_class: must be between 1 and 6, the images of class 'a', got 7"):
        choose_per_class(labels, 7, seed=0)


def test_a_subset_is_a_source_of_its_own():
    whole = open_source("shapes:20", image_size=(32, 32))
    part = Subset(whole, [3, 17])
    assert len(part) == 2
    assert part.labels == [whole.labels[3], whole.labels[17]]
    assert part.groups() == [whole.groups()[3], whole.groups()[17]]
    assert part.name(1) == whole.name(17)
    assert torch.equal(part.read(1).image, whole.read(17).image)
    assert labelled_fingerprint(part) != labelled_fingerprint(Subset(whole, [3, 16]))


def folder_of(path, names, **kinds):
    """One small picture per class, or an array where ``kinds`` gives its number of channels."""
    for name in names:
        (path / name).mkdir(parents=True)
        if channels := kinds.get("channels"):
            np.save(path / name / "0.npy", np.full((channels, 8, 8), len(path.name), np.uint8))
        else:
            Image.new("RGB", (8, 8), (len(path.name), 0, 0)).save(path / name / "0.png")
    return str(path)


def opened(train, val, channels=3):
    grey = (0.5,) * channels
    return open_labelled(train, val, tiny_config(channels=channels, mean=grey, std=grey, image_size=(8, 8)))


def test_labels_differ_only_where_the_classes_do(tmp_path):
    (tmp_path / "a.csv").write_text("path,label\nx.png,1\ny.png,2\n")
    (tmp_path / "b.csv").write_text("path,label\nx.png,2\ny.png,1\n")
    for name in "xy":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    one, other = (open_source(str(tmp_path / name)) for name in ("a.csv", "b.csv"))
    assert labelled_fingerprint(one) != labelled_fingerprint(other)


def test_sources_that_do_not_fit_are_refused(tmp_path):
    train = folder_of(tmp_path / "train", ["10", "9", "cat"])
    assert opened(train, folder_of(tmp_path / "val", ["9", "cat"])).classes == ["9", "10", "cat"]
    with pytest.raises(InputError, match=r"labels: \['dog'\] are not among the training classes"):
        opened(train, folder_of(tmp_path / "more", ["9", "dog"]))
    with pytest.raises(InputError, match=r"val: .*/9' has no labels"):
        opened(train, str(tmp_path / "val" / "9"))
    five = folder_of(tmp_path / "five", ["a", "b"], channels=5)
    others = folder_of(tmp_path / "others", ["a", "b"], channels=5)
    assert opened(five, others, channels=5).classes == ["a", "b"]
    with pytest.raises(
        InputError, match=r"train: the checkpoint's encoder takes 3 channel\(s\), and none of the first 2"
    ):
        opened(five, five)
    with pytest.raises(InputError, match="val: the checkpoint's encoder takes 5"):
        opened(five, train, channels=5)
    (tmp_path / "one.csv").write_text("path,label\ntrain/9/0.png,9\n")
    with pytest.raises(InputError, match=r"train: needs at least two classes, got \['9'\]"):
        opened(str(tmp_path / "one.csv"), str(tmp_path / "one.csv"))
