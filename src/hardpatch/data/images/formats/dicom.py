"""DICOM: the first frame, rescaled to the units that the file names (Hounsfield for CT).

Needs pydicom (extra ``dicom``). The window for display is not applied. Values that are all padding count as no data.
"""

from __future__ import annotations

import io
import math
import struct
from typing import Any

import numpy as np

from hardpatch.data.images.stored import DecodeError, Description, Kind, Stored, check_size, type_range
from hardpatch.runtime.extras import install

_BY_IMAGECODECS = {
    "1.2.840.10008.1.2.4.57": "jpegsof3",
    "1.2.840.10008.1.2.4.70": "jpegsof3",
    "1.2.840.10008.1.2.4.80": "jpegls",
    "1.2.840.10008.1.2.4.81": "jpegls",
    "1.2.840.10008.1.2.4.90": "jpeg2k",
    "1.2.840.10008.1.2.4.91": "jpeg2k",
}
"""Kinds of compression."""

_DEFLATED = b"1.2.840.10008.1.2.1.99"


def is_dicom(content: bytes) -> bool:
    """By its preamble, or, as older devices write it, by a first element that only DICOM begins with."""
    if content[128:132] == b"DICM":
        return True
    group, element = content[:2], content[2:4]
    is_first = (group == b"\2\0" and element in (b"\0\0", b"\1\0", b"\2\0")) or (
        group == b"\x08\0" and element in (b"\0\0", b"\1\0", b"\5\0", b"\x08\0", b"\x12\0", b"\x16\0", b"\x18\0")
    )
    length_of_implicit = int.from_bytes(content[4:8], "little")
    return is_first and ((content[4:6].isalpha() and content[4:6].isupper()) or length_of_implicit < len(content))


def describe(content: bytes) -> Description:
    """From the tags."""
    header = _header(content)
    bits = int(header.BitsStored)
    palette = header.PhotometricInterpretation == "PALETTE COLOR"
    bands = 3 if palette else int(header.SamplesPerPixel)
    mode = "palette" if palette else "grey" if bands == 1 else "rgb"
    kind: Kind = "signed" if header.PixelRepresentation else "unsigned"
    if _is_rescaled(header):
        bits, kind = max(bits, 16), "float"
    width, height = int(header.Columns), int(header.Rows)
    return Description("DICOM", width, height, bands, False, mode, bits, kind, frames=_frames(header))


def read(content: bytes, channels: int | None) -> Stored:
    """The first frame."""
    header = _header(content)
    pydicom = _pydicom()
    data = pydicom.dcmread(io.BytesIO(content), force=True)
    pixels = _first_frame(data)
    if pixels.ndim not in (2, 3):
        raise DecodeError(f"DICOM frame of shape {pixels.shape}")
    inverted = header.PhotometricInterpretation == "MONOCHROME1"
    low, high = _stored_range(header, pixels.dtype)
    padding = data.get("PixelPaddingValue")
    no_data = None if padding is None else float(padding)
    if header.PhotometricInterpretation == "PALETTE COLOR":
        pixels, no_data = pydicom.pixels.apply_color_lut(pixels, data), None
        low, high = type_range(pixels.dtype)
    present = None
    if _is_rescaled(header):
        if no_data is not None:
            present = pixels != no_data
            present, no_data = (None if present.all() else present), None
        if "ModalityLUTSequence" in data:
            pixels = pydicom.pixels.apply_modality_lut(pixels, data)
            low, high = type_range(pixels.dtype)
        else:
            slope, intercept = float(header.RescaleSlope), float(header.RescaleIntercept)
            pixels = (pixels * np.float64(slope) + intercept).astype(np.float32)
            low, high = sorted((low * slope + intercept, high * slope + intercept))
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    return Stored(
        pixels, "grey" if pixels.shape[2] == 1 else "rgb", (low, high),
        inverted=inverted, no_data=no_data, present=present,
    )  # fmt: skip


def _first_frame(data: Any) -> np.ndarray:
    """As stored.

    imagecodecs decodes lossless JPEG and JPEG-LS, for which pydicom wants further libraries, and JPEG 2000, in which a
    changed byte can keep pydicom 3.0 busy for ever.

    Raises:
        DecodeError: The frame is not what the tags say.
    """
    pydicom = _pydicom()
    if "TransferSyntaxUID" not in data.file_meta:  # without a preamble: never compressed
        implicit, _ = data.original_encoding
        syntax = pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRLittleEndian
        data.file_meta.TransferSyntaxUID = syntax
    codec = _BY_IMAGECODECS.get(str(data.file_meta.get("TransferSyntaxUID")))
    if codec is None:
        pixels: np.ndarray = pydicom.pixels.pixel_array(data, index=0)
        return pixels
    import imagecodecs

    samples, allocated, bits = int(data.SamplesPerPixel), int(data.BitsAllocated), int(data.BitsStored)
    if allocated not in (8, 16) or not 0 < bits <= allocated:
        raise DecodeError(f"DICOM of {codec} with {bits} of {allocated} bits")
    shape = (int(data.Rows), int(data.Columns), *((samples,) if samples > 1 else ()))
    room = np.empty(shape, f"u{allocated // 8}")  # what is of another size does not fit
    frame = next(pydicom.encaps.generate_frames(data.PixelData, number_of_frames=_frames(data)))
    if codec == "jpeg2k":
        _check_jpeg_2000(frame, *shape[:2])
    pixels = getattr(imagecodecs, f"{codec}_decode")(frame, out=room)
    if data.get("PixelRepresentation"):  # the bits in use are a signed number
        unused = allocated - bits
        pixels = (pixels << unused).view(f"i{allocated // 8}") >> unused
    return pixels


def _check_jpeg_2000(frame: bytes, height: int, width: int) -> None:
    """Refuse a frame of another size, or of very many tiles, before its decoder makes room for it.

    Source: ISO/IEC 15444-1, A.5.1 (marker SIZ).
    """
    start = frame.find(b"\xff\x4f\xff\x51")
    if start < 0 or len(frame) < start + 40:
        raise DecodeError("JPEG 2000 without a header")
    right, bottom, left, top, tile_width, tile_height = struct.unpack_from(">6I", frame, start + 8)
    if (right - left, bottom - top) != (width, height):
        raise DecodeError(f"JPEG 2000 of {right - left}x{bottom - top} pixels in a DICOM of {width}x{height}")
    tiles = math.ceil(right / max(1, tile_width)) * math.ceil(bottom / max(1, tile_height))
    if tiles > 65_535:
        raise DecodeError(f"JPEG 2000 of {tiles:,} tiles")


def _pydicom() -> Any:
    try:
        import pydicom
        import pydicom.encaps
        import pydicom.pixels
    except ImportError:
        raise DecodeError(f"reading DICOM needs pydicom; {install('dicom')}") from None
    return pydicom


def _header(content: bytes) -> Any:
    """The tags before the pixels, checked."""
    pydicom = _pydicom()
    if _DEFLATED in content[:10_000]:
        raise DecodeError("deflated DICOM is not read")  # what it inflates to is unknown until it is done
    header = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True, force=True)
    for name in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "PhotometricInterpretation"):
        if header.get(name) is None:
            raise DecodeError(f"DICOM without {name}: it holds no picture")
    if "PixelRepresentation" not in header:
        header.PixelRepresentation = 0
    check_size(
        int(header.Columns),
        int(header.Rows),
        bytes_per_pixel=int(header.SamplesPerPixel) * math.ceil(int(header.BitsAllocated) / 8),
    )
    return header


def _frames(header: Any) -> int:
    return int(header.get("NumberOfFrames") or 1)


def _is_rescaled(header: Any) -> bool:
    if "ModalityLUTSequence" in header:
        return True
    if header.get("RescaleSlope") is None or header.get("RescaleIntercept") is None:
        return False
    return (float(header.RescaleSlope), float(header.RescaleIntercept)) != (1.0, 0.0)


def _stored_range(header: Any, dtype: np.dtype) -> tuple[float, float]:
    """Of the bits that are in use."""
    if dtype.kind == "f":
        return 0.0, 1.0
    bits = int(header.BitsStored)
    return 0.0, float(2 ** (bits - 1) - 1 if header.PixelRepresentation else 2**bits - 1)
