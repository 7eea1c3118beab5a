"""Scenes cut into tiles: every pixel is in one, at its place, with its value."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from hardpatch.data.images.decode import Decoder
from hardpatch.data.sources import open_source
from hardpatch.data.sources.tiles import TiledSource
from hardpatch.data.tools import pack
from hardpatch.data.tools.describe import say_scenes
from hardpatch.data.tools.pack import PackConfig
from hardpatch.runtime.errors import InputError


def places(name):
    """First row and column, from a tile's name."""
    y, x = name.rsplit("_", 2)[1:]
    return int(y[1:]), int(x[1:])


@pytest.mark.parametrize(("height", "width", "tile", "overlap"), [
    (64, 96, 32, 0), (70, 45, 32, 8), (20, 90, 32, 0), (20, 10, 32, 0), (33, 32, 32, 31),
])  # fmt: skip
def test_tiles_cover_the_scene_and_hold_its_pixels(tmp_path, height, width, tile, overlap):
    scene = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(scene).save(tmp_path / "scene.png")
    decoder = Decoder(3)
    source = TiledSource(open_source(str(tmp_path), decoder=decoder), tile=tile, overlap=overlap, decoder=decoder)
    seen = np.zeros((height, width), int)
    for index in range(len(source)):
        y, x = places(source.name(index))
        found = source.read(index).image.permute(1, 2, 0).numpy()
        assert found.shape[:2] == (min(tile, height), min(tile, width))
        np.testing.assert_array_equal(found, scene[y : y + tile, x : x + tile])
        seen[y : y + tile, x : x + tile] += 1
    assert seen.min() == 1
    assert overlap or len(source) == -(-height // tile) * -(-width // tile)


def test_13_bands_of_16_bits_with_labels_and_pixels_without_data(tmp_path):
    for kind in ("sea", "land"):
        (tmp_path / "scenes" / kind).mkdir(parents=True)
        scene = np.random.default_rng(len(kind)).integers(1, 60_000, (40, 70, 13), dtype=np.uint16)
        scene[:10, :10] = 0
        tifffile.imwrite(tmp_path / "scenes" / kind / "a.tif", scene, planarconfig="contig", photometric="minisblack",
                         extratags=[(42113, "s", 0, "0", True)])  # fmt: skip
    result = pack.run(PackConfig(str(tmp_path / "scenes"), str(tmp_path / "out"), tile=32, channels=13, workers=0))
    assert (result.images, result.channels) == (2 * 2 * 3, 13)
    packed = open_source(str(tmp_path / "out/*.tar"), decoder=Decoder(13, value_range=(0, 65535)))
    assert sorted(packed.labels) == ["land"] * 6 + ["sea"] * 6
    first = packed.read(0)
    assert first.image.shape == (13, 32, 32)
    assert not first.valid[:10, :10].any()
    assert first.valid[10:].all()
    again = pack.run(PackConfig(str(tmp_path / "scenes"), str(tmp_path / "out"), tile=32, channels=13, workers=0))
    assert again == result
    with pytest.raises(InputError, match="was packed from other images"):
        pack.run(PackConfig(str(tmp_path / "scenes"), str(tmp_path / "out"), tile=16, channels=13, workers=0))


def test_large_tiles_are_not_made_smaller(tmp_path):
    Image.fromarray(np.zeros((700, 600, 3), np.uint8)).save(tmp_path / "scene.png")
    pack.run(PackConfig(str(tmp_path), str(tmp_path / "out"), tile=300, workers=0))
    packed = open_source(str(tmp_path / "out/*.tar"))
    assert {packed.read(index).image.shape for index in range(len(packed))} == {(3, 300, 300)}


def test_damaged_scenes_are_listed_and_wrong_settings_refused(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "in/good.png")
    (tmp_path / "in/bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    result = pack.run(PackConfig(str(tmp_path / "in"), str(tmp_path / "out"), tile=32, workers=0))
    assert result.images == 4
    assert [damage.name.split("/")[-1] for damage in result.damaged] == ["bad.png_y0_x0"]
    with pytest.raises(InputError, match="overlap: must be smaller than the tile of 32, got 32"):
        pack.run(PackConfig(str(tmp_path / "in"), str(tmp_path / "two"), tile=32, overlap=32, workers=0))
    with pytest.raises(InputError, match="tile: the images must be files"):
        pack.run(PackConfig("shapes:3", str(tmp_path / "three"), tile=32, workers=0))


def test_few_large_scenes_are_told_of_tiles(tmp_path, capsys):
    Image.fromarray(np.zeros((512, 512, 3), np.uint8)).save(tmp_path / "my scene.png")
    source = open_source(str(tmp_path))
    say_scenes(source, f"{tmp_path}/a b", (64, 64))
    said = " ".join(capsys.readouterr().err.split())
    assert "1 images, each of about 64 times 64x64 px" in said
    assert f"data pack '{tmp_path}/a b' --tile 64 --out tiles/" in said
    say_scenes(source, str(tmp_path), (224, 224))
    say_scenes(open_source("shapes:3"), "shapes:3", (8, 8))
    assert not capsys.readouterr().err
