"""The ``next:`` line of a run runs as printed, whatever the images are called and look like."""

import shlex

import numpy as np
import pytest
from PIL import Image

from hardpatch.cli import main
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
