"""Large scenes as the tiles that they can be cut into."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from PIL import Image

from hardpatch.data.images.decode import DecodeError, Decoder, Sample, find_missing
from hardpatch.data.images.formats import describe, read_stored
from hardpatch.data.images.stored import Stored
from hardpatch.data.sources.base import Source
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import tracked


class TiledSource(Source):
    """Square tiles of the images of a source, row by row; the last of a row or column is moved inward.

    An image smaller than a tile is one tile, as it is. Tiles are lossless files: PNG of 8-bit grey and colour (pixels
    without data transparent), else ``.npy`` (floats that are no data NaN).

    Args:
        source: Large images, each a file.
        tile: Side, pixels.
        overlap: Pixels that neighbours have in common.
        decoder: How tiles are read.

    Raises:
        InputError: The images are no files.
    """

    def __init__(self, source: Source, *, tile: int, overlap: int, decoder: Decoder) -> None:
        if source.decoder is None:
            raise InputError("tile: the images must be files; drawn shapes are not")
        self.source, self.tile, self.step = source, tile, tile - overlap
        self.decoder: Decoder = decoder
        measured = tracked(range(len(source)), "measuring scenes", total=len(source))
        self._sizes = [self._measure(index) for index in measured]
        counts = [len(self._starts(height)) * len(self._starts(width)) for height, width in self._sizes]
        self._ends = list(accumulate(counts))
        self._labels = None if source.labels is None else np.repeat(np.array(source.labels), counts).tolist()
        self._last: tuple[int, Stored] | None = None

    def _measure(self, index: int) -> tuple[int, int]:
        """Height and width; of a damaged image nothing, and it is one tile that cannot be read."""
        try:
            about = describe(self.source.content(index))
        except (DecodeError, OSError):
            return 0, 0
        return about.height, about.width

    def _starts(self, side: int) -> list[int]:
        """First pixels of the tiles along a side."""
        if side <= self.tile:
            return [0]
        starts = list(range(0, side - self.tile + 1, self.step))
        return starts if starts[-1] == side - self.tile else [*starts, side - self.tile]

    def _place(self, index: int) -> tuple[int, int, int]:
        """Image, and first row and column of a tile."""
        image = bisect_right(self._ends, index)
        within = index - (self._ends[image - 1] if image else 0)
        height, width = self._sizes[image]
        columns = self._starts(width)
        return image, self._starts(height)[within // len(columns)], columns[within % len(columns)]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, index: int) -> Sample:
        """Decode one tile."""
        return self.decoder(self.content(index))

    def content(self, index: int) -> bytes:
        """A tile as a file; the scene of the tile before is kept decoded.

        Raises:
            OSError: The scene is damaged, or of a kind that tiles cannot keep.
        """
        image, y, x = self._place(index)
        if self._last is None or self._last[0] != image:
            try:
                self._last = image, read_stored(self.source.content(image), channels=self.decoder.channels)
            except DecodeError as error:
                raise OSError(str(error)) from None
        scene = self._last[1]
        if scene.inverted or scene.premultiplied or (scene.is_deep and scene.alpha is not None):
            raise OSError("files of this kind (inverted, or deep with transparency) cannot be cut into tiles")
        missing = find_missing(scene, self.decoder.no_data)
        window = np.s_[y : y + self.tile, x : x + self.tile]
        return _as_file(
            scene.pixels[window],
            alpha=None if scene.alpha is None else scene.alpha[window],
            missing=None if missing is None or self.decoder.no_data is not None else missing[window],
        )

    def name(self, index: int) -> str:
        """The scene's, with row and column of the first pixel."""
        image, y, x = self._place(index)
        return f"{self.source.name(image)}_y{y}_x{x}"

    @property
    def labels(self) -> Sequence[str] | None:
        """Those of the scenes."""
        return self._labels


def _as_file(pixels: np.ndarray, *, alpha: np.ndarray | None, missing: np.ndarray | None) -> bytes:
    """Lossless: PNG where it can hold the pixels, else an array."""
    file = io.BytesIO()
    holes = missing is not None and bool(missing.any())
    if pixels.dtype == np.uint8 and pixels.shape[2] in (1, 3):
        if alpha is not None or holes:
            clear = np.full(pixels.shape[:2], 255, np.uint8) if alpha is None else alpha.copy()
            if missing is not None:
                clear[missing] = 0
            pixels = np.concatenate([pixels, clear[..., None]], axis=2)
        Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, "PNG", compress_level=1)
        return file.getvalue()
    if holes:
        pixels = pixels.astype(pixels.dtype if pixels.dtype.kind == "f" else np.float32)
        pixels[missing] = np.nan
    np.save(file, np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return file.getvalue()
