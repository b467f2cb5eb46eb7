"""Pixels and labels out of files, by Pillow: it gives palette and 16-bit labels as they are."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from fastseg.data.classes import ClassMap
from fastseg.errors import FastsegError


def _decode(path: str, convert: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    try:
        with Image.open(path) as file:
            return np.array(convert(file))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FastsegError(f"{path}: cannot be decoded: {error}") from None


def decode_image(path: str) -> np.ndarray:
    """uint8[H, W, 3]: the file's pixels as RGB, as they are stored (an EXIF orientation is not applied)."""
    return _decode(path, lambda file: file.convert("RGB"))


def read_label(path: str, classes: ClassMap) -> np.ndarray:
    """A label as its file has it: indices [H, W] by value (palettes ignored), or colours uint8[H, W, 3]."""
    raw = _decode(path, lambda file: file.convert("RGB") if classes.is_color else file)
    if not classes.is_color and (raw.ndim != 2 or raw.dtype.kind not in "ui"):
        raise FastsegError(
            f"{path}: an index label must be a grey or palette image, this one is {raw.dtype} {raw.shape}"
        )
    return raw


def decode_label(path: str, classes: ClassMap, unknown: int) -> np.ndarray:
    """uint8[H, W] of class indices; values outside the class map become `unknown`."""
    return classes.to_classes(read_label(path, classes), unknown)
