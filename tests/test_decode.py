"""The written rules of decoding, and the files that break loaders."""

import csv
import io
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpm.data import decode as decode_module
from hpm.data.decode import DecodeError, decode

SHARED = Path(__file__).parents[2] / "shared" / "data"
MANIFEST = SHARED / "nasty" / "manifest.csv"
NASTY = list(csv.DictReader(MANIFEST.read_text().splitlines())) if MANIFEST.is_file() else []

REFUSED_FOR_NOW = {
    "16bit_le.tif",
    "16bit_be.tif",
    "16bit_rgb.tiff",
    "16bit_grey_trns.png",
    "float32.tiff",
    "lab.tif",
}
"""Whole files that a later version should read: 16-bit, float and Lab."""

POLICY = {
    "truncated_progressive.jpg": "refused",
    "partial_download.jpg": "refused",
    "truncated_last_chunk.png": "refused",
    "text_chunk_bomb.png": "refused",
    "huge_13000x13000_1bit.png": "refused",
    "avif.avif": "either",
}
"""Files for which both answers are fine: ours."""


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def noise(height, width, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def pixels(content, channels=3):
    """Decoded as (H, W, C)."""
    return decode(content, channels).permute(1, 2, 0).numpy()


def made_png(bit_depth, colour_type, rows):
    """A PNG that Pillow itself cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    samples = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type] * bit_depth // 8
    header = struct.pack(">IIBBBBB", len(rows[0]) // samples, len(rows), bit_depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(bands, photometric, extra_samples):
    """A 4×4 TIFF of 8-bit bands."""
    data = bytes(range(bands * 16))
    tags = {
        256: 4,
        257: 4,
        258: [8] * bands,
        259: 1,
        262: photometric,
        277: bands,
        278: 4,
        279: len(data),
        284: 1,
    }
    tags |= {273: 0} | ({338: extra_samples} if extra_samples else {})
    start = 8 + 2 + 12 * len(tags) + 4  # where what does not fit into an entry is
    bits = struct.pack(f"<{bands}H", *tags[258])
    tags[273] = start + len(bits)
    entries = b""
    for tag, value in sorted(tags.items()):
        numbers = value if isinstance(value, list) else [value]
        packed = struct.pack(f"<{len(numbers)}H", *numbers)
        packed = packed if len(packed) <= 4 else struct.pack("<I", start)
        entries += struct.pack("<HHI", tag, 3, len(numbers)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + bits + data


# The rules


def test_rgb_comes_out_as_it_is():
    array = noise(5, 7)
    assert np.array_equal(pixels(encode(Image.fromarray(array))), array)


def test_grey_is_repeated_and_one_channel_is_luminance():
    grey = noise(5, 7, 1)
    assert np.array_equal(pixels(encode(Image.fromarray(grey))), np.repeat(grey[..., None], 3, -1))
    assert np.array_equal(pixels(encode(Image.fromarray(grey)), channels=1)[..., 0], grey)
    colour = noise(5, 7)
    luminance = colour @ np.array([0.299, 0.587, 0.114])
    assert np.abs(pixels(encode(Image.fromarray(colour)), channels=1)[..., 0] - luminance).max() <= 1


def test_black_and_white_are_0_and_255():
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    assert pixels(encode(bits))[0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_palette_is_looked_up_and_its_transparent_entry_is_black():
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 50, 7, 7, 7])
    for x in range(3):
        image.putpixel((x, 0), x)
    assert pixels(encode(image))[0].tolist() == [[10, 20, 30], [200, 100, 50], [7, 7, 7]]
    assert pixels(encode(image, transparency=1))[0].tolist() == [[10, 20, 30], [0, 0, 0], [7, 7, 7]]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparent_pixels_are_laid_on_black(kind):
    array = noise(4, 4, 4)
    array[0, 0, 3], array[1, 1, 3] = 0, 255
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    result = pixels(encode(Image.fromarray(array), kind, **options)).astype(int)
    assert np.abs(result - array[..., :3] * (array[..., 3:] / 255)).max() <= 1
    assert result[0, 0].tolist() == [0, 0, 0]
    assert result[1, 1].tolist() == array[1, 1, :3].tolist()


def test_cmyk_is_converted_not_inverted():
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert np.abs(pixels(encode(cyan, "JPEG", quality=95)).astype(int) - [0, 255, 255]).max() <= 5


@pytest.mark.parametrize(("orientation", "turn"), [(6, lambda a: np.rot90(a, -1)), (2, np.fliplr)])
def test_exif_orientation_is_applied(orientation, turn):
    array = noise(4, 6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(encode(Image.fromarray(array), exif=exif)), turn(array))


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "lime", "blue")]
    content = encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)
    with Image.open(io.BytesIO(content)) as check:
        assert check.n_frames == 3
    assert np.array_equal(pixels(content), np.array(frames[0]))


def test_one_pixel_image():
    assert pixels(encode(Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]]]


def test_arrays_with_many_channels_in_both_layouts():
    array = noise(6, 5, 13)
    wanted = torch.from_numpy(array.transpose(2, 0, 1).copy())
    assert torch.equal(decode(as_npy(array), 13), wanted)
    assert torch.equal(decode(as_npy(array.transpose(2, 0, 1)), 13), wanted)
    assert torch.equal(decode(as_npy(np.asfortranarray(array)), 13), wanted)
    assert torch.equal(decode(as_npy(array[..., 0]), 1), wanted[:1])


# The refusals


@pytest.mark.parametrize("array", [noise(4, 4).astype(np.uint16), noise(4, 4).astype(np.float32), noise(4, 4) > 9])
def test_arrays_of_other_types_are_refused_by_name(array):
    with pytest.raises(DecodeError, match=str(array.dtype)):
        decode(as_npy(array), 3)


@pytest.mark.parametrize("shape", [(4, 5, 2), (4, 5), (3, 4, 5, 3), (0, 5, 3), (3, 0, 5)])
def test_arrays_of_other_shapes_are_refused(shape):
    with pytest.raises(DecodeError):
        decode(as_npy(np.zeros(shape, np.uint8)), 3)


def test_arrays_of_objects_are_not_unpickled():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(DecodeError):
        decode(buffer.getvalue(), 3)


def test_a_picture_cannot_have_13_channels():
    with pytest.raises(DecodeError, match="13 channels"):
        decode(encode(Image.new("RGB", (4, 4))), 13)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_refused(kind):
    with pytest.raises(DecodeError, match="I;16"):
        decode(encode(Image.fromarray(noise(4, 4, 1).astype(np.uint16) * 9), kind), 3)


@pytest.mark.parametrize(("bands", "photometric"), [(2, 1), (4, 2)], ids=["grey + 1", "RGB + infrared"])
def test_bands_that_are_neither_colour_nor_alpha_are_not_dropped_in_silence(bands, photometric):
    assert decode(tiff(bands - 1, photometric, []), 3).shape == (3, 4, 4)
    with pytest.raises(DecodeError, match="bands"):
        decode(tiff(bands, photometric, [0]), 3)


@pytest.mark.parametrize("colour_type", [2, 4, 6])
def test_16_bit_colour_png_keeps_the_high_byte(colour_type):
    samples = {2: 3, 4: 2, 6: 4}[colour_type]
    content = made_png(16, colour_type, [b"\xff\xff" * samples * 2] * 2)
    assert pixels(content).tolist() == [[[255, 255, 255]] * 2] * 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_files_are_refused(kind, share):
    content = encode(Image.fromarray(noise(40, 40)), kind)
    with pytest.raises(DecodeError):
        decode(content[: int(len(content) * share)], 3)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x93NUMPY", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused(content):
    with pytest.raises(DecodeError):
        decode(content, 3)


def test_too_many_pixels_are_refused_before_decoding(monkeypatch):
    content = encode(Image.new("L", (40, 30)))
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 1200)
    assert decode(content, 1).shape == (1, 30, 40)
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 1199)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DecodeError, match="40x30"):
        decode(content, 1)


# Files of the wild


@pytest.mark.skipif(not NASTY, reason=f"{MANIFEST} is not there")
@pytest.mark.parametrize("row", NASTY, ids=lambda row: row["file"])
def test_nasty_file_is_loaded_or_refused_with_a_reason(row):
    content = (SHARED / "nasty" / "files" / row["file"]).read_bytes()
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            image = decode(content, 3)
        outcome, reason = "loaded", "none needed"
        assert image.shape[0] == 3
        assert image.numel() > 0
    except DecodeError as error:
        outcome, reason = "refused", str(error)
    assert reason
    assert time.perf_counter() - start < 2
    wanted = {"reject": "refused", "load": "loaded"} | {"policy": POLICY.get(row["file"])}
    if wanted[row["expectation"]] != "either":
        assert outcome == ("refused" if row["file"] in REFUSED_FOR_NOW else wanted[row["expectation"]])


@pytest.mark.skipif(not (SHARED / "scientific").is_dir(), reason=f"{SHARED / 'scientific'} is not there")
@pytest.mark.parametrize("folder", ["s2_multiband", "microscopy16"])
def test_scientific_images_are_refused_rather_than_clipped(folder):
    files = sorted((SHARED / "scientific" / folder).glob("*.tif"))
    assert files
    for file in files:
        with pytest.raises(DecodeError, match="16 bits"):
            decode(file.read_bytes(), 3)
