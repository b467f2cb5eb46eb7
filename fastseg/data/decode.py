"""Pixels and labels out of files, by Pillow: it gives palette and 16-bit labels as they are.

One rule for all tiers, `predict` and `data check`: pixels are taken as they are stored, or, where `upright`, turned as
their EXIF orientation says; as RGB (grey is repeated, alpha is dropped, CMYK and palettes are converted); of 16 bits
the upper 8.
"""

import contextlib
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base

from fastseg.data.classes import ClassMap
from fastseg.errors import FastsegError

# What Pillow raises for a file that it cannot read.
READING_ERRORS: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
READING_ERRORS += (IndexError, KeyError, TypeError, OverflowError, struct.error, zlib.error)

# From here on Pillow warns of files that are small and unpack to gigabytes; `opened` refuses them in one line.
MAX_PIXELS = 89_478_485
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# Pillow stretches grey of 2 and 4 bits to 0..255; a label's values are what was there before.
_STRETCHED = {"L;2": 85, "L;4": 17}


def raw_mode(file: Image.Image) -> str:
    """Pillow's name for an open file's pixels: its mode, or what a PNG is before Pillow turns it into 8 bits.

    Such as `L;4` and `RGB;16B`, which Pillow opens as L and RGB.
    """
    tiles = getattr(file, "tile", None)  # none once it is decoded
    raw = tiles[0].args if tiles and file.format == "PNG" else None
    return raw if isinstance(raw, str) and file.mode in ("L", "LA", "RGB", "RGBA") else file.mode


def orientation(file: Image.Image) -> int:
    """An open file's EXIF orientation, 1 to 8: 1 is upright, or none."""
    tags = Image.Exif()
    if file.format == "TIFF":
        tags = file.getexif()
    elif "exif" in file.info:
        tags.load(file.info["exif"])  # alone: Pillow would look for others, and decode a PNG to look behind its pixels
    found = tags.get(Base.Orientation)
    return found if isinstance(found, int) and 2 <= found <= 8 else 1


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels [H, W, ...] as an EXIF orientation says that they are to be looked at.

    1 to 8 say on which side the stored first row is, and on which the first column (Exif 2.32, tag 274): from 5 on rows
    are columns.
    """
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    down = -1 if orientation in (3, 4, 7, 8) else 1
    across = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(pixels[::down, ::across])


@contextlib.contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """An image file, of which nothing but the header has been read.

    Raises:
        READING_ERRORS: no image, one that claims to be huge, or a TIFF that Pillow would turn.
    """
    with Image.open(path) as file:
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"{file.width}x{file.height} are more than {MAX_PIXELS} pixels: cut it into parts")
        if file.format == "TIFF" and orientation(file) > 1:
            # Pillow 13 turns TIFFs whether asked or not, and garbles those of grey without compression.
            raise ValueError("a TIFF that is to be turned, which Pillow does and others do not: save it upright")
        yield file


def _decode(path: str, convert: Callable[[Image.Image], np.ndarray], upright: bool) -> np.ndarray:
    try:
        with opened(path) as file:
            turn = orientation(file) if upright else 1  # as headers have it: Pillow may find another behind the pixels
            return turned(convert(file), turn)
    except READING_ERRORS as error:
        raise FastsegError(f"{path}: cannot be decoded: {reason(path, error)}") from None


def reason(path: str, error: Exception) -> str:
    """What Pillow found wrong with a file, without its name."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image" if os.path.getsize(path) else "it is empty"
    return getattr(error, "strerror", None) or str(error) or "it ends too soon"


def rgb_of(image: Image.Image) -> np.ndarray:
    """uint8[H, W, 3] of an image of any mode.

    Raises:
        ValueError: pixels of 32 bits, whose range nobody knows.
    """
    if image.mode.startswith("I;16"):
        return np.repeat((np.array(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits (mode {image.mode}): save it with 8 or 16")
    return np.array(image.convert("RGB"))


def decode_image(path: str, upright: bool = False) -> np.ndarray:
    """uint8[H, W, 3]: the file's pixels as RGB, as they are stored, or upright."""
    return _decode(path, rgb_of, upright)


def _values_of(file: Image.Image) -> np.ndarray:
    """The values that a file has, [H, W]; [H, W, C] of a colour image, but for grey in formats of colours alone."""
    stretch, most = _STRETCHED.get(raw_mode(file), 1), _largest(file)
    values = np.array(file)
    if values.dtype == bool:
        return values.astype(np.uint8)
    if most:
        full = 255 if values.dtype == np.uint8 else 65535
        return np.rint(values * (most / full)).astype(np.uint16)
    if file.format in ("WEBP", "QOI") and (values[..., :3] == values[..., :1]).all():
        return values[..., 0]
    return values // stretch if stretch > 1 else values


def _largest(file: Image.Image) -> int:
    """The value that an open PGM calls white where Pillow stretches all of them for it, else 0."""
    tiles = getattr(file, "tile", None)
    if file.format != "PPM" or file.mode not in ("L", "I") or not tiles or tiles[0].codec_name == "raw":
        return 0
    return tiles[0].args[1]


def read_label(path: str, classes: ClassMap, upright: bool = False) -> np.ndarray:
    """A label as its file has it: indices [H, W] by value (palettes ignored), or colours uint8[H, W, 3]."""
    raw = _decode(path, rgb_of if classes.is_color else _values_of, upright)
    if not classes.is_color and (raw.ndim != 2 or raw.dtype.kind not in "ui"):
        raise FastsegError(
            f"{path}: an index label must be a grey or palette image, this one is {raw.dtype} {raw.shape}"
        )
    return raw


def decode_label(path: str, classes: ClassMap, unknown: int, upright: bool = False) -> np.ndarray:
    """uint8[H, W] of class indices; values outside the class map become `unknown`."""
    return classes.to_classes(read_label(path, classes, upright), unknown)
