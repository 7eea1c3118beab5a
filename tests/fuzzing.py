"""Damaged files of every format, and what may come out of them. Run as a program it is the child that decodes them."""

import io
import json
import random
import resource
import signal
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

CHANNELS = {"multiband": 13, "npy_planes": 5, "grey": 1}
"""By name, of seeds that are not read as 3."""

CHECKED = ("png", "npz")
"""Formats with a checksum over all values: what is decoded is what was stored."""


def decode(content, channels):
    """The pixels of one file."""
    from hardpatch.data.images.decode import Decoder

    return Decoder(channels)(content).image


def picture(height=40, width=48, channels=3, dtype=np.uint8):
    """Smooth, so that lossy formats keep it, with some noise."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / (5 + c)) + np.cos(y / (7 + c)) for c in range(channels)], -1)
    waves += 0.1 * np.random.default_rng(0).standard_normal(waves.shape)
    unit = (waves - waves.min()) / (waves.max() - waves.min())
    if np.dtype(dtype).kind == "f":
        return unit.astype(dtype)
    return (unit * min(np.iinfo(dtype).max, 60000)).astype(dtype)


def pillow(array, kind, mode=None, **options):
    image = Image.fromarray(array)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(array, **options):
    import tifffile

    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, metadata=None, **options)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(*arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, *arrays)
    return buffer.getvalue()


def deep_png(array):
    import imagecodecs

    return bytes(imagecodecs.png_encode(array))


def dicom(array, *, compressed=False, **tags):
    """A grey or colour DICOM file."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["hardpatch"])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = array.shape[:2]
    data.SamplesPerPixel = array.shape[2] if array.ndim == 3 else 1
    data.PhotometricInterpretation = "RGB" if array.ndim == 3 else "MONOCHROME2"
    if array.ndim == 3:
        data.PlanarConfiguration = 0
    data.BitsAllocated = data.BitsStored = 8 * array.dtype.itemsize
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(array.dtype.kind == "i")
    data.PixelData = array.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    if compressed:
        data.compress(pydicom.uid.RLELossless)
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def encapsulated(array, frame, syntax, **tags):
    """A DICOM file whose frame is compressed already."""
    import pydicom

    data = pydicom.dcmread(io.BytesIO(dicom(array, **tags)))
    data.PixelData = pydicom.encaps.encapsulate([bytes(frame)])
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def seeds():
    """One good file of every kind, by name."""
    import imagecodecs

    rgb, grey, deep = picture(), picture(channels=1)[..., 0], picture(dtype=np.uint16)
    rgba = np.concatenate([rgb, picture(channels=1)], -1)
    bands = picture(channels=13, dtype=np.int16)
    frames = [Image.fromarray(np.roll(rgb, 5 * i, 1)) for i in range(3)]
    exif = Image.Exif()
    exif[0x0112] = 6
    found = {
        "jpeg": pillow(rgb, "JPEG"),
        "jpeg_progressive": pillow(rgb, "JPEG", progressive=True, exif=exif),
        "jpeg_cmyk": pillow(rgb, "JPEG", "CMYK"),
        "jpeg_grey": pillow(grey, "JPEG"),
        "png": pillow(rgb, "PNG", exif=exif),
        "png_alpha": pillow(rgba, "PNG"),
        "png_palette": pillow(rgb, "PNG", "P", transparency=3),
        "png_bilevel": pillow(grey, "PNG", "1"),
        "png_deep": deep_png(deep),
        "png_deep_grey": pillow(deep[..., 0], "PNG"),
        "webp": pillow(rgb, "WEBP"),
        "webp_lossless": pillow(rgba, "WEBP", lossless=True),
        "gif": pillow(rgb, "GIF", save_all=True, append_images=frames[1:]),
        "bmp": pillow(rgb, "BMP"),
        "bmp_palette": pillow(rgb, "BMP", "P"),
        "tiff": tiff(rgb, photometric="rgb"),
        "tiff_lzw": tiff(deep, photometric="rgb", compression="lzw", predictor=True, rowsperstrip=7),
        "tiff_multiband": tiff(
            np.ascontiguousarray(bands.transpose(2, 0, 1)), photometric="minisblack", planarconfig="separate",
            compression="deflate", tile=(16, 16),
        ),
        "tiff_float": tiff(picture(channels=1, dtype=np.float32)[..., 0], compression="deflate", predictor=True),
        "tiff_big": tiff(deep[..., 0], bigtiff=True, byteorder=">"),
        "tiff_palette": pillow(rgb, "TIFF", "P", compression="packbits"),
        "tiff_jpeg": pillow(rgb, "TIFF", compression="jpeg"),
        "tiff_lab": tiff(rgb, photometric="cielab"),
        "dicom": dicom(deep[..., 0], RescaleSlope=2, RescaleIntercept=-1000),
        "dicom_rle": dicom(rgb, compressed=True),
        "dicom_lossless": encapsulated(grey, imagecodecs.ljpeg_encode(grey), "JPEGLosslessSV1"),
        "dicom_jpegls": encapsulated(deep, imagecodecs.jpegls_encode(deep), "JPEGLSLossless"),
        "dicom_jpeg2000": encapsulated(rgb, pillow(rgb, "JPEG2000", no_jp2=True), "JPEG2000Lossless"),
        "dicom_jp2": encapsulated(grey, pillow(grey, "JPEG2000"), "JPEG2000Lossless"),
        "npy": npy(rgb),
        "npy_planes": npy(picture(channels=5, dtype=np.float16).transpose(2, 0, 1)),
        "npz": npz(deep),
    }  # fmt: skip
    from PIL import features

    if features.check("avif"):
        found["avif"] = pillow(rgb, "AVIF")
    return found


def damaged(content, kind, draw):
    """Cut off, or with some bytes changed; more often in its first part, where the structure is."""
    if kind == "cut":
        return content[: draw.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        place = draw.randrange(min(len(changed), 256) if draw.random() < 0.5 else len(changed))
        changed[place] = draw.randrange(256)
    return bytes(changed)


def fault(name, kind, content, whole):
    """What is wrong with the answer to a damaged file, or None.

    Silently wrong is: another shape or type than the file's header says, a value that is not finite, an exception of
    any other kind; a cut file that comes out differently from the whole one; in a format with checksums, any other
    picture. A changed byte in a format without checksums may be another picture: nobody can tell.
    """
    import torch

    from hardpatch.data.images.decode import DecodeError, Decoder, describe

    decoder = Decoder(channels_of(name))
    try:
        sample = decoder(content)
    except DecodeError as error:
        return None if str(error) else "refused without a reason"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    image, valid = sample.image, sample.valid
    if image.ndim != 3 or image.shape[0] != decoder.channels or image.dtype not in (torch.uint8, torch.float32):
        return f"{image.dtype} of shape {tuple(image.shape)}"
    if not torch.isfinite(image).all():
        return "values that are not finite"
    if valid is not None and (valid.dtype != torch.bool or valid.shape != image.shape[1:] or valid.all()):
        return "a wrong mask"
    try:
        about = describe(content)
    except DecodeError as error:
        return f"decoded, but not described: {error}"
    if (about.height, about.width) != tuple(image.shape[1:]) or about.is_deep != image.is_floating_point():
        return f"{image.dtype} of shape {tuple(image.shape)}, described as {about}"
    must_be_same = kind == "cut" or name.startswith(CHECKED)
    if must_be_same and not (image.dtype == whole.image.dtype and torch.equal(image, whole.image)):
        return "another picture"
    return None


def channels_of(name):
    return next((count for part, count in CHANNELS.items() if part in name), 3)


def main(cases, first):
    """Decode ``cases`` damaged files and print what was found as JSON."""
    import torch

    from hardpatch.data.images.decode import Decoder

    warnings.simplefilter("error")
    torch.set_num_threads(1)
    originals = seeds()
    whole = {name: Decoder(channels_of(name))(content) for name, content in originals.items()}
    for name in originals:  # all libraries are loaded before memory is counted
        assert torch.isfinite(whole[name].image).all()
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (2 << 30), taken + (2 << 30)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    faults, outcomes, slowest = [], {}, (0.0, "")
    names = list(originals)
    for case in range(first, first + cases):
        draw = random.Random(case)
        name, kind = names[case % len(names)], draw.choice(("cut", "changed", "changed"))
        content = damaged(originals[name], kind, draw)
        print(f"{case} {name} {kind}", file=sys.stderr, flush=True)
        signal.alarm(20)  # a hang ends the child, and the last line above names it
        start = time.perf_counter()
        wrong = fault(name, kind, content, whole[name])
        signal.alarm(0)
        slowest = max(slowest, (time.perf_counter() - start, f"{case} {name}"))
        if wrong:
            faults.append(f"case {case}: {name}, {kind} ({zlib.crc32(content):08x}): {wrong}")
        outcomes[name] = outcomes.get(name, 0) + 1
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        json.dumps({"faults": faults, "outcomes": outcomes, "slowest": slowest, "megabytes": (after - before) / 1024})
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
