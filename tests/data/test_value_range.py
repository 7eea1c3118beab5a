"""Values that are not 8-bit: one answer for training and data check, and a word about ranges that are not filled."""

import json

import numpy as np
import pytest
import tifffile
import torch

from hardpatch.config.commands import CheckConfig, StatsConfig
from hardpatch.config.config import Config
from hardpatch.config.values import with_fields
from hardpatch.data.images.decode import Decoder
from hardpatch.data.images.value_range import find_depths
from hardpatch.data.sources import open_source
from hardpatch.data.tools import stats
from hardpatch.data.tools.check import check
from hardpatch.runs.build import open_images
from tiny import TINY

torch.set_num_threads(1)

LOWEST = float(np.finfo(np.float32).min)


def write(folder, images):
    folder.mkdir()
    for number, image in enumerate(images):
        tifffile.imwrite(folder / f"{number}.tif", image)
    return str(folder)


def elevations(seed, mark=None, dtype=np.float32):
    """A landscape of 0 to 255, a tenth of it without data."""
    values = (np.random.default_rng(seed).random((32, 32)) * 255).astype(dtype)
    if mark is not None:
        values[:6, :17] = mark
    return values


@pytest.mark.parametrize("mark", [LOWEST, -3.4e38, float(np.finfo(np.float32).max), np.nan, np.inf])
def test_marks_that_are_no_quantity_are_no_data_everywhere(mark, tmp_path, capsys):
    data = write(tmp_path / "dem", [elevations(seed, np.float32(mark)) for seed in range(4)])
    plain = write(tmp_path / "plain", [elevations(seed) for seed in range(4)])
    found = check.run(CheckConfig(data, workers=0))
    low, high = found.value_range
    assert 0 <= low < 5 and 250 < high <= 255  # noqa: PT018
    assert (found.without_data, found.advice) == (4, "")
    assert stats.run(StatsConfig(data, workers=0)).value_range == (low, high)
    config, source = open_images(with_fields(Config(), TINY | {"data": data, "channels": 1}))
    assert config.data.value_range == (low, high)
    assert "mind" not in capsys.readouterr().err
    sample = source.read(0)
    assert sample.valid.float().mean() == pytest.approx(1 - 6 * 17 / 1024)
    whole = Decoder(1, (low, high))((tmp_path / "plain" / "0.tif").read_bytes()).image
    assert torch.allclose(sample.image[0][sample.valid], whole[0][sample.valid])
    assert check.run(CheckConfig(plain, workers=0)).without_data == 0


@pytest.mark.parametrize(("mark", "dtype", "flag"), [
    (-9999, np.float32, "--no-data -9999"),
    (-32768, np.float32, "--no-data -32768"),
    (65535, np.uint16, "--no-data 65535"),
])  # fmt: skip
def test_a_range_that_most_pixels_do_not_fill_is_warned_of_with_the_flag(mark, dtype, flag, tmp_path, capsys):
    images = [elevations(seed, dtype=dtype) for seed in range(4)]
    for image in images:
        image[0, :3] = mark
    data = write(tmp_path / "dem", images)
    found = check.run(CheckConfig(data, workers=0))
    assert flag in found.advice
    open_images(with_fields(Config(), TINY | {"data": data, "channels": 1}))
    assert f"warning: {found.advice}" in capsys.readouterr().err
    stats.run(StatsConfig(data, workers=0))
    assert found.advice in capsys.readouterr().err
    assert check.run(CheckConfig(data, workers=0, no_data=float(mark))).advice == ""
    low, high = find_depths(open_source(data)).value_range[2:]
    open_images(with_fields(Config(), TINY | {"data": data, "channels": 1, "value_range": (low, high)}))
    assert "98 %" not in capsys.readouterr().err


def test_ranges_that_are_filled_are_not_warned_of(tmp_path):
    draw = np.random.default_rng(0)
    for name, image in {
        "even": draw.integers(0, 4096, (32, 32)).astype(np.uint16),
        "bell": draw.normal(size=(32, 32)).astype(np.float32),
        "flat": np.full((32, 32), 7, np.uint16),
    }.items():
        found = check.run(CheckConfig(write(tmp_path / name, [image]), workers=0))
        assert found.advice == "", name
        assert json.dumps(check.as_json(found))
