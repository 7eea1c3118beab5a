"""Runs on images that are not 8-bit: ranges are found, pixels without data are left out, results are kept."""

import json

import numpy as np
import pytest
import tifffile
import torch

from hardpatch.config.commands import EmbedConfig
from hardpatch.data.loader.loading import TrainingImages
from hardpatch.embed import embed
from hardpatch.runs.build import open_images
from hardpatch.runs.load import LoadedRun
from hardpatch.runtime.errors import InputError
from hardpatch.training.pretrain import train
from tiny import tiny_config

NOTHING = -999


@pytest.fixture
def scenes(tmp_path):
    """Sixteen 5-band 16-bit scenes whose left third is no data."""
    folder = tmp_path / "scenes"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(16):
        bands = random.integers(100, 3000, (5, 48, 60), dtype=np.int16)
        bands[4] //= 1000
        bands[:, :, :20] = NOTHING
        tifffile.imwrite(folder / f"{number}.tif", bands, planarconfig="separate", photometric="minisblack")
    return folder


def told(scenes, **fields):
    return tiny_config(data=str(scenes), channels=5, mean=(), std=(), no_data=NOTHING, val="", knn=False, **fields)


def test_range_and_statistics_are_found_without_the_pixels_that_are_no_data(scenes):
    config, source = open_images(told(scenes))
    assert config.data.value_range[0] in (0, 100)
    assert 2990 <= config.data.value_range[1] < 3000
    assert all(0 <= mean <= 1 for mean in config.data.mean)
    sample = source.read(3)
    assert sample.image.dtype == torch.float32
    assert not sample.valid[:, :20].any()
    assert sample.valid[:, 20:].all()
    whole = torch.cat([(source.read(i).image / 255)[:, source.read(i).valid] for i in range(16)], dim=1)
    torch.testing.assert_close(whole.mean(1), torch.tensor(config.data.mean), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole.std(1), torch.tensor(config.data.std), atol=1e-4, rtol=1e-3)


def test_crops_carry_what_is_no_data(scenes):
    _, source = open_images(told(scenes))
    images = TrainingImages(source, size=(32, 32), crop_scale=(0.5, 1.0), flip=False, seed=0)
    shares = [float(images[0, i].valid.float().mean()) for i in range(16)]
    assert 0.3 < np.mean(shares) < 0.95


@pytest.mark.parametrize("method", [{}, {"masks_per_image": 2},
                                    {"decoded_share": 0.5, "predictor_view": "both"}])  # fmt: skip
def test_a_run_on_scenes_with_borders_learns_and_keeps_what_it_found(scenes, tmp_path, method):
    config = told(scenes, image_size=(32, 32), target="norm_pix", epochs=4, figures=not method, **method)
    result = train(config, tmp_path / "run")
    assert np.isfinite(result["reconstruction_loss"])
    saved = LoadedRun(tmp_path / "run").config.data
    assert saved.value_range == open_images(config)[0].data.value_range
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(r["loss"]) for r in records if "loss" in r)
    assert method or list((tmp_path / "run/figures").glob("*.png"))
    again = train(config, tmp_path / "run")
    assert again["steps"] == result["steps"], "the same command goes on with the same ranges"


def test_a_file_may_name_its_no_data_itself(scenes, tmp_path):
    """As GDAL writes it: the same run as with the flag."""
    other = tmp_path / "other"
    other.mkdir()
    for file in scenes.iterdir():
        bands = tifffile.imread(file)
        tifffile.imwrite(other / file.name, bands, planarconfig="separate", photometric="minisblack",
                         extratags=[(42113, "s", 0, str(NOTHING), True)])  # fmt: skip
    given, named = told(scenes, image_size=(32, 32), epochs=2), told(other, image_size=(32, 32), epochs=2)
    named = tiny_config(**{**vars(named.data), **vars(named.model), **vars(named.method), **vars(named.optimisation),
                           **vars(named.run), "no_data": None})  # fmt: skip
    first, second = train(given, tmp_path / "a"), train(named, tmp_path / "b")
    assert first["reconstruction_loss"] == second["reconstruction_loss"]


@pytest.mark.parametrize("wrong", [(1.0,), (2.0, 1.0), (1.0, 2.0, 3.0)])
def test_a_range_that_is_none_is_refused(scenes, wrong):
    with pytest.raises(InputError, match="value_range: must be a lower and a higher number"):
        told(scenes, value_range=wrong)


def test_difficulty_leaves_out_what_is_no_data(scenes, tmp_path):
    """Patches with a pixel without data are NaN, and an image is as hard as its patches with data are."""
    train(told(scenes, image_size=(32, 32), epochs=1), tmp_path / "run")
    config = EmbedConfig(
        checkpoint=str(tmp_path / "run"), data=str(scenes), out=str(tmp_path / "table.npz"), hardness=True,
        batch_size=4, device="cpu",
    )  # fmt: skip
    embed.run(config)
    table = np.load(tmp_path / "table.npz")
    error = table["reconstruction_error"]
    whole = np.isfinite(error)
    assert 0.2 < whole.mean() < 0.9
    np.testing.assert_array_equal(np.isfinite(table["predicted_loss"]), whole)
    np.testing.assert_allclose(table["difficulty"], np.nanmean(error.reshape(16, -1), axis=1), rtol=1e-5)
    assert np.isfinite(table["contrast"]).all()


def test_the_range_that_was_found_is_told_and_mixed_depths_are_warned_of(scenes, tmp_path, capsys):
    open_images(told(scenes))
    told_alone = capsys.readouterr().err
    assert "values that are not 8-bit: 0 to 2" in told_alone or "values that are not 8-bit: 100 to 2" in told_alone
    assert "some images are 8-bit" not in told_alone
    np.save(scenes / "shallow.npy", np.zeros((5, 48, 60), np.uint8))
    open_images(told(scenes))
    assert "some images are 8-bit and some are deeper" in capsys.readouterr().err


def test_pages_are_no_bands_and_the_refusal_says_so(tmp_path):
    (tmp_path / "pages").mkdir()
    for number in range(3):
        pages = np.ones((13, 8, 8), np.uint16)
        tifffile.imwrite(tmp_path / "pages" / f"{number}.tif", pages, photometric="minisblack")
    with pytest.raises(InputError, match=r"has 1 band, which cannot be read as 13 channels: of its 13 pages or frames"):
        open_images(tiny_config(data=str(tmp_path / "pages"), channels=13, mean=(), std=(), val="", knn=False))
