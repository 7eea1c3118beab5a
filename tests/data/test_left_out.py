"""What a source holds and is not read is said; kinds of files that people bring are called by their names."""

import contextlib
import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from fuzzing import dicom, pillow
from hardpatch.cli import main
from hardpatch.config.commands import PackConfig, StatsConfig
from hardpatch.config.config import Config
from hardpatch.config.evaluations import ForegroundConfig
from hardpatch.config.values import with_fields
from hardpatch.data.images.decode import DecodeError, Decoder, describe
from hardpatch.data.sources import open_source
from hardpatch.data.tools import pack, stats
from hardpatch.data.tools.describe import say_what_is_left
from hardpatch.evaluate import foreground
from hardpatch.evaluate.classify.labelled_images import open_labelled
from hardpatch.evaluate.dense import segment_data
from hardpatch.evaluate.dense.class_masks import MaskRules
from hardpatch.evaluate.dense.coco import instances_from_masks
from hardpatch.runtime.errors import InputError
from hardpatch.training import preparation
from tiny import TINY, tiny_config

torch.set_num_threads(1)

PICTURE = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)


def saved(kind, **options):
    file = io.BytesIO()
    frames = [Image.fromarray(np.roll(PICTURE, step, 0)) for step in (0, 5, 11)]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
    return file.getvalue()


def written(array, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


MORE = {
    "composite.tif": written(np.zeros((3, 32, 32), np.uint8), imagej=True, metadata={"axes": "CYX"}),
    "stack.tif": written(np.zeros((5, 32, 32), np.uint16), imagej=True),
    "pages.tiff": saved("TIFF"),
    "film.gif": saved("GIF"),
    "film.webp": saved("WEBP"),
    "film.png": saved("PNG"),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_more_in_a_file_than_is_read_is_said_once(name, tmp_path, capsys):
    for number in range(4):
        (tmp_path / f"{number}{name}").write_bytes(MORE[name])
    (tmp_path / "plain.png").write_bytes(pillow(PICTURE, "PNG"))
    preparation._open_alike(with_fields(Config(), TINY | {"data": str(tmp_path), "channels": 3}), torch.device("cpu"))
    said = capsys.readouterr().err
    assert said.count("4 of 5 images looked at have several pages or frames") == 1
    assert f"0{name} has {describe(MORE[name]).frames}" in said


def test_every_command_that_reads_says_it(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        (tmp_path / "photos" / folder / "1.gif").write_bytes(MORE["film.gif"])
    data = str(tmp_path / "photos")
    for read in (
        lambda: stats.run(StatsConfig(data, workers=0)),
        lambda: pack.run(PackConfig(data, str(tmp_path / "packed"), workers=0)),
        lambda: open_labelled(data, data, run=tiny_config()),
        lambda: foreground._open(ForegroundConfig("", data), tiny_config(), (32, 32)),
        lambda: segment_data._open(data, str(tmp_path / "packed"), "", MaskRules(), Decoder(3), (32, 32)),
        lambda: instances_from_masks(Path(data), tmp_path / "packed", decoder=Decoder(3)),
    ):
        with contextlib.suppress(InputError):  # there are no masks
            read()
        assert "several pages or frames" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.heic", b"x", "1 .heic"),
    ("a.JP2", b"x", "1 .jp2"),
    ("IM0001", dicom(np.zeros((32, 32), np.uint16)), "1 without an ending"),
    ("scan", pillow(PICTURE, "PNG"), "(PNG)"),
])  # fmt: skip
def test_files_left_out_for_their_endings_are_said(name, content, said, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="left out by their endings"):
        open_source(str(tmp_path))
    (tmp_path / "plain.png").write_bytes(pillow(PICTURE, "PNG"))
    say_what_is_left(open_source(str(tmp_path)))
    assert said in capsys.readouterr().err


def test_files_that_nobody_means_as_images_are_not_said(tmp_path, capsys):
    for name in ("README", "labels.csv", "notes.txt", "plain.png"):
        (tmp_path / name).write_bytes(pillow(PICTURE, "PNG") if name == "plain.png" else b"text")
    say_what_is_left(open_source(str(tmp_path)))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("content", "said"), [
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC is not read"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000 is not read"),
    (b"%PDF-1.7", "PDF is not read"),
    (written(np.zeros((8, 8), np.complex64)), "complex numbers"),
    (written(np.zeros((8, 8), np.complex128)), "complex numbers"),
])  # fmt: skip
def test_kinds_that_are_not_read_are_called_by_their_names(content, said):
    with pytest.raises(DecodeError, match=said):
        Decoder(1)(content)


@pytest.mark.parametrize("meta", [True, False])
def test_dicom_without_its_preamble_is_read_as_what_it_is(meta):
    array = np.random.default_rng(0).integers(0, 4096, (20, 30), dtype=np.uint16)
    whole = dicom(array)
    bare = whole[132:]
    if not meta:  # group 2 says its own length
        assert bare[:8] == b"\2\0\0\0UL\4\0"
        bare = bare[12 + struct.unpack_from("<I", bare, 8)[0] :]
    assert describe(bare).format == "DICOM"
    assert torch.equal(Decoder(1)(bare).image, Decoder(1)(whole).image)


def palette_tiff(index, alpha, palette):
    """By hand: tifffile and Pillow write none."""
    pixels = np.stack([index, alpha], -1).tobytes()
    tags = [
        (256, 3, 1, index.shape[1]), (257, 3, 1, index.shape[0]), (258, 3, 2, 8 | 8 << 16), (259, 3, 1, 1),
        (262, 3, 1, 3), (273, 4, 1, 8), (277, 3, 1, 2), (278, 3, 1, index.shape[0]), (279, 4, 1, len(pixels)),
        (284, 3, 1, 1), (320, 3, 768, 8 + len(pixels)), (338, 3, 1, 2),
    ]  # fmt: skip
    body = pixels + palette.astype("<u2").tobytes()
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(body))
    return head + body + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_a_palette_with_alpha_in_a_tiff():
    index = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    alpha = np.full((16, 16), 255, np.uint8)
    alpha[:4] = 0
    palette = np.random.default_rng(1).integers(0, 256, (3, 256), dtype=np.uint16) * 257
    content = palette_tiff(index, alpha, palette)
    about, sample = describe(content), Decoder(3)(content)
    assert (about.bands, about.alpha, about.mode) == (3, True, "palette")
    assert sample.valid.tolist() == (alpha > 0).tolist()
    wanted = (palette // 257).astype(np.uint8)[:, index]
    assert (sample.image.numpy()[:, 4:] == wanted[:, 4:]).all()


def test_one_stray_image_above_the_folders_of_the_classes_is_named(tmp_path):
    for name in ("a/1.png", "b/1.png", "stray.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(pillow(PICTURE, "PNG"))
    with pytest.raises(InputError, match=r"1 of 3 images lie beside the folders of the classes, 'stray\.png'"):
        open_labelled(str(tmp_path), str(tmp_path), run=tiny_config())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(InputError, match="out: cannot write"):
        pack.run(PackConfig("shapes:3", str(tmp_path / "closed" / "out"), workers=0))


@pytest.mark.parametrize("number", ["EROFS", "EACCES", "EPERM"])
def test_a_disk_that_cannot_be_written_to_is_no_traceback(number, tmp_path, monkeypatch, capsys):
    import errno

    def refuse(*_, **__):
        raise OSError(getattr(errno, number), "not here", str(tmp_path / "out"))

    monkeypatch.setattr(pack, "Claim", refuse)
    with pytest.raises(SystemExit) as left:
        main(["data", "pack", "shapes:3", "--out", str(tmp_path / "out"), "--workers", "0"])
    assert left.value.code == 2
    assert "out: cannot write" in capsys.readouterr().err
    monkeypatch.setattr("hardpatch.data.tools.stats.measure", refuse)
    with pytest.raises(SystemExit) as left:
        main(["data", "stats", "shapes:3", "--workers", "0"])
    assert left.value.code == 2
