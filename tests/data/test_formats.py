"""Every format against what was written into it, against other readers, and against files that ask for too much."""

import csv
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from fuzzing import channels_of, decode, deep_png, dicom, encapsulated, npy, npz, picture, pillow, seeds, tiff
from hardpatch.data.images import stored
from hardpatch.data.images.decode import DecodeError, Decoder, describe
from hardpatch.data.images.value_range import find_value_range
from hardpatch.data.sources import open_source
from places import ROOT, SHARED

DATA = SHARED / "data"
NASTY, SCIENTIFIC = DATA / "nasty" / "files", DATA / "scientific"
needs_nasty = pytest.mark.skipif(not NASTY.is_dir(), reason=f"{NASTY} is not there")
needs_scientific = pytest.mark.skipif(not SCIENTIFIC.is_dir(), reason=f"{SCIENTIFIC} is not there")

SEEDS = seeds()


def pixels(content, channels=3, **options):
    """Decoded as (H, W, C)."""
    return Decoder(channels, **options)(content).image.permute(1, 2, 0).numpy()


def scaled(array):
    """By the rule for its type."""
    if array.dtype == np.uint8:
        return array
    high = 1.0 if array.dtype.kind == "f" else float(np.iinfo(array.dtype).max)
    return array.astype(np.float64) * (255 / high)


@pytest.mark.parametrize("name", SEEDS)
def test_what_is_described_is_what_comes_out(name):
    about = describe(SEEDS[name])
    image = Decoder(channels_of(name))(SEEDS[name]).image
    assert (about.height, about.width) == tuple(image.shape[1:]), about
    assert about.is_deep == image.is_floating_point()
    assert about.bands in (image.shape[0], 1)
    assert about.format in name.upper()
    assert (about.frames > 1) == (name == "gif")


# TIFF


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8"])
@pytest.mark.parametrize("bands", [1, 3, 5])
@pytest.mark.parametrize("layout", [
    {},
    {"compression": "lzw", "predictor": True, "rowsperstrip": 7},
    {"compression": "deflate", "tile": (16, 32), "planarconfig": "separate"},
    {"byteorder": ">", "bigtiff": True, "planarconfig": "separate"},
    {"compression": "packbits", "tile": (16, 16)},
    {"compression": "zstd", "byteorder": ">"},
], ids=["plain", "lzw", "planes", "big", "packbits", "zstd"])  # fmt: skip
def test_tiff_of_any_type_and_layout(dtype, bands, layout):
    array = picture(33, 41, bands, dtype=np.dtype(dtype))
    if array.dtype.kind == "f" and "predictor" in layout:
        layout = layout | {"predictor": 3}
    planes = bands > 1 and layout.get("planarconfig") == "separate"
    written = array.transpose(2, 0, 1) if planes else array if bands > 1 else array[..., 0]
    options = {k: v for k, v in layout.items() if planes or k != "planarconfig"}
    content = tiff(np.ascontiguousarray(written), photometric="rgb" if bands == 3 else "minisblack", **(
        options | ({} if planes or bands == 1 else {"planarconfig": "contig"})
    ))  # fmt: skip
    image = pixels(content, bands)
    assert image.dtype == (np.uint8 if dtype == "u1" else np.float32)
    assert np.allclose(image, scaled(array), rtol=1e-6)


def test_tiff_of_12_bits_has_their_range():
    array = (picture(20, 30, 1)[..., 0].astype(np.uint16) * 16) + 15
    content = tiff(array, bitspersample=12, photometric="minisblack")
    assert describe(content).depth == "12-bit"
    assert np.allclose(pixels(content, 1)[..., 0], array * (255 / 4095), rtol=1e-6)


def test_white_may_be_the_low_end():
    array = picture(20, 30, 1)[..., 0]
    assert np.array_equal(pixels(tiff(array, photometric="miniswhite"), 1)[..., 0], 255 - array)
    deep = array.astype(np.uint16) * 100
    content = tiff(deep, photometric="miniswhite")
    assert np.allclose(pixels(content, 1)[..., 0], 255 - deep * (255 / 65535), atol=1e-4)
    image = pixels(content, 1, value_range=(0, 25500))
    assert np.allclose(image[..., 0], 255 - deep * (255 / 25500), atol=1e-4)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_alpha_of_a_tiff(dtype):
    array = picture(20, 30, 4, dtype=dtype)
    array[3, 4, 3], array[5, 6, 3] = 0, np.iinfo(dtype).max
    high = np.iinfo(dtype).max
    for name, premultiplied in (("unassalpha", False), ("assocalpha", True)):
        sample = Decoder(3)(tiff(array, photometric="rgb", extrasamples=[name]))
        weight = 1 if premultiplied else array[..., 3:] / high
        assert np.abs(sample.image.permute(1, 2, 0).numpy() - array[..., :3] * (255 / high) * weight).max() <= 1
        assert (~sample.valid).nonzero().tolist() == [[3, 4]]


def test_no_data_of_gdal():
    array = picture(20, 30, 5, dtype=np.int16)
    array[2:4, 7] = -9999
    content = tiff(array, photometric="minisblack", planarconfig="contig", extratags=[(42113, "s", 0, "-9999", True)])
    sample = Decoder(5)(content)
    assert (~sample.valid).nonzero().tolist() == [[2, 7], [3, 7]]
    there = array.reshape(-1, 5)[sample.valid.flatten().numpy()].mean(0) * (255 / 32767)
    assert np.allclose(sample.image[:, 2, 7], there, rtol=1e-5)
    assert Decoder(5, no_data=-1)(content).valid is None, "what is given counts before what the file says"


def test_tiles_that_are_left_out_hold_no_data():
    content = tiff(picture(32, 32, 1, dtype=np.uint16)[..., 0], tile=(16, 16), compression="deflate")
    import tifffile

    with tifffile.TiffFile(io.BytesIO(content)) as file:
        tag = file.pages[0].tags["TileByteCounts"]
        width = {3: 2, 4: 4}[int(tag.dtype)]
        place = tag.valueoffset + width  # of the second tile
    sparse = content[:place] + bytes(width) + content[place + width :]
    sample = Decoder(1)(sparse)
    assert not sample.valid[:16, 16:].any()
    assert sample.valid[:16, :16].all()
    assert sample.valid[16:].all()
    assert sample.image[0, 0, 20] == pytest.approx(float(sample.image[0][sample.valid].mean()), rel=1e-5)


def test_lab_is_converted_by_its_colours():
    from skimage.color import lab2rgb

    y, x = np.mgrid[:24, :32]
    lab = np.stack([40 + y, x - 16, y - 12], -1).astype(np.float64)  # all within sRGB
    stored_lab = np.stack([lab[..., 0] * 2.55, lab[..., 1] % 256, lab[..., 2] % 256], -1).round().astype(np.uint8)
    image = pixels(tiff(stored_lab, photometric="cielab"))
    lab[..., 0] = stored_lab[..., 0] / 2.55
    assert np.abs(image - 255 * lab2rgb(lab, illuminant="D65")).max() < 7  # another adaptation of white


def test_the_first_of_several_pages():
    first, second = picture(20, 30), picture(10, 12)
    import tifffile

    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(first, photometric="rgb", metadata=None)
        writer.write(second, photometric="rgb", metadata=None)
    assert np.array_equal(pixels(buffer.getvalue()), first)
    assert describe(buffer.getvalue()).frames == 2


# PNG, orientation


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_16_bit_png_keeps_every_bit(bands):
    array = picture(20, 30, bands, dtype=np.uint16)
    array[..., 0] ^= 1
    content = deep_png(array if bands > 1 else array[..., 0])
    assert describe(content).bits == 16
    channels = {2: 2, 4: 4}.get(bands, bands)  # alpha as a channel: as it is stored
    assert np.allclose(pixels(content, channels), array / 257, rtol=1e-6)


def test_a_16_bit_png_may_name_a_transparent_value():
    array = picture(20, 30, 1, dtype=np.uint16)[..., 0]
    array[4:6, 7] = 1234
    content = pillow(array, "PNG")
    chunk = b"tRNS" + struct.pack(">H", 1234)
    head = content.index(b"IDAT") - 4
    content = content[:head] + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[head:]
    sample = Decoder(1)(content)
    assert (~sample.valid).nonzero().tolist() == [[4, 7], [5, 7]]
    assert np.allclose(sample.image[0][sample.valid], array[sample.valid.numpy()] / 257, rtol=1e-6)


@pytest.mark.parametrize(("kind", "chunk"), [("png", "IDAT"), ("png_palette", "PLTE"), ("png_palette", "tRNS")])
def test_a_changed_byte_in_a_png_is_found_out(kind, chunk):
    content = bytearray(SEEDS[kind])
    content[content.index(chunk.encode()) + 6] ^= 1
    with pytest.raises(DecodeError, match=f"checksum of {chunk} is wrong"):
        decode(bytes(content), 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "deep PNG", "deep TIFF", "palette TIFF"])
def test_orientation_as_pillow_applies_it(orientation, kind):
    array = picture(20, 31)
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "deep TIFF":
        deep = array.astype(np.uint16) * 257
        content = tiff(deep, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    elif kind == "deep PNG":
        content = deep_png(array.astype(np.uint16) * 257)
        chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
        head = content.index(b"IDAT") - 4
        content = (
            content[:head] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
            + content[head:]
        )  # fmt: skip
    else:
        options = {"lossless": True} if kind == "WEBP" else {}
        mode = "P" if kind == "palette TIFF" else None
        content = pillow(array, kind.split()[-1], mode, exif=exif, **options)
    with Image.open(io.BytesIO(content)) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    found = pixels(content)
    assert found.shape == wanted.shape == ((31, 20, 3) if orientation > 4 else (20, 31, 3))
    assert np.allclose(found, wanted, atol=1e-3)
    about = describe(content)
    assert (about.height, about.width, about.orientation) == (*found.shape[:2], orientation)


# DICOM, arrays


def test_dicom_is_rescaled_to_its_units():
    array = picture(20, 30, 1, dtype=np.int16)[..., 0] - 1000
    hounsfield = array * 2.0 - 500
    content = dicom(array, RescaleSlope=2, RescaleIntercept=-500)
    assert np.allclose(pixels(content, 1, value_range=(-1000, 1000))[..., 0], (hounsfield + 1000) * 0.1275, rtol=1e-5)
    low, high = -500, 32767 * 2 - 500
    assert np.allclose(pixels(content, 1)[..., 0], (hounsfield - low) * (255 / (high - low)), rtol=1e-4, atol=1e-4)
    assert describe(content).kind == "float"


def test_dicom_of_12_bits_and_white_at_the_low_end():
    array = (picture(20, 30, 1)[..., 0].astype(np.uint16)) * 16
    plain = dicom(array, BitsStored=12, HighBit=11)
    assert np.allclose(pixels(plain, 1)[..., 0], array * (255 / 4095), rtol=1e-5)
    white = dicom(array, BitsStored=12, HighBit=11, PhotometricInterpretation="MONOCHROME1")
    assert np.allclose(pixels(white, 1)[..., 0], 255 - array * (255 / 4095), atol=1e-3)
    eight = picture(20, 30, 1)[..., 0]
    image = decode(dicom(eight, PhotometricInterpretation="MONOCHROME1"), 1)
    assert image.dtype == torch.uint8
    assert np.array_equal(image[0].numpy(), 255 - eight)


def test_dicom_padding_is_no_data():
    array = picture(20, 30, 1, dtype=np.int16)[..., 0]
    array[:3, :4] = -2000
    for extra in ({}, {"RescaleSlope": 1, "RescaleIntercept": -1024}):
        sample = Decoder(1)(dicom(array, PixelPaddingValue=-2000, **extra))
        assert (~sample.valid).sum() == 12
        assert not sample.valid[:3, :4].any()


@pytest.mark.parametrize("compressed", [False, True])
def test_dicom_of_colours_and_frames(compressed):
    array = picture(20, 30)
    assert np.array_equal(pixels(dicom(array, compressed=compressed)), array)
    frames = np.stack([array[..., 0], array[..., 1]])
    content = dicom(array[..., 0], NumberOfFrames=2, PixelData=frames.tobytes(), compressed=compressed)
    assert np.array_equal(pixels(content, 1)[..., 0], array[..., 0])
    assert describe(content).frames == 2


@pytest.mark.parametrize("kind", ["jpegsof3", "jpegls", "jpeg2000", "jpeg"])
@pytest.mark.parametrize("bits", [8, 12, -12])
def test_dicom_of_every_compression(kind, bits):
    """Signed values of 12 bits stand in 16."""
    import imagecodecs

    if kind == "jpeg" and bits != 8:
        pytest.skip("Pillow writes none to test with")
    array = picture(20, 30, 1)[..., 0]
    if bits != 8:
        array = array.astype(np.uint16) << 4
    name = {"jpegsof3": "JPEGLosslessSV1", "jpegls": "JPEGLSLossless", "jpeg2000": "JPEG2000Lossless"}
    encode = {
        "jpegsof3": lambda a: imagecodecs.ljpeg_encode(a, bitspersample=abs(bits)),
        "jpegls": imagecodecs.jpegls_encode,
        "jpeg2000": lambda a: imagecodecs.jpeg2k_encode(a, level=0, bitspersample=abs(bits), codecformat="J2K"),
        "jpeg": lambda a: pillow(a, "JPEG", quality=100),
    }[kind]
    tags = {"BitsStored": abs(bits), "HighBit": abs(bits) - 1, "PixelRepresentation": int(bits < 0)}
    content = encapsulated(array, encode(array), name.get(kind, "JPEGBaseline8Bit"), **tags)
    wanted = array.astype(float)
    if bits < 0:
        wanted = np.where(wanted >= 2048, wanted - 4096, wanted)
    high = {8: 255, 12: 4095, -12: 2047}[bits]
    found = pixels(content, 1)[..., 0]
    assert np.abs(found - wanted * (255 / high)).max() <= (3 if kind == "jpeg" else 1e-3)


def test_dicom_without_its_library_says_what_to_install(monkeypatch):
    content = dicom(picture(20, 30))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DecodeError, match=r"pip install 'pydicom>="):
        decode(content, 3)


def test_npz_holds_one_array():
    array = picture(20, 30, 7, dtype=np.float32)
    assert np.allclose(pixels(npz(array), 7), array * 255, rtol=1e-6)
    with pytest.raises(DecodeError, match=r"one array.*arr_0.*arr_1"):
        decode(npz(array, array), 7)


def test_npz_with_a_changed_value_is_found_out():
    buffer = io.BytesIO()
    np.savez(buffer, picture(20, 30))
    content = bytearray(buffer.getvalue())
    content[len(content) // 2] ^= 1
    with pytest.raises(DecodeError, match="CRC"):
        decode(bytes(content), 3)


# Too much


def zipped(array_header, data):
    """An .npz whose member says what it likes."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.npy", "w") as member,
    ):
        member.write(array_header)
        for block in data:
            member.write(block)
    return buffer.getvalue()


def array_header(shape, dtype="|u1"):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bombs():
    """Small files that ask for much memory, by name."""
    zeros = bytes(1 << 24)
    signature, header = b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0))
    squeezed = zlib.compressobj(1)
    quarter = b"".join(squeezed.compress(zeros) for _ in range(16)) + squeezed.flush()
    whole = tiff(picture(64, 64, 1, dtype=np.uint16)[..., 0], compression="deflate", rowsperstrip=64)
    import tifffile

    with tifffile.TiffFile(io.BytesIO(whole)) as file:
        page = file.pages[0]
        offset, count = page.tags["StripOffsets"].valueoffset, page.tags["StripByteCounts"].valueoffset
        kinds = {3: "<H", 4: "<I"}
        formats = [kinds[int(page.tags[name].dtype)] for name in ("StripOffsets", "StripByteCounts")]
        length, width = page.tags["ImageLength"].valueoffset, page.tags["ImageWidth"].valueoffset
    inflated = bytearray(whole + quarter)
    struct.pack_into(formats[0], inflated, offset, len(whole))
    struct.pack_into("<I", inflated, count, len(quarter)) if formats[1] == "<I" else None
    large = bytearray(whole)
    struct.pack_into("<I", large, length, 100_000)
    struct.pack_into("<I", large, width, 100_000)
    tile = bytearray(tiff(picture(64, 64, 1, dtype=np.uint16)[..., 0], compression="deflate", tile=(64, 64)))
    with tifffile.TiffFile(io.BytesIO(bytes(tile))) as file:
        for name in ("TileWidth", "TileLength"):
            tag = file.pages[0].tags[name]
            struct.pack_into(kinds[int(tag.dtype)], tile, tag.valueoffset, 65_520)
    canvas = struct.pack("<I", 16382)[:3]
    webp = b"VP8X" + struct.pack("<I", 10) + bytes(4) + canvas * 2
    jpeg = pillow(np.zeros((2000, 2000), np.uint8), "JPEG", progressive=True)
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return {
        "npz that is as large as it says": zipped(array_header((40_000, 40_000)), [zeros] * 4),
        "npz with more than it says": zipped(array_header((16, 16, 3)), [zeros] * 16),
        "npy that is cut off": array_header((60_000, 1_000, 4)) + b"x",
        "png with a text": signature + header + chunk(b"zTXt", b"a\0\0" + quarter) + chunk(b"IEND", b""),
        "png with a profile": signature + header + chunk(b"iCCP", b"a\0\0" + quarter) + chunk(b"IEND", b""),
        "png with too many pixels in its data": signature + header + chunk(b"IDAT", quarter) + chunk(b"IEND", b""),
        "png of 16 bits": signature + chunk(b"IHDR", struct.pack(">IIBBBBB", 8000, 8000, 16, 6, 0, 0, 0)),
        "tiff whose strip inflates": bytes(inflated),
        "tiff of many pixels": bytes(large),
        "tiff of a huge tile": bytes(tile),
        "webp canvas": b"RIFF" + struct.pack("<I", 4 + len(webp)) + b"WEBP" + webp,
        "jpeg of many scans": jpeg[:-2] + scan * 2000 + b"\xff\xd9",
        "gif": b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0x80, 0, 0) + bytes(6) + SEEDS["gif"][-500:],
        "bmp": b"BM" + struct.pack("<IHHIIiiHHIIIIII", 100, 0, 0, 54, 40, 50_000, 50_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "dicom": dicom(picture(16, 16), Rows=60_000, Columns=60_000),
        "dicom that is deflated": SEEDS["dicom"].replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"),
    }  # fmt: skip


MEASURE = """
import resource, sys, time, json
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from hardpatch.data.images.decode import DecodeError, Decoder
from fuzzing import seeds, channels_of
for name, content in seeds().items():
    Decoder(channels_of(name))(content)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = {}
for file in sorted(Path(sys.argv[2]).iterdir()):
    content, start = file.read_bytes(), time.perf_counter()
    try:
        Decoder()(content)
        reason = ""
    except DecodeError as error:
        reason = str(error)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found[file.name] = (reason, time.perf_counter() - start, (peak - before) / 1024)
print(json.dumps(found))
"""


def test_bombs_are_refused_quickly_and_without_gigabytes(tmp_path):
    harmless = {"png with too many pixels in its data", "png with a profile"}
    made = bombs()
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
        assert len(content) < 4_000_000
    words = [sys.executable, "-W", "error", "-c", MEASURE, str(ROOT / "tests"), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ)
    for name, (reason, seconds, megabytes) in json.loads(done.stdout).items():
        assert reason or name in harmless, name
        assert seconds < 3, name
        assert megabytes < 100, (name, reason)


def test_an_image_of_many_bytes_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(stored, "MAX_BYTES", 20 * 30 * 10 - 1)
    array = picture(20, 30, 5, dtype=np.uint16)
    for content in (npy(array), npz(array), tiff(array, photometric="minisblack", planarconfig="contig")):
        with pytest.raises(DecodeError, match="bytes"):
            decode(content, 5)
        with pytest.raises(DecodeError, match="bytes"):
            describe(content)


# The range of a source


def test_value_range_of_a_source(tmp_path):
    for number in range(3):
        Image.fromarray(picture(20, 30)).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.tif").write_bytes(b"II*\0")
    assert find_value_range(open_source(str(tmp_path))) is None
    deep = picture(20, 30, 1, dtype=np.uint16)[..., 0]
    (tmp_path / "a.tif").write_bytes(tiff(deep.clip(300, 4000)))
    (tmp_path / "b.tif").write_bytes(tiff(deep.clip(200, 3000)))
    (tmp_path / "c.npy").write_bytes(npy(np.array([[np.nan, 250.5], [np.inf, 3999]], np.float32)))
    source = open_source(str(tmp_path))
    assert find_value_range(source) == (200, 4000)
    assert find_value_range(source, no_data=4000) == (200, 3999)
    assert find_value_range(open_source("shapes:3")) is None


def test_value_range_looks_at_some_of_many_and_never_is_empty(tmp_path):
    for number in range(9):
        (tmp_path / f"{number}.npy").write_bytes(npy(np.full((4, 4), number, np.int16)))
    source = open_source(str(tmp_path))
    assert find_value_range(source, max_images=3) == (0, 8)
    assert find_value_range(source, max_images=1) == (0, 1)


# Files of the wild: what they show


@pytest.fixture(scope="module")
def hopper():
    return pixels((NASTY / "really_png.jpg").read_bytes()).astype(float)


@needs_nasty
@pytest.mark.parametrize(("file", "most"), [
    ("lab.tif", 4), ("really_webp.jpg", 6), ("UPPER CASE with spaces ü.JPG", 4), ("avif.avif", 6),
    ("exif_mirrored_2.jpg", 6), ("exif_rotated_6.jpg", 6), ("grey.jpg", None), ("1bit.png", None),
])  # fmt: skip
def test_nasty_files_show_the_same_portrait(file, most, hopper):
    image = pixels((NASTY / file).read_bytes()).astype(float)
    if most is None:  # without its colours, the outlines remain
        small = np.asarray(Image.fromarray(image[..., 0].astype(np.uint8)).resize((32, 32), Image.Resampling.BOX))
        grey = Image.fromarray(hopper.astype(np.uint8)).convert("L")
        wanted = np.asarray(grey.resize((32, 32), Image.Resampling.BOX))
        assert np.corrcoef(small.ravel(), wanted.ravel())[0, 1] > 0.85
        assert np.array_equal(image[..., 0], image[..., 1])
    else:
        assert np.abs(image - hopper).mean() < most


@needs_nasty
def test_nasty_16_bit_files_are_pictures():
    little, big = ((NASTY / f"16bit_{order}.tif").read_bytes() for order in ("le", "be"))
    found = Decoder(3, value_range=(291, 694))
    assert torch.equal(found(little).image, found(big).image)
    assert (found(little).image.min(), found(little).image.max()) == (0, 255)
    assert 5 < found(little).image.std() < 128
    rgb = pixels((NASTY / "16bit_rgb.tiff").read_bytes())
    with Image.open(NASTY / "16bit_rgb.tiff") as image:
        assert np.abs(rgb - np.asarray(image)).max() <= 1
    assert len(np.unique(rgb)) > 256, "more than 8 bits"
    sample = Decoder(3, value_range=(0, 255))((NASTY / "16bit_grey_trns.png").read_bytes())
    assert sample.image.max() > 200
    assert 0.5 < sample.valid.float().mean() < 1


@needs_nasty
@pytest.mark.parametrize("file", ["palette_transparent.png", "palette_one_transparent.png", "rgba.png", "rgba.webp"])
def test_nasty_transparency_is_black(file):
    sample = Decoder()((NASTY / file).read_bytes())
    with Image.open(NASTY / file) as image:
        over = image.convert("RGBA")
    wanted = Image.alpha_composite(Image.new("RGBA", over.size, (0, 0, 0, 255)), over).convert("RGB")
    assert np.abs(sample.image.permute(1, 2, 0).numpy().astype(int) - np.asarray(wanted)).max() <= 1
    assert np.array_equal(sample.valid.numpy(), np.asarray(over)[..., 3] > 0)


@needs_nasty
def test_nasty_cmyk_is_natural():
    image = pixels((NASTY / "cmyk_adobe.jpg").read_bytes()).astype(float)
    assert np.median(image) < 10, "black paper"
    letters = image[(image.max(-1) > 150)]
    assert letters[:, 0].mean() > 2 * letters[:, 1:].mean(), "red letters"


@needs_nasty
def test_nasty_metadata_turn_pictures_upright():
    content = (NASTY / "exif_rotated_photo_6.jpg").read_bytes()
    assert decode(content, 3).shape == (3, 1800, 1200)
    assert describe(content)[1:3] == (1200, 1800)
    for file in ("exif_in_png_3.png", "exif_mirrored_2.jpg", "exif_rotated_6.jpg", "exif_rotated_photo_6.jpg"):
        with Image.open(NASTY / file) as image:
            wanted = ImageOps.exif_transpose(image)
            black = Image.new("RGBA", wanted.size, (0, 0, 0, 255))
            wanted = np.asarray(Image.alpha_composite(black, wanted.convert("RGBA")).convert("RGB"))
        assert np.abs(pixels((NASTY / file).read_bytes()).astype(int) - wanted).max() <= 1


def nasty_manifest():
    with (NASTY.parent / "manifest.csv").open(newline="") as file:
        return {row["file"]: row["expectation"] for row in csv.DictReader(file)}


@needs_nasty
@pytest.mark.parametrize("kind", ["folder", "txt", "csv", "parquet", "bytes.parquet", "tar", "tar.gz", "hf"])
def test_nasty_files_through_every_kind_of_source(kind, tmp_path):
    wanted = nasty_manifest()
    if kind == "folder":
        spec = NASTY
    elif kind == "hf":
        datasets = pytest.importorskip("datasets")
        spec = tmp_path / "saved"
        rows = {"image": [{"bytes": (NASTY / name).read_bytes(), "path": None} for name in wanted]}
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(spec)
    elif kind == "bytes.parquet":
        import pyarrow
        import pyarrow.parquet

        spec = tmp_path / "table.parquet"
        contents = [(NASTY / name).read_bytes() for name in wanted]
        pyarrow.parquet.write_table(pyarrow.table({"image": contents}), spec)
    elif kind.startswith("tar"):
        spec = tmp_path / f"shard.{kind}"
        with tarfile.open(spec, "w:gz" if kind.endswith("gz") else "w") as archive:
            for number, name in enumerate(wanted):  # keys end at the first full stop
                archive.add(NASTY / name, f"{number:02d}.{name.rpartition('.')[2]}")
    else:
        spec = tmp_path / f"list.{kind}"
        if kind == "parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.table({"path": [str(NASTY / name) for name in wanted]}), spec)
        else:
            lines = [str(NASTY / name) for name in wanted]
            spec.write_text("\n".join((["path"] if kind == "csv" else []) + lines) + "\n")
    source = open_source(str(spec))
    assert len(source) == len(wanted) == 42
    names = sorted(wanted) if kind == "folder" else list(wanted)
    for number, name in enumerate(names):
        if kind in ("folder", "txt", "csv", "parquet"):
            assert Path(source.name(number)).name == name
        try:
            sample = source.read(number)
            assert sample.image.shape[0] == 3
            outcome = "load"
        except DecodeError:
            outcome = "reject"
        assert wanted[name] in (outcome, "policy"), name


# Science


@needs_scientific
def test_13_bands_of_sentinel():
    import tifffile
    from skimage import io as skimage_io

    file = next((SCIENTIFIC / "s2_multiband").glob("*S2Hand.tif"))
    wanted = tifffile.imread(file)
    assert np.array_equal(np.moveaxis(skimage_io.imread(file), np.argmin(skimage_io.imread(file).shape), 0), wanted)
    content = file.read_bytes()
    sample = Decoder(13, value_range=(0, 10000))(content)
    assert sample.valid is None
    assert np.allclose(sample.image.numpy(), wanted * 0.0255, rtol=1e-6)
    assert wanted.min() == 7
    about = describe(content)
    assert (about.bands, about.depth, about.mode) == (13, "16-bit signed", "bands")
    with pytest.raises(DecodeError, match=r"13 bands.*3 channels"):
        decode(content, 3)
    label = next((SCIENTIFIC / "s2_multiband").glob("*LabelHand.tif")).read_bytes()
    assert (~Decoder(1, no_data=-1)(label).valid).sum() == 99


@needs_scientific
def test_microscopy_and_nuclei():
    import tifffile

    source = open_source(str(SCIENTIFIC / "microscopy16"), decoder=Decoder(1))
    low, high = find_value_range(source)
    arrays = {file.name: tifffile.imread(file) for file in (SCIENTIFIC / "microscopy16").glob("*.tif")}
    assert (low, high) == (min(a.min() for a in arrays.values()), max(a.max() for a in arrays.values()))
    decoder = Decoder(1, value_range=(low, high))
    for number in range(len(source)):
        array = arrays[Path(source.name(number)).name].astype(float)
        image = decoder(source.content(number)).image[0]
        assert np.allclose(image, (array - low) * (255 / (high - low)), atol=1e-3)
    nuclei = open_source(str(SCIENTIFIC / "nuclei" / "images"))
    assert find_value_range(nuclei) is None
    for number in range(3):
        sample = nuclei.read(number)
        with Image.open(nuclei.name(number)) as image:
            assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), np.asarray(image)[..., :3])
        assert sample.valid is None


@pytest.mark.parametrize("big", [False, True], ids=["classic", "big"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_a_tiff_that_is_cut_off_behind_its_first_page_is_damaged(big, byteorder):
    pages = io.BytesIO()
    with tifffile.TiffWriter(pages, bigtiff=big, byteorder=byteorder) as file:
        for value in range(3):
            file.write(np.full((16, 16, 3), value, np.uint8), photometric="rgb")
    whole = pages.getvalue()
    assert (pixels(whole, 3) == 0).all()
    with pytest.raises(DecodeError, match=r"cut off: page \d of the TIFF lies behind its end"):
        pixels(whole[: len(whole) // 2], 3)
