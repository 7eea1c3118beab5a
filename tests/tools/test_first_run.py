"""A run without a recipe: what is not given comes from the images and the machine, once."""

import numpy as np
import pytest
from PIL import Image

import hardpatch
from hardpatch.cli import main
from hardpatch.config.recipes import recipe
from hardpatch.config.values import load_config, with_fields
from hardpatch.runtime.errors import InputError
from hardpatch.tools import first_run
from tiny import TINY

QUICK = {"figures": False, "knn": False, "device": "cpu", "workers": 0}


def save_images(folder, number, size, dtype=np.uint8):
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(number):
        values = random.integers(0, np.iinfo(dtype).max, size).astype(dtype)
        Image.fromarray(values).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize(
    ("number", "size", "dtype", "expected"),
    [
        (24, (40, 40, 3), np.uint8, {"image_size": (40, 40), "patch_size": 4, "channels": 3}),
        (1, (64, 64), np.uint16, {"image_size": (64, 64), "patch_size": 8, "channels": 1}),
        (3, (160, 128, 3), np.uint8, {"image_size": (128, 128), "patch_size": 16, "channels": 3}),
    ],
    ids=["small", "one grey of 16 bits", "few and larger"],
)
def test_sizes_come_from_the_images(tmp_path, capsys, number, size, dtype, expected):
    data = save_images(tmp_path / "images", number, size, dtype)
    hardpatch.pretrain(data, tmp_path / "run", budget="1s", **QUICK)
    said = capsys.readouterr().err
    for line in ("chosen: ", "because: ", "time: about "):
        assert line in said
    config = load_config(tmp_path / "run" / "config.yaml")
    found = {"image_size": config.data.size, "patch_size": config.model.patch_size, "channels": config.data.channels}
    assert found == expected
    assert config.optimisation.batch_size <= number


def test_what_is_given_holds(tmp_path):
    main_fields = TINY | {"data": "shapes:48"}
    data = main_fields.pop("data")
    hardpatch.pretrain(data, tmp_path / "run", **main_fields)
    config = load_config(tmp_path / "run" / "config.yaml")
    assert config == with_fields(config, main_fields)
    assert config.method == recipe(first_run.PlanConfig.method).method


def test_a_run_goes_on_with_what_was_chosen_when_it_began(tmp_path, monkeypatch, capsys):
    data = save_images(tmp_path / "images", 24, (40, 40, 3))
    words = ["pretrain", "--data", str(data), "--out", str(tmp_path / "run"), "--budget", "1s", "--no-knn",
             "--no-figures", "--device", "cpu", "--workers", "0"]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    monkeypatch.setattr(first_run, "propose", None)  # nothing is timed again
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(InputError, match="another config"):
        hardpatch.pretrain(data, tmp_path / "run", mask_ratio=0.5, **QUICK)


def test_a_config_is_taken_as_it_is(tmp_path):
    config = with_fields(recipe("mae"), TINY | {"data": "shapes:48"})
    hardpatch.pretrain("shapes:24", tmp_path / "run", config=config)
    assert load_config(tmp_path / "run" / "config.yaml").method == config.method


def test_what_takes_far_longer_than_the_budget_is_said_before_any_work(tmp_path, capsys):
    data = save_images(tmp_path / "images", 24, (40, 40, 3))
    hardpatch.pretrain(data, tmp_path / "run", budget="1s", epochs=2, **QUICK)
    said = capsys.readouterr().err
    assert said.index("far more than 1s") < said.index("24 images, 2 epochs of")


@pytest.mark.parametrize(("fields", "message"), [
    ({"budget": "soon"}, "budget: must be a number above 0"),
    ({"budget": "1h", "config": "run.yaml"}, "budget: chooses sizes and length, and config has chosen them"),
    ({"budget": "1h", "recipe": "hpm-64px"}, "recipe: beside a budget it must be METHOD"),
    ({"recipe": "hpm", "config": "run.yaml"}, "recipe, config: give one, not both"),
    ({"mask_ratio": 2.0}, "mask_ratio"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused_before_images_are_looked_at(tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        hardpatch.pretrain("/nothing", tmp_path / "run", **fields)


def test_several_processes_need_a_start(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="recipe: several processes need one"):
        hardpatch.pretrain("shapes:48", tmp_path / "run")
