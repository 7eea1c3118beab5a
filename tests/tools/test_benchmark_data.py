"""``hardpatch benchmark data``: what it measures is what it says, in turns, with a picture."""

import json

import numpy as np
import pytest
import torch

from hardpatch.cli import main
from hardpatch.config.benchmark import LOADERS, LoadingConfig
from hardpatch.data.sources import open_source
from hardpatch.tools.benchmark import data, step

torch.set_num_threads(1)
SMALL = ["--images=16", "--batch-size=8", "--seconds=0.05", "--rounds=2", "--image-size=32", "--enlarge", "70", "50",
         "--packed-size=40", "--data=shapes:16", "--device=cpu"]  # fmt: skip
ON_CPU = ("plain", "files", "shards", "cache")


def test_command_measures_every_path_beside_the_plain_loader(tmp_path, capsys):
    out = tmp_path / "data.json"
    with pytest.raises(SystemExit) as left:
        main(["benchmark", "data", *SMALL, f"--out={out}", "--json", "--step-images-per-second=1e6"])
    assert left.value.code == 0
    printed = capsys.readouterr().out.splitlines()
    saved = json.loads(out.read_text())
    assert saved == json.loads(printed[-1])
    assert tuple(saved["images_per_second_per_core"]) == ON_CPU
    assert tuple(saved["ratio_to_plain"]) == ON_CPU
    assert saved["ratio_to_plain"]["plain"] == 1
    rounds = saved["images_per_second_per_core_rounds"]
    assert saved["ratio_to_plain"]["files"] == pytest.approx(np.mean(np.array(rounds["files"]) / rounds["plain"]))
    assert "made by resizing images of shapes:16, the first 70x50 px" in printed[0]
    assert any("files: the LOADER limits" in line for line in printed)
    assert out.with_suffix(".png").stat().st_size > 5000


@pytest.mark.parametrize("name", [*LOADERS])
def test_every_path_gives_batches_of_crops(name, tmp_path):
    config = LoadingConfig(batch_size=8, images=16, image_size=32, enlarge=(70, 50), packed_size=40)
    files = data.make_files(open_source("shapes:16", image_size=(50, 70)), config, tmp_path)
    loader = data.endless_batches(name, files, tmp_path, config, torch.device("cpu"))
    for _ in range(4):
        batch = next(loader)
        assert batch.shape == (8, 3, 32, 32)
        assert batch.dtype == (torch.float32 if name == "plain" else torch.uint8)


def test_files_may_be_taken_as_they_are(tmp_path):
    from PIL import Image

    for number in range(8):
        Image.new("RGB", (90, 60), (number, 0, 0)).save(tmp_path / f"{number}.jpg")
    config = LoadingConfig(
        str(tmp_path), images=8, batch_size=8, enlarge=(0, 0), loaders=("files",), seconds=0.01, rounds=1,
        image_size=32, device="cpu",
    )  # fmt: skip
    result = data.run(config)
    assert "as they are" in result["images"]
    assert list(result["ratio_to_plain"]) == ["plain", "files"]
    assert result["ratio_to_plain_std"]["files"] is None
    assert data.verdict(result)[0].startswith("what limits")


def test_the_step_is_measured_on_request(monkeypatch):
    """By ``hardpatch benchmark step``, whose views are M to an image."""
    monkeypatch.setattr(
        step, "run", lambda config: {"device": "here", "images_per_second": {config.variants[0]: 400.0}}
    )
    config = LoadingConfig(
        "shapes:16", images=16, batch_size=8, enlarge=(40, 40), loaders=("files",), seconds=0.01, rounds=1,
        image_size=64, device="cpu", step="shared", encoder="vit_tiny_patch16_224",
    )  # fmt: skip
    found = data.run(config)["step"]
    assert found["masks_per_image"] > 1
    assert found["images_per_second"] == 400 / found["masks_per_image"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "4"], "images: needs at least one batch (8), got 4"),
        (["--loaders", "files", "files"], "loaders: must be different"),
        (["--loaders", "device-cache"], "loaders: device-cache is measured on CUDA only"),
        (["--data", "nowhere"], "'nowhere' does not exist"),
    ],
)
def test_wrong_input_is_one_clear_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(["benchmark", "data", *SMALL, *arguments])
    assert left.value.code == 2
    assert message in capsys.readouterr().err
