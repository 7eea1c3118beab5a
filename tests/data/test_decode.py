"""The written rules of decoding, and the files that break loaders."""

import csv
import io
import re
import struct
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from fuzzing import decode, deep_png
from hardpatch.data.images import stored
from hardpatch.data.images.decode import DecodeError, Decoder, Sample
from hardpatch.runtime.errors import InputError
from places import SHARED

DATA = SHARED / "data"
MANIFEST = SHARED / "nasty" / "manifest.csv"
NASTY = list(csv.DictReader(MANIFEST.read_text().splitlines())) if MANIFEST.is_file() else []

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


# Depth


@pytest.mark.parametrize("dtype", ["u2", "i2", "u4", "i4", "i8", "u8", "i1", "f2", "f4", "f8", ">u2", ">f4"])
def test_every_type_is_scaled_by_its_own_range(dtype):
    dtype = np.dtype(dtype)
    high = 1.0 if dtype.kind == "f" else float(np.iinfo(dtype).max)
    array = (np.random.default_rng(0).random((5, 7, 3)) * high).astype(dtype)
    image = decode(as_npy(array), 3)
    assert image.dtype == torch.float32
    wanted = array.astype(np.float64) * (255 / high)
    assert np.allclose(image.permute(1, 2, 0).numpy(), wanted, rtol=1e-6)


def test_a_value_range_becomes_0_to_255_and_nothing_is_clipped():
    array = np.array([[-1000, 200, 700, 4000]], np.int16)
    sample = Decoder(1, value_range=(200, 700))(as_npy(array))
    assert sample.image.flatten().tolist() == pytest.approx([-612, 0, 255, 1938])
    assert sample.valid is None
    eight = noise(4, 5)
    assert torch.equal(Decoder(3, value_range=(200, 700))(as_npy(eight)).image, decode(as_npy(eight), 3))
    with pytest.raises(InputError, match="value_range"):
        Decoder(1, value_range=(5, 5))


def test_bool_is_0_and_255():
    mask = noise(5, 7, 1) > 99
    assert np.array_equal(pixels(as_npy(mask), 1)[..., 0], np.where(mask, 255, 0))
    assert decode(as_npy(mask), 1).dtype == torch.uint8


def test_grey_is_repeated_and_luminance_taken_in_depth_too():
    deep = np.random.default_rng(0).integers(0, 65536, (5, 7, 3)).astype(np.uint16)
    grey = decode(as_npy(deep[..., 0]), 3)
    assert torch.equal(grey, decode(as_npy(deep[..., 0]), 1).expand(3, -1, -1))
    luminance = deep @ np.array([0.299, 0.587, 0.114]) / 257
    assert np.allclose(pixels(as_npy(deep), 1)[..., 0], luminance, atol=1e-3)
    assert (
        np.abs(pixels(as_npy((deep >> 8).astype(np.uint8)), 1)[..., 0] - (deep >> 8) @ [0.299, 0.587, 0.114]).max() <= 1
    )


# No data


def test_not_a_number_is_no_data_and_gets_the_mean():
    array = np.random.default_rng(0).random((6, 5, 2)).astype(np.float32)
    array[1, 2, 0], array[3, 3, 1], array[0, 0] = np.nan, np.inf, -np.inf
    sample = Decoder(2)(as_npy(array))
    gone = ~np.isfinite(array).all(-1)
    assert np.array_equal(sample.valid.numpy(), ~gone)
    for channel in range(2):
        there = array[..., channel][~gone] * 255
        assert np.allclose(sample.image[channel][sample.valid], there)
        assert np.allclose(sample.image[channel][~sample.valid], there.mean())


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_a_no_data_value_counts_where_all_bands_have_it(dtype):
    array = np.full((4, 4, 3), 7, dtype)
    array[:2] = 100
    array[0, 0], array[0, 1, 1], array[3, 3] = 9, 9, 9
    sample = Decoder(3, no_data=9)(as_npy(array))
    assert (~sample.valid).nonzero().tolist() == [[0, 0], [3, 3]]
    mean = array[sample.valid.numpy()].mean(0) * (
        1 if dtype == np.uint8 else 255 / (1 if dtype == np.float32 else 32767)
    )
    assert np.allclose(sample.image[:, 0, 0], mean.round() if dtype == np.uint8 else mean, rtol=1e-5)
    assert Decoder(3, no_data=10)(as_npy(array)).valid is None
    assert Decoder(3, no_data=9.5)(as_npy(array)).valid is None
    assert Decoder(3, no_data=-1e9)(as_npy(array)).valid is None


def test_an_image_without_any_data_is_refused():
    for array, value in ((np.full((3, 3), np.nan, np.float32), None), (np.zeros((3, 3), np.uint8), 0)):
        with pytest.raises(DecodeError, match="no pixel holds data"):
            Decoder(1, no_data=value)(as_npy(array))


def test_values_that_float32_cannot_hold_are_no_data():
    array = np.array([[0.5, 1e300, 0.25, 0.0]])
    assert Decoder(1)(as_npy(array)).valid.tolist() == [[True, False, True, True]]


# Transparency


def test_transparent_pixels_are_not_valid():
    array = noise(6, 5, 4)
    array[..., 3] = 255
    assert Decoder(3)(encode(Image.fromarray(array))).valid is None
    array[1, 2, 3], array[2, 2, 3] = 0, 1
    sample = Decoder(3)(encode(Image.fromarray(array)))
    assert (~sample.valid).nonzero().tolist() == [[1, 2]]
    assert sample.image[:, 1, 2].tolist() == [0, 0, 0]


def test_an_image_that_is_transparent_all_over_is_read_and_has_no_valid_pixel():
    sample = Decoder(3)(encode(Image.new("RGBA", (3, 2), (9, 9, 9, 0))))
    assert not sample.valid.any()
    assert not sample.image.any()


def test_one_more_channel_than_bands_is_alpha_as_it_is():
    array = noise(4, 5, 4)
    array[0, 0, 3] = 0
    sample = Decoder(4)(encode(Image.fromarray(array)))
    assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), array)
    assert sample.valid is None
    assert np.array_equal(pixels(encode(Image.fromarray(array[..., 2:])), 2), array[..., 2:])


def test_alpha_in_depth_is_laid_on_black():
    deep = np.random.default_rng(0).integers(0, 65536, (5, 7, 4)).astype(np.uint16)
    deep[2, 3, 3], deep[2, 4, 3] = 0, 65535
    sample = Decoder(3)(deep_png(deep))
    wanted = deep[..., :3] / 257 * (deep[..., 3:] / 65535)
    assert np.allclose(sample.image.permute(1, 2, 0), wanted, atol=1e-3)
    assert (~sample.valid).nonzero().tolist() == [[2, 3]]


def test_the_decoder_takes_what_a_source_gives():
    assert isinstance(Decoder()(encode(Image.new("RGB", (3, 2)))), Sample)
    assert Decoder(1).value_range is None


# The refusals


@pytest.mark.parametrize("array", [np.zeros((4, 4), complex), np.array([["a", "b"]]), np.zeros((4, 4), "M8[s]")])
def test_arrays_of_other_types_are_refused_by_name(array):
    with pytest.raises(DecodeError, match=re.escape(str(array.dtype))):
        decode(as_npy(array), 3)


@pytest.mark.parametrize("shape", [(4, 5, 2), (4, 5, 4), (3, 4, 5, 3), (5,), (0, 5, 3), (3, 0, 5)])
def test_arrays_of_other_shapes_are_refused(shape):
    with pytest.raises(DecodeError):
        decode(as_npy(np.zeros(shape, np.uint8)), 3)


def test_arrays_of_objects_are_not_unpickled():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(DecodeError):
        decode(buffer.getvalue(), 3)


@pytest.mark.parametrize(("content", "bands", "channels"), [
    (encode(Image.new("RGB", (4, 4))), 3, 13),
    (encode(Image.new("RGB", (4, 4))), 3, 4),
    (encode(Image.new("L", (4, 4))), 1, 2),
    (encode(Image.new("CMYK", (8, 8)), "JPEG"), 3, 4),
    (as_npy(np.zeros((16, 15, 13), np.int16)), 13, 3),
    (as_npy(np.zeros((6, 5, 2), np.uint8)), 2, 1),
])  # fmt: skip
def test_another_number_of_channels_is_refused_with_both_numbers(content, bands, channels):
    with pytest.raises(DecodeError, match=rf"has {bands} bands?.*as {channels} channels?"):
        decode(content, channels)


@pytest.mark.parametrize(("bands", "photometric"), [(2, 1), (4, 2)], ids=["grey + 1", "RGB + infrared"])
def test_bands_that_are_neither_colour_nor_alpha_are_not_dropped_in_silence(bands, photometric):
    assert decode(tiff(bands - 1, photometric, []), 3).shape == (3, 4, 4)
    for extra in ([0], []):  # neither by a tag that says so nor for want of one
        with pytest.raises(DecodeError, match=f"{bands} bands"):
            decode(tiff(bands, photometric, extra), 3)
        assert decode(tiff(bands, photometric, extra), bands).flatten().tolist() == [
            band + bands * pixel for band in range(bands) for pixel in range(16)
        ]


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
    monkeypatch.setattr(stored, "MAX_PIXELS", 1200)
    assert decode(content, 1).shape == (1, 30, 40)
    monkeypatch.setattr(stored, "MAX_PIXELS", 1199)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DecodeError, match="40x30"):
        decode(content, 1)


# Files of the wild


@pytest.mark.skipif(not NASTY, reason=f"{MANIFEST} is not there")
@pytest.mark.parametrize("row", NASTY, ids=lambda row: row["file"])
def test_nasty_file_is_loaded_or_refused_with_a_reason(row):
    content = (DATA / "nasty" / "files" / row["file"]).read_bytes()
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
        assert outcome == wanted[row["expectation"]], reason
