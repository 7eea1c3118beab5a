"""``.npy`` and ``.npz``: (H, W), (H, W, C) or (C, H, W) arrays of numbers."""

from __future__ import annotations

import io
import math
import zipfile
from typing import cast

import numpy as np
from numpy.lib import format as npy

from hardpatch.data.images.stored import Colour, DecodeError, Description, Kind, Stored, check_size, type_range

_CONVERTIBLE = (1, 3)
"""Grey and colour can be turned into each other."""


def describe(content: bytes) -> Description:
    """From the array's header; where the channels are is a guess."""
    file, name, _ = _open(content)
    with file:
        shape, _, dtype = _header(file)
    height, width, bands = _layout(shape, None)[1]
    kind: Kind = "float" if dtype.kind == "f" else "signed" if dtype.kind == "i" else "unsigned"
    bits = 1 if dtype.kind == "b" else 8 * dtype.itemsize
    return Description(name, width, height, bands, False, _colour(bands), bits, kind)


def read(content: bytes, channels: int | None) -> Stored:
    """The array, channels last."""
    file, name, length = _open(content)
    with file:
        shape, in_fortran_order, dtype = _header(file)
        axis, _ = _layout(shape, channels)
        size = math.prod(map(int, shape)) * dtype.itemsize
        if (there := length - file.tell()) != size and (there < size or name == "NPZ"):
            raise DecodeError(f"holds {there:,} bytes of values, {size:,} are announced")
        data = file.read(size)
        file.read(1)  # a zip file's checksum is looked at when its end is reached
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if in_fortran_order else "C")
    if array.ndim == 2:
        array = array[..., None]
    elif axis == 0:
        array = array.transpose(1, 2, 0)
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return Stored(array, _colour(array.shape[2]), type_range(array.dtype))


def _open(content: bytes) -> tuple[io.BufferedIOBase, str, int]:
    """The file of one array, its format and its length."""
    if not content.startswith(b"PK"):
        return io.BytesIO(content), "NPY", len(content)
    archive = zipfile.ZipFile(io.BytesIO(content))
    names = archive.namelist()
    if len(names) != 1 or not names[0].endswith(".npy"):
        raise DecodeError(f"an .npz file must hold one array, this holds {names[:5]}")
    return cast(io.BufferedIOBase, archive.open(names[0])), "NPZ", archive.getinfo(names[0]).file_size


def _header(file: io.BufferedIOBase) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type, checked."""
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise DecodeError(f"array format {version}")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, in_fortran_order, dtype = read(file)
    if dtype.kind not in "buif" or dtype.itemsize > 8:
        raise DecodeError(f"array of type {dtype}, which holds no plain numbers")
    height, width, bands = _layout(shape, None)[1]
    if not math.prod(map(int, shape)):
        raise DecodeError("image without pixels")
    check_size(width, height, bytes_per_pixel=bands * dtype.itemsize)
    return shape, in_fortran_order, dtype


def _layout(shape: tuple[int, ...], channels: int | None) -> tuple[int, tuple[int, int, int]]:
    """Which axis holds the channels, and height, width and channels.

    The last axis that has just ``channels`` entries or can be converted to them, or else the first; without
    ``channels`` the shorter of the two.
    """
    if len(shape) == 2:
        return 2, (shape[0], shape[1], 1)
    if len(shape) != 3:
        raise DecodeError(f"array of shape {shape}; an image has two or three axes")
    axis = 2 if shape[2] <= shape[0] else 0
    wanted = [channels, *(_CONVERTIBLE if channels in _CONVERTIBLE else ())]
    for count in wanted if channels else ():
        if count in (shape[2], shape[0]):
            axis = 2 if shape[2] == count else 0
            break
    return axis, (shape[0], shape[1], shape[2]) if axis == 2 else (shape[1], shape[2], shape[0])


def _colour(bands: int) -> Colour:
    return "grey" if bands == 1 else "rgb" if bands == 3 else "bands"
