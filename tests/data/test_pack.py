"""``hardpatch data pack``: small images as they are, large ones smaller, verified, and after a kill the same bytes."""

import io
import json
import multiprocessing
import os
import signal
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

from hardpatch.cli import main
from hardpatch.config.commands import PackConfig
from hardpatch.data.images.decode import Decoder
from hardpatch.data.sources import open_source
from hardpatch.data.tools import pack
from hardpatch.runtime.errors import InputError

torch.set_num_threads(1)


def smooth(width, height, seed=0, mode="RGB"):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize((width, height)).convert(mode)


@pytest.fixture
def photographs(tmp_path):
    """Two classes; the last one damaged."""
    for number in range(30):
        folder = tmp_path / "photos" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        smooth(60 + 5 * number, 90, number).save(folder / f"{number:02d}.jpg", quality=92)
    (tmp_path / "photos" / "class1" / "99.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    return tmp_path / "photos"


def settings(data, out, **changed):
    return PackConfig(str(data), str(out), **({"size": 48, "shard_bytes": 20_000, "workers": 0} | changed))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_hold_the_images_smaller_with_their_labels(photographs, tmp_path):
    result = pack.run(settings(photographs, tmp_path / "out"))
    assert (result.images, result.as_they_were, result.labelled) == (30, 0, True)
    assert [damage.name.endswith("99.jpg") for damage in result.damaged] == [True]
    assert len(result.shards) > 2
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    for shard in index["shards"]:
        file = tmp_path / "out" / shard["name"]
        assert file.stat().st_size == shard["bytes"] <= 20_000 + 10_240
        with tarfile.open(file) as archive:
            assert sum(name.endswith(".jpg") for name in archive.getnames()) == shard["samples"]
    source, packed = open_source(str(photographs)), open_source(str(tmp_path / "out" / "*.tar"))
    assert len(packed) == 30
    assert list(packed.labels) == list(source.labels)[:30]
    for number in range(30):
        image, original = packed.read(number).image, source.read(number).image
        assert min(image.shape[1:]) == 48
        assert image.shape[2] / image.shape[1] == pytest.approx(original.shape[2] / original.shape[1], rel=0.03)
        wanted = torch.nn.functional.interpolate(
            original[None].float(), image.shape[1:], mode="bicubic", antialias=True
        )[0]
        assert (image.float() - wanted).abs().mean() < 4


def test_small_images_are_taken_as_they_are(photographs, tmp_path):
    result = pack.run(settings(photographs, tmp_path / "out", size=64))
    assert result.as_they_were == 1  # 60x90
    packed, source = open_source(str(tmp_path / "out" / "*.tar")), open_source(str(photographs))
    assert packed.content(0) == source.content(0)
    assert packed.content(1) != source.content(1)


def test_other_kinds_keep_their_type_their_alpha_and_their_gaps(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "arrays"
    folder.mkdir()
    deep = (rng.random((5, 100, 80)) * 60000).astype(np.uint16)
    deep[:, :50] = 7
    floats = rng.random((100, 80, 5)).astype(np.float32)
    floats[60:, 40:] = np.nan
    np.save(folder / "a.npy", deep)
    np.save(folder / "b.npy", floats)
    np.save(folder / "c.npy", rng.integers(0, 256, (5, 100, 80), np.uint8))
    pack.run(settings(folder, tmp_path / "out", size=40, no_data=7.0))
    packed = open_source(str(tmp_path / "out" / "*.tar"), decoder=Decoder(5, no_data=7.0))
    stored = [np.load(io.BytesIO(packed.content(index))) for index in range(3)]
    assert [array.dtype for array in stored] == [np.uint16, np.float32, np.uint8]
    assert all(array.shape == (5, 50, 40) for array in stored)
    assert (stored[0][:, :24] == 7).all()
    assert stored[0][:, 26:].min() > 7
    assert np.isnan(stored[1][:, 31:, 21:]).all()
    assert np.isfinite(stored[1][:, :29]).all()
    samples = [packed.read(index) for index in range(3)]
    assert samples[0].valid.float().mean() == pytest.approx(0.5, abs=0.03)
    assert samples[1].valid.float().mean() == pytest.approx(0.8, abs=0.03)
    assert samples[2].valid is None


def test_transparency_stays(tmp_path):
    folder = tmp_path / "clear"
    folder.mkdir()
    picture = smooth(100, 80).convert("RGBA")
    picture.putalpha(Image.fromarray(np.repeat(np.arange(100, dtype=np.uint8)[None] * 2, 80, 0)))
    picture.save(folder / "a.png")
    pack.run(settings(folder, tmp_path / "out", size=40))
    packed = open_source(str(tmp_path / "out" / "*.tar"))
    with Image.open(io.BytesIO(packed.content(0))) as made:
        assert (made.mode, made.size, made.format) == ("RGBA", (50, 40), "PNG")
    assert (packed.read(0).image.float() - open_source(str(folder)).read(0).image[:, ::2, ::2].float()).abs().mean() < 8


def test_made_images_are_packed_too(tmp_path):
    result = pack.run(settings("shapes:6", tmp_path / "out", size=32))
    assert (result.images, result.labelled) == (6, True)
    assert open_source(str(tmp_path / "out" / "*.tar")).read(3).image.shape == (3, 32, 32)


@pytest.mark.parametrize("workers", [2])
def test_the_number_of_processes_changes_nothing(photographs, tmp_path, workers):
    pack.run(settings(photographs, tmp_path / "one"))
    pack.run(settings(photographs, tmp_path / "two", workers=workers))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def _pack_slowly(data, out):
    repack = pack.repack

    def slow(*a, **k):
        time.sleep(0.02)
        return repack(*a, **k)

    pack.repack = slow
    pack.run(settings(data, out))


@pytest.mark.parametrize("shards_first", [0, 1, 2])
def test_after_a_kill_it_goes_on_and_ends_with_the_same_bytes(photographs, tmp_path, shards_first):
    pack.run(settings(photographs, tmp_path / "whole"))
    out = tmp_path / "killed"
    process = multiprocessing.get_context("fork").Process(target=_pack_slowly, args=(photographs, out))
    process.start()
    while len(list(out.glob("*.tar"))) < shards_first or not list(out.glob("*.part")):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (out / "index.json").exists()
    pack.run(settings(photographs, out))
    assert contents(out) == contents(tmp_path / "whole")


DAMAGES = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[1]",
    "another number": lambda text: text.replace('"next_image": 0', '"next_image": 8'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_note_of_what_was_done_costs_time_alone(photographs, tmp_path, damage):
    pack.run(settings(photographs, tmp_path / "whole"))
    out = tmp_path / "begun"
    out.mkdir()
    about = json.loads((tmp_path / "whole/index.json").read_text())
    progress = {"shards": [], "next_image": 0, "as_they_were": 0, "damaged": []}
    pack._save(out / pack.PROGRESS, progress | {name: about[name] for name in ("source", "settings")})
    text = (out / pack.PROGRESS).read_text()
    assert DAMAGES[damage](text) != text
    (out / pack.PROGRESS).write_text(DAMAGES[damage](text))
    pack.run(settings(photographs, out))
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["empty", "cut", "a list"])
def test_a_damaged_index_is_refused(photographs, tmp_path, damage):
    pack.run(settings(photographs, tmp_path / "out"))
    index = tmp_path / "out/index.json"
    index.write_text(DAMAGES[damage](index.read_text()))
    with pytest.raises(InputError, match=r"out: .*index\.json' is damaged; remove the folder and start over"):
        pack.run(settings(photographs, tmp_path / "out"))


def test_a_finished_folder_says_so_and_other_settings_are_refused(photographs, tmp_path):
    first = pack.run(settings(photographs, tmp_path / "out"))
    before = contents(tmp_path / "out")
    assert pack.run(settings(photographs, tmp_path / "out")) == first
    assert contents(tmp_path / "out") == before
    with pytest.raises(InputError, match=r"out: .* was packed from other settings"):
        pack.run(settings(photographs, tmp_path / "out", size=32))
    with pytest.raises(InputError, match=r"out: .* was packed from other images"):
        pack.run(settings("shapes:3", tmp_path / "out"))


@pytest.mark.parametrize("damage", ["missing", "a flipped bit"])
def test_a_shard_that_is_not_what_was_written_is_named(photographs, tmp_path, damage):
    pack.run(settings(photographs, tmp_path / "out"))
    shard = next((tmp_path / "out").glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[600] ^= 4
    shard.unlink() if damage == "missing" else shard.write_bytes(content)
    with pytest.raises(InputError, match="is not what was written"):
        pack.run(settings(photographs, tmp_path / "out"))


def test_a_folder_of_something_else_is_left_alone(photographs, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(InputError, match=r"holds 'thesis\.txt'"):
        pack.run(settings(photographs, tmp_path / "mine"))


def test_what_does_not_read_back_is_not_given_its_name(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "_digest", lambda path: "of other bytes")
    with pytest.raises(InputError, match="does not read back"):
        pack.run(settings(photographs, tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.tar"))


def test_command_and_its_json(photographs, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as left:
        main(["data", "pack", str(photographs), "--out", str(out), "--size", "48", "--workers", "0", "--json"])
    assert left.value.code == 0
    printed = capsys.readouterr().out.splitlines()
    found = json.loads(printed[-1])
    assert (found["images"], len(found["damaged"]), found["labelled"]) == (30, 1, True)
    assert printed[-2].startswith(f"next:  hardpatch pretrain --data '{out}/*.tar'")
    assert len(open_source(str(out / "*.tar"))) == 30
