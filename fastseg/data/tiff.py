"""Rows of a TIFF that may be larger than memory: only the strips or tiles that hold them are read and decoded.

Pillow decodes a TIFF whole, and refuses one of hundreds of millions of pixels. So each strip or tile is handed to it as
a small TIFF of its own, with the file's tags that say how pixels are stored. No other library is needed, every
compression that Pillow has is read, and pixels become RGB by the rule of `decode`.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from fastseg.data.decode import MAX_PIXELS, READING_ERRORS, orientation, reason, rgb_of
from fastseg.errors import FastsegError
from fastseg.texts import shown

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are of BigTIFF
ROWS = 64  # of uncompressed pixels that are read at once

# Tags of TIFF 6.0, and of its supplements.
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, PLANAR = 256, 257, 258, 259, 262, 277, 284
OFFSETS, COUNTS, ROWS_PER_STRIP = 273, 279, 278
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS = 322, 323, 324, 325
# What says how pixels are stored: those above, fill order, fax options, predictor, palette, inks, extra samples, sample
# format, JPEG tables, and how YCbCr is meant.
KEPT = (
    BITS,
    COMPRESSION,
    PHOTOMETRIC,
    SAMPLES,
    PLANAR,
    266,
    292,
    293,
    317,
    320,
    332,
    338,
    339,
    347,
    529,
    530,
    531,
    532,
)
UNCOMPRESSED, YCBCR, SEPARATE = 1, 6, 2


def is_large(path: str | Path) -> bool:
    """Whether a file is a TIFF of more pixels than are decoded at once; False too where it cannot be read."""
    try:
        with open(path, "rb") as file:
            if file.read(4) not in SIGNATURES:
                return False
            file.seek(0)
            with TiffImageFile(file) as image:
                return image.width * image.height > MAX_PIXELS
    except READING_ERRORS:
        return False


def _bits(tags: ImageFileDirectory_v2) -> int:
    """Of a pixel, all its samples together."""
    bits, samples = tags.get(BITS, (1,)), tags.get(SAMPLES, 1)
    return bits[0] * samples if len(bits) == 1 else sum(bits)


class TiffRows:
    """A TIFF's pixels by rows, read from top to bottom: what was decoded for rows above is forgotten.

    Attributes:
        height, width: of the image.

    Raises:
        FastsegError: no TIFF, or one that cannot be read in parts.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file, TiffImageFile(file) as image:
                if orientation(image) > 1:
                    raise ValueError(
                        "a TIFF that is to be turned, which Pillow does and others do not: save it upright"
                    )
                self.width, self.height = image.size
                self._read_tags(image.tag_v2)
        except READING_ERRORS as error:
            raise self._refused(error) from None
        self._decoded: dict[int, np.ndarray] = {}

    def _refused(self, error: Exception) -> FastsegError:
        return FastsegError(f"{shown(self.path)}: cannot be decoded: {reason(str(self.path), error)}")

    def _read_tags(self, tags: ImageFileDirectory_v2) -> None:
        """Where pieces lie: `planes` x rows of pieces x `across`, each of `piece` (height, width) pixels."""
        self.prefix = tags.prefix
        self.kept = {tag: (tags.tagtype[tag], tags[tag]) for tag in KEPT if tag in tags}
        self.planes = tags.get(SAMPLES, 1) if tags.get(PLANAR, 1) == SEPARATE else 1
        self.tiled = TILE_OFFSETS in tags
        names = (TILE_OFFSETS, TILE_COUNTS) if self.tiled else (OFFSETS, COUNTS)
        if not all(name in tags for name in names):
            raise ValueError("a TIFF without the places of its strips: save it anew")
        offsets, counts = (tags[name] for name in names)
        rows = min(tags.get(ROWS_PER_STRIP, self.height), self.height)
        self.piece = (tags[TILE_HEIGHT], tags[TILE_WIDTH]) if self.tiled else (rows, self.width)
        self.places = list(zip(offsets, counts, strict=True))
        plain = tags.get(COMPRESSION, 1) == UNCOMPRESSED and tags.get(PHOTOMETRIC) != YCBCR and self.planes == 1
        joined = all(a + n == b for (a, n), (b, _) in zip(self.places, self.places[1:], strict=False))
        if not self.tiled and plain and joined:
            # One run of bytes, whatever its strips are called (some writers make one of the whole image).
            line = -(-self.width * _bits(tags) // 8)
            self.piece = (ROWS, self.width)
            self.places = [(offsets[0] + top * line, ROWS * line) for top in range(0, self.height, ROWS)]
        self.down, self.across = (-(-a // b) for a, b in zip((self.height, self.width), self.piece, strict=True))
        if len(self.places) != self.planes * self.down * self.across:
            raise ValueError("a TIFF with fewer or more strips or tiles than its size takes: save it anew")
        if self.piece[0] * self.piece[1] > MAX_PIXELS:
            raise ValueError(
                f"{self.width}x{self.height} in strips of {self.piece[0]} rows, which cannot be read in parts: save it "
                "in tiles, or in strips of fewer rows"
            )

    def read(self, top: int, bottom: int) -> np.ndarray:
        """uint8[bottom - top, W, 3] of the image's rows from `top` on.

        Raises:
            FastsegError: these rows cannot be decoded.
        """
        first, last = top // self.piece[0], (bottom - 1) // self.piece[0]
        self._decoded = {row: pixels for row, pixels in self._decoded.items() if row >= first}
        try:
            for row in range(first, last + 1):
                if row not in self._decoded:
                    self._decoded[row] = self._row(row)
        except READING_ERRORS as error:
            raise self._refused(error) from None
        begin = first * self.piece[0]
        rows = np.concatenate([self._decoded[row] for row in range(first, last + 1)])
        return rows[top - begin : bottom - begin]

    def _row(self, row: int) -> np.ndarray:
        """A row of pieces, decoded."""
        height = min(self.piece[0], self.height - row * self.piece[0])
        with open(self.path, "rb") as file:
            pieces = [self._piece(file, row * self.across + column)[:height] for column in range(self.across)]
        return np.concatenate(pieces, axis=1)[:, : self.width]

    def _piece(self, file: io.BufferedReader, number: int) -> np.ndarray:
        """A strip or tile as a TIFF of one strip for each plane."""
        parts = []
        for plane in range(self.planes):
            offset, count = self.places[plane * self.down * self.across + number]
            file.seek(offset)
            parts.append(file.read(count))
        height, width = self.piece
        if not self.tiled:  # the last strip may be shorter; a tile is whole
            height = min(height, self.height - number * height)
        tags = ImageFileDirectory_v2(prefix=self.prefix)
        for tag, (kind, value) in self.kept.items():
            tags.tagtype[tag] = kind
            tags[tag] = value
        tags[WIDTH], tags[HEIGHT], tags[ROWS_PER_STRIP] = width, height, height
        counts = [len(part) for part in parts]
        tags[COUNTS] = tuple(counts)
        tags[OFFSETS] = tuple(sum(counts[:plane]) for plane in range(self.planes))
        small = io.BytesIO()
        tags.save(small)
        small.write(b"".join(parts))
        with Image.open(small) as image:
            return rgb_of(image)
