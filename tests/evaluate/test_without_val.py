"""A folder of train/ and val/ stands for both; without validation images a part of the others is held back."""

import json

import numpy as np
import pytest
from PIL import Image

from hardpatch.cli import main
from hardpatch.config.values import load_config
from tiny import TINY, flags


def call(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    shown = capsys.readouterr()
    assert ended.value.code == 0, shown.err
    return shown


@pytest.fixture
def photos(tmp_path):
    for part, number in (("train", 20), ("val", 5)):
        for kind in ("cat", "dog"):
            folder = tmp_path / "photos" / part / kind
            folder.mkdir(parents=True)
            for index in range(number):
                random = np.random.default_rng([index, number, kind == "cat"])
                Image.fromarray(random.integers(0, 256, (36, 36, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "photos"


def test_pretraining_and_evaluations_take_the_parts(photos, tmp_path, capsys):
    run = tmp_path / "run"
    fields = TINY | {"data": str(photos), "epochs": 1, "knn": True}
    said = call(capsys, "pretrain", "--recipe", "hpm", "--out", run, *flags(fields)).err
    assert "2 classes: cat (20), dog (20)" in said
    config = load_config(run / "config.yaml")
    assert (config.data.data, config.run.val) == (str(photos / "train"), str(photos / "val"))
    few = ["--checkpoint", run, "--device", "cpu", "--json"]
    for words in (["knn", "--k", "3"], ["linear", "--mode", "logistic"]):
        both = json.loads(call(capsys, "evaluate", *words, *few, "--train", photos).out.splitlines()[-1])
        assert (both["num_train"], both["num_val"]) == (40, 10)
        held = json.loads(call(capsys, "evaluate", *words, *few, "--train", photos / "train").out.splitlines()[-1])
        assert (held["num_train"], held["num_val"]) == (32, 8)
    again = call(capsys, "pretrain", "--recipe", "hpm", "--out", run, *flags(fields)).err
    assert "holds a finished run" in " ".join(again.split())


def test_the_same_images_for_both_are_flagged_before_any_accuracy(photos, tmp_path, capsys):
    fields = TINY | {"data": str(photos / "train"), "val": str(photos / "train"), "epochs": 1, "knn": True}
    said = " ".join(call(capsys, "pretrain", "--recipe", "hpm", "--out", tmp_path / "run", *flags(fields)).err.split())
    flagged = "val: all 40 images are among the training images"
    assert said.index(flagged) < said.index("step 1/")
    words = ["--checkpoint", tmp_path / "run", "--train", photos / "train", "--val", photos / "train", "--k", "3"]
    assert flagged in " ".join(call(capsys, "evaluate", "knn", *words, "--device", "cpu").err.split())
