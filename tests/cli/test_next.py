"""The ``next:`` line of a run runs as printed, whatever the images are called and look like."""

import shlex
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from hardpatch.cli import main
from hardpatch.cli.flags import parse
from hardpatch.config.dense_evaluations import DetectConfig, SegmentConfig
from hardpatch.config.evaluations import FinetuneConfig
from hardpatch.evaluate.result import command_of
from tiny import TINY, flags


def save(folder, number, size, dtype=np.uint8):
    folder.mkdir(parents=True)
    random = np.random.default_rng(len(str(folder)))
    for index in range(number):
        values = random.integers(0, np.iinfo(dtype).max, size).astype(dtype)
        Image.fromarray(values).save(folder / f"{index}.png")


def command(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    shown = capsys.readouterr()
    assert ended.value.code == 0, shown.err
    return shown.out


@pytest.mark.slow
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(
    ("name", "size", "dtype", "channels"),
    [
        ("plain", (40, 40, 3), np.uint8, 3),
        ("two words $5 'x'", (40, 40, 3), np.uint8, 3),
        ("grey", (33, 47), np.uint8, 1),
        ("deep", (40, 40), np.uint16, 1),
    ],
)
def test_next_runs(tmp_path, monkeypatch, capsys, name, size, dtype, channels, labelled):
    monkeypatch.chdir(tmp_path)
    for part, number in (("train", 15), ("val", 4)):
        for kind in ("a", "b") if labelled else ("",):
            save(tmp_path / name / part / kind, number, size, dtype)
    fields = TINY | {"data": f"{name}/train", "channels": channels, "epochs": 1, "knn": True}
    fields |= {"val": f"{name}/val"} if labelled else {}
    shown = command(["pretrain", "--recipe", "hpm", "--out", f"{name}/run", *flags(fields)], capsys)
    line = next(line for line in shown.splitlines() if line.startswith("next:"))
    words = shlex.split(line.removeprefix("next:"))
    assert words[0] == "hardpatch"
    assert words[1] == ("evaluate" if labelled else "visualize")
    command(words[1:], capsys)


@pytest.mark.parametrize(("name", "config", "changes"), [
    ("finetune", FinetuneConfig("a run", train="it's", val="$v", betas=(0.8, 0.9), flip=False), {"untrained": True}),
    ("segment", SegmentConfig("run", images="i", masks="m", against=("a", "b")), {"head": "upernet", "finetune": True}),
    ("detect", DetectConfig("run", train_images="i", size=64), {"untrained": True}),
])  # fmt: skip
def test_a_command_is_written_as_it_is_parsed(name, config, changes):
    words = shlex.split(command_of(name, config, **changes))
    assert words[:3] == ["hardpatch", "evaluate", name]
    assert parse(type(config), f"evaluate {name}", words[3:])[0] == replace(config, **changes)


def next_of(shown):
    """The words of the ``next:`` line, as a shell has them."""
    line = next(line for line in shown.splitlines() if line.startswith("next:"))
    words = shlex.split(line.removeprefix("next:"), comments=True)
    assert words[0] == "hardpatch"
    return words[1:]


@pytest.mark.slow
def test_next_of_every_command_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for part, number in (("train", 12), ("val", 4)):
        for kind in ("a", "b"):
            save(tmp_path / "my photos" / part / kind, number, (40, 40, 3))
    fields = TINY | {"data": "my photos", "epochs": 1}
    command(["pretrain", "--recipe", "hpm", "--out", "a run", *flags(fields)], capsys)
    few = ["--checkpoint", "a run", "--device", "cpu"]
    small = ["--epochs", "1", "--batch-size", "8", "--workers", "0"]
    dense = [*few, "--epochs", "1", "--batch-size", "4", "--width", "8"]
    for words in (
        ["recipes"],
        ["data", "check", "my photos"],
        ["data", "check", "my photos", "--out", "found"],
        ["data", "pack", "my photos", "--out", "packed", "--size", "32"],
        ["evaluate", "knn", *few, "--train", "my photos", "--k", "3"],
        ["evaluate", "linear", *few, "--train", "my photos", "--mode", "logistic"],
        ["evaluate", "finetune", *few, *small, "--train", "my photos", "--precision", "float32"],
        ["evaluate", "segment", *dense, "--images", "shapes:8", "--val-images", "shapes:4@1"],
        ["evaluate", "detect", *dense, "--train-images", "shapes:8", "--val-images", "shapes:4@1"],
        ["visualize", "--checkpoint", "a run", "--images", "my photos", "--out", "hard.png"],
    ):
        following = next_of(command(words, capsys))
        if following[0] == "pretrain" and "--help-all" not in following:  # as it stands, but for an end of it
            following += ["--recipe", "hpm", *flags({k: v for k, v in fields.items() if k != "data"})]
            following[following.index("--out") + 1] += f"-{len(list(tmp_path.iterdir()))}"
        command(following, capsys)
