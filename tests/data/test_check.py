"""``hardpatch data check``: what it counts, names and survives."""

import csv
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fuzzing
from hardpatch.cli import main
from hardpatch.config.commands import CheckConfig
from hardpatch.data.images.decode import Decoder, Sample
from hardpatch.data.sources import open_source
from hardpatch.data.sources.drawn_shapes import make_shape
from hardpatch.data.tools.check import check, look
from hardpatch.data.tools.check.duplicates import groups_of_equal, groups_of_near
from hardpatch.data.tools.check.sheet import displayed
from hardpatch.data.tools.check.workers import look_at_all
from places import SHARED

NASTY = SHARED / "data" / "nasty"


def call(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        main(["data", "check", *map(str, words)])
    printed = capsys.readouterr()
    return caught.value.code or 0, printed.out, printed.err


@pytest.fixture
def folder(tmp_path):
    """Nine images of six kinds, two copies, a rotated one, three damaged ones, two that are no images."""
    root = tmp_path / "images"
    (root / "deep").mkdir(parents=True)
    rgb = make_shape(0, 3, 60, 80).image
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "a.png": fuzzing.pillow(rgb, "PNG"),
        "b.jpg": fuzzing.pillow(rgb, "JPEG", quality=90),
        "copy of a.png": fuzzing.pillow(rgb, "PNG"),
        "turned.jpg": fuzzing.pillow(np.rot90(rgb).copy(), "JPEG", exif=exif),
        "grey.png": fuzzing.pillow(np.random.default_rng(1).integers(0, 256, (40, 40), np.uint8), "PNG"),
        "clear.png": fuzzing.pillow(np.zeros((10, 30, 4), np.uint8), "PNG"),
        "deep/bands.tif": fuzzing.tiff(
            fuzzing.picture(30, 40, 5, dtype=np.uint16), photometric="minisblack", planarconfig="contig"
        ),
        "deep/float.npy": fuzzing.npy(np.linspace(-2, 9, 600, dtype=np.float32).reshape(20, 30)),
        "film.gif": fuzzing.seeds()["gif"],
        "cut.jpg": fuzzing.pillow(rgb, "JPEG")[:900],
        "empty.png": b"",
        "page.jpg": b"<html>404</html>",
        "README.md": b"hello",
        "deep/labels.csv": b"1,2",
        ".hidden": b"no",
    }
    for name, content in files.items():
        (root / name).write_bytes(content)
    return root


def test_everything_is_counted_and_named(capsys, folder, tmp_path):
    code, out, _ = call(capsys, folder, "--out", tmp_path / "out", "--workers", "2", "--json")
    assert code == 0, "damaged files are no fault of the call"
    found = json.loads(out.splitlines()[-1])
    assert (found["files"], found["loaded"]) == (14, 9)
    assert {Path(item["path"]).name for item in found["damaged"]} == {"cut.jpg", "empty.png", "page.jpg"}
    assert all(item["reason"] for item in found["damaged"])
    assert [Path(name).name for name in found["skipped"]] == ["README.md", "labels.csv"]
    assert found["channels"] == {"3": 6, "1": 2, "5": 1}
    assert found["depths"] == {"8-bit": 7, "16-bit": 1, "32-bit float": 1}
    assert found["sizes"]["80x60"] == 4, "the turned one is upright"
    assert (found["alpha"], found["turned"], found["animated"], found["without_data"]) == (1, 1, 1, 1)
    assert found["value_range"] == [-2, 60000]
    assert [[Path(name).name for name in group] for group in found["duplicates"]] == [["a.png", "copy of a.png"]]
    near = [[Path(name).name for name in group] for group in found["near_duplicates"]]
    assert near == [["a.png", "b.jpg", "turned.jpg"]]
    assert [Path(name).name for name in found["constant"]] == ["clear.png"]
    for word in (
        "cut.jpg",
        "README.md",
        "copy of a.png",
        "deep/",
        "hardpatch pretrain --data",
    ):
        assert word in out

    written = tmp_path / "out"
    assert json.loads((written / "check.json").read_text()) == found
    rows = list(csv.DictReader((written / "images.csv").read_text().splitlines()))
    assert len(rows) == 12
    bands = next(row for row in rows if row["path"].endswith("bands.tif"))
    assert (bands["width"], bands["height"], bands["channels"], bands["depth"]) == ("40", "30", "5", "16-bit")
    assert float(bands["highest"]) == 60000
    with Image.open(written / "contact_sheet.png") as sheet:
        assert sheet.width > 500
        assert len(np.unique(np.asarray(sheet.convert("RGB")).reshape(-1, 3), axis=0)) > 1000

    good = open_source(str(written / "good.txt"))
    names = {Path(good.name(number)).name for number in range(len(good))}
    assert len(names) == len(good) == 8, "neither damaged files nor the copy"


def test_with_channels_it_reads_as_a_run_would(capsys, folder):
    _, out, _ = call(capsys, "--data", folder, "--channels", "3", "--workers", "0", "--json")
    damaged = {Path(item["path"]).name: item["reason"] for item in json.loads(out.splitlines()[-1])["damaged"]}
    assert damaged.keys() == {"cut.jpg", "empty.png", "page.jpg", "bands.tif"}
    assert "5 bands" in damaged["bands.tif"]


def test_any_source(capsys, folder, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(str(folder / name) for name in ("a.png", "cut.jpg")))
    for spec, loaded in ((listed, 1), ("shapes:5", 5)):
        _, out, _ = call(capsys, spec, "--workers", "1", "--out", tmp_path / "out", "--json")
        found = json.loads(out.splitlines()[-1])
        assert (found["loaded"], found["skipped"]) == (loaded, [])


def test_nothing_that_can_be_read(capsys, tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    code, out, _ = call(capsys, tmp_path, "--workers", "0", "--out", tmp_path / "out")
    assert code == 0
    assert "no file could be read" in out


@pytest.mark.parametrize(("words", "message"), [
    (["nowhere"], "does not exist"),
    (["{folder}", "--out", "{folder}/a.png"], "out: must be a folder"),
])  # fmt: skip
def test_wrong_input_is_named(capsys, folder, words, message):
    code, _, err = call(capsys, *(word.format(folder=folder) for word in words))
    assert code == 2
    assert message in err


# Workers that die


def fatal(number):
    """Dies of 5, never ends with 11, leaves at 20."""
    if number == 5:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 11:
        time.sleep(100)
    if number == 20:
        os._exit(7)
    return number, ""


@pytest.mark.parametrize("workers", [1, 3])
def test_a_file_that_kills_its_worker_is_named_and_the_others_are_looked_at(workers):
    found = dict(look_at_all(fatal, 40, workers=workers, timeout=0.5, failed=lambda number, why: (number, why)))
    assert sorted(found) == list(range(40))
    assert {number: why for number, why in found.items() if why} == {
        5: "the process that decoded it was killed by SIGSEGV",
        11: "not decoded after 0.5 s",
        20: "the process that decoded it died with exit code 7",
    }


def test_a_crash_of_a_decoder_is_a_damaged_file(folder, monkeypatch):
    def crash(content):
        if content.startswith(b"GIF"):
            os.kill(os.getpid(), signal.SIGSEGV)
        return describe(content)

    describe = look.describe
    monkeypatch.setattr(look, "describe", crash)
    found = check.run(CheckConfig(str(folder), workers=2))
    reasons = {Path(item.name).name: item.reason for item in found.damaged}
    assert reasons["film.gif"] == "the process that decoded it was killed by SIGSEGV"
    assert found.loaded == 8


# Duplicates


def slow_groups(hashes, most):
    """Every pair; groups by repainting."""
    colours = list(range(len(hashes)))
    for i, first in enumerate(hashes):
        for j, second in enumerate(hashes[:i]):
            if (int(first) ^ int(second)).bit_count() <= most and colours[i] != colours[j]:
                colours = [colours[j] if colour == colours[i] else colour for colour in colours]
    return {frozenset(group) for group in groups_of_equal(colours)}


@pytest.mark.parametrize("most", [0, 1, 4, 7])
def test_near_groups_are_those_of_all_pairs(most):
    draw = np.random.default_rng(most)
    centres = draw.integers(0, 2**63, 20, dtype=np.uint64)
    hashes = centres[draw.integers(0, 20, 150)]
    for _ in range(4):
        flip = draw.random(150) < 0.6
        hashes[flip] ^= np.uint64(1) << draw.integers(0, 64, flip.sum(), dtype=np.uint64)
    found = {frozenset(group) for group in groups_of_near(hashes, most=most)}
    assert found == slow_groups(hashes, most)
    assert groups_of_near(hashes[:1], most=most) == []


def test_near_groups_of_many_images_take_seconds():
    draw = np.random.default_rng(0)
    hashes = draw.integers(0, 2**63, 100_000, dtype=np.uint64)
    hashes[-1000:] = hashes[:1000] ^ np.uint64(5)
    start = time.perf_counter()
    assert len(groups_of_near(hashes, most=3)) >= 1000
    assert time.perf_counter() - start < 20


def test_the_hash_sees_what_the_eye_sees():
    array = make_shape(0, 3, 90, 120).image
    first = look.perceptual_hash(Decoder()(fuzzing.pillow(array, "PNG")))
    smaller = Image.fromarray(array).resize((60, 45))
    for content in (
        fuzzing.pillow(array, "JPEG", quality=60),
        fuzzing.pillow(np.asarray(smaller), "PNG"),
        fuzzing.npy(array.astype(np.uint16) * 100),
    ):
        assert (look.perceptual_hash(Decoder()(content)) ^ first).bit_count() <= 6
    other = look.perceptual_hash(Decoder()(fuzzing.pillow(array[:, ::-1].copy(), "PNG")))
    assert (other ^ first).bit_count() > 10
    assert look.perceptual_hash(Sample(torch.full((3, 9, 9), 7, dtype=torch.uint8))) is None


# The sheet


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_any_image_is_displayed(channels, dtype):
    image = torch.from_numpy(fuzzing.picture(50, 100, channels)).permute(2, 0, 1)
    image = image if dtype == torch.uint8 else image.float() * 0.01 - 300
    shown = displayed(Sample(image), side=20)
    assert shown.shape == (10, 20, 3)
    assert shown.std() > 20
    if channels == 1:
        assert (shown[..., 0] == shown[..., 2]).all()


def test_a_flat_and_a_tiny_image_are_displayed():
    assert displayed(Sample(torch.full((5, 1, 1), 3.0)), side=20).shape == (20, 20, 3)
    assert displayed(Sample(torch.zeros(1, 3, 900)), side=20).shape == (1, 20, 3)


@pytest.mark.skipif(not NASTY.is_dir(), reason=f"{NASTY} is not there")
def test_the_table_agrees_with_the_manifest_of_nasty_files(capsys, tmp_path):
    with (NASTY / "manifest.csv").open(newline="") as file:
        wanted = {row["file"]: row for row in csv.DictReader(file)}
    _, out, _ = call(capsys, NASTY, "--out", tmp_path, "--json")
    found = json.loads(out.splitlines()[-1])
    damaged = {Path(item["path"]).name for item in found["damaged"]}
    assert found["files"] == 42 + len(found["skipped"])
    assert found["loaded"] == 42 - len(damaged)
    assert {Path(name).name for name in found["skipped"]} >= {"README.md", "manifest.csv"}
    for name, row in wanted.items():
        assert row["expectation"] == "policy" or (name in damaged) == (row["expectation"] == "reject"), name
    rows = {Path(row["path"]).name: row for row in csv.DictReader((tmp_path / "images.csv").read_text().splitlines())}
    for name, row in wanted.items():
        if name not in damaged:
            width, height = row["size"].split("x")
            turned = row["exif_orientation"] in ("5", "6", "7", "8")
            size = (height, width) if turned else (width, height)
            assert (rows[name]["width"], rows[name]["height"]) == size, name
            assert rows[name]["format"] == row["format"], name
            assert rows[name]["frames"] == row["frames"], name
            assert rows[name]["orientation"] == (row["exif_orientation"] or "1"), name
    assert found["value_range"][1] >= 694


def test_the_own_files_of_a_saved_data_set_are_no_strangers(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    pictures = [Image.fromarray(np.full((8, 8, 3), 9 * number, np.uint8)) for number in range(4)]
    data = datasets.Dataset.from_dict({"image": pictures}, features=datasets.Features({"image": datasets.Image()}))
    data.save_to_disk(str(tmp_path / "saved"))
    found = check.run(CheckConfig(str(tmp_path / "saved"), workers=0))
    assert (found.loaded, found.skipped) == (4, [])
